"""Everything that only a GPU can tell, in one command, and a report of it.

    python benchmarks/gpu.py                     # parity, timings, compute-sanitizer in ten minutes: gpu-report.md and .json
    python benchmarks/gpu.py --only sample       # one part: parity, sample, step or sanitizer
    python benchmarks/gpu.py --plan              # print what would run, needs no GPU

Parity comes first, the sanitizers, which are slow, last. The report is written anew after every task, so that what has run is
there however it ends; what there was no time for is named in it. Timings run in a process of their own: a kernel that hangs or
breaks the device's context costs its own task and no other.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gpu_timings import DTYPES, STEP_MODES, random_models, sample_times, step_time
from ensemble_decode import ExpertPair
from ensemble_decode.models.ensemble import Ensemble, load_ensemble

PARTS = ("parity", "sample", "step", "sanitizer")
VOCABULARIES = (128256, 50257, 151936, 32000)
BATCHES = (1, 8, 64, 512)
CONTEXTS = (128, 1024)
STEP_BATCHES = (1, 8, 32)
#: Seconds that one task of a part may take.
LIMITS = {"parity": 300.0, "sample": 60.0, "step": 60.0, "sanitizer": 120.0}


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to run: its part of the report, and what is varied."""

    part: str
    name: str
    options: dict[str, Any] = field(default_factory=dict)


def plan(parts: tuple[str, ...]) -> list[Task]:
    """Everything that a run does, in its order: what is right, then what matters most."""
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-s"]
    tasks = [Task("parity", "pytest -m gpu", {"command": [*tests, "tests/gpu"]})]
    tasks += [
        Task("sample", f"V={vocab} B={batch} {dtype}", {"vocab": vocab, "batch": batch, "dtype": dtype})
        for dtype in DTYPES
        for vocab in (VOCABULARIES if dtype == "bfloat16" else VOCABULARIES[:1])
        for batch in BATCHES
    ]
    tasks += [
        Task("step", f"{name}, B={batch}, context {context}", {"mode": name, "batch": batch, "context": context})
        for name, *_ in STEP_MODES
        for context in CONTEXTS
        for batch in STEP_BATCHES
    ]
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "99", *tests]
        command += ["tests/gpu/test_ensemble_sample.py", "-k", "parity and (1023 or 4097) and float32"]
        tasks.append(Task("sanitizer", f"compute-sanitizer {tool}", {"command": command}))
    return [task for task in tasks if task.part in parts]


# ── running: other programs, and a process for the timings ──────────────────────────────────────────────────────────
def run_command(command: list[str], limit: float) -> dict[str, Any]:
    """Run a program for at most ``limit`` seconds, and keep how it ended and the end of what it said."""
    if shutil.which(command[0]) is None:
        return {"skipped": f"{command[0]} is not installed"}
    start = time.perf_counter()
    root = Path(__file__).parent.parent
    with tempfile.TemporaryFile("w+") as said:
        try:
            code: int | None = subprocess.run(
                command, cwd=root, stdout=said, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        said.seek(0)
        tail = said.read().strip().splitlines()[-15:]
    if code is None:
        tail.append(f"stopped after {limit:.0f} s")
    return {"passed": code == 0, "seconds": time.perf_counter() - start, "tail": "\n".join(tail)}


def time_tasks(connection: Connection, models: tuple[str, str, str] | None) -> None:
    """The process that times: a task comes in, its result goes out. Models are loaded for the first step."""
    device = torch.device("cuda", torch.cuda.current_device())
    ensemble: Ensemble | None = None
    with tempfile.TemporaryDirectory() as folder:
        while (task := connection.recv()) is not None:
            try:
                if task.part == "sample":
                    result = sample_times(**task.options, device=device)
                else:
                    if ensemble is None:
                        target, expert, anti = models or random_models(Path(folder))
                        ensemble = load_ensemble(target, {"pair": ExpertPair(expert, anti)}, device=str(device))
                    result = step_time(ensemble, **task.options)
            except Exception as error:
                result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            connection.send(result)


class Timer:
    """Runs tasks in a process that is replaced when it takes too long, dies, or can't use its device any more."""

    def __init__(self, work: Callable[..., None], *arguments: Any, start: str = "spawn") -> None:
        self.work, self.arguments, self.context = work, arguments, multiprocessing.get_context(start)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def run(self, task: Task, limit: float) -> dict[str, Any]:
        if self.connection is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=self.work, args=(theirs, *self.arguments), daemon=True)  # type: ignore[attr-defined]
            self.process.start()
            theirs.close()
        self.connection.send(task)
        if not self.connection.poll(limit):
            result = {"error": f"stopped after {limit:.0f} s"}
        else:
            try:
                result = self.connection.recv()
            except EOFError:
                result = {"error": "the process died"}
        if "error" in result and not result["error"].startswith("OutOfMemoryError"):
            self.close()
        return result

    def close(self) -> None:
        if self.process is not None and self.connection is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = self.connection = None


def run_tasks(
    tasks: list[Task], timer: Timer, seconds: float, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run every task that ``seconds`` leave time for, and ``save`` all results after each; one that fails stops no other."""
    results: list[dict[str, Any]] = []
    end = time.perf_counter() + seconds
    for task in tqdm(tasks, unit="task"):
        limit = min(LIMITS[task.part], end - time.perf_counter())
        if limit < 5:
            result: dict[str, Any] = {"skipped": "no time was left"}
        elif "command" in task.options:
            result = run_command(task.options["command"], limit)
        else:
            result = timer.run(task, limit)
        results.append(asdict(task) | result)
        save(results)
    timer.close()
    return results


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────
def describe(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "l2_cache": properties.L2_cache_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }


def markdown(about: dict[str, Any], results: list[dict[str, Any]]) -> str:
    """The report as it is read."""
    lines = [f"# On {about['device']}", "", ", ".join(f"{key} {value}" for key, value in about.items()), ""]
    checks = [r for r in results if r["part"] in ("parity", "sanitizer")]
    if checks:
        lines += ["## Checks", "", "| check | result |", "|---|---|"]
        for r in checks:
            outcome = r.get("skipped") or r.get("error") or ("passed" if r.get("passed") else "**failed**")
            lines.append(f"| {r['name']} | {outcome} |")
        lines += ["", *(f"```\n{r['tail']}\n```" for r in checks if "tail" in r and not r["passed"]), ""]
    sampled = [r for r in results if r["part"] == "sample" and "times" in r]
    if sampled:
        names = list(dict.fromkeys(name for r in sampled for name in r["times"]))
        lines += [
            "## ensemble_sample, µs a call, cold (warm); \\* without a graph",
            "",
            "| case | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        for r in sampled:
            lines.append(f"| {r['name']} | " + " | ".join(_cell(r["times"].get(name)) for name in names) + " |")
        lines.append("")
    steps = [r for r in results if r["part"] == "step" and "median" in r]
    if steps:
        lines += ["## Decode step, ms", "", "| step | median | p90 | captured |", "|---|---|---|---|"]
        lines += [
            f"| {r['name']} | {r['median']:.2f} | {r['p90']:.2f} | {'yes' if r['replays'] else 'no'} |" for r in steps
        ]
        lines.append("")
    broken = [(r["name"], r.get("error") or r["skipped"]) for r in results if "error" in r or "skipped" in r]
    if broken:
        lines += ["## What did not run", "", *(f"* {name}: {why}" for name, why in broken), ""]
    return "\n".join(lines)


def _cell(times: dict[str, Any] | None) -> str:
    if times is None:
        return ""
    if "failed" in times:
        return "failed"
    return f"{times['cold']:.1f} ({times['warm']:.1f}){'' if times['graph'] else chr(92) + '*'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of the report")
    parser.add_argument("--minutes", type=float, default=10.0, help="tasks that don't begin in that time are left out")
    parser.add_argument("--plan", action="store_true", help="print what would run, and stop")
    parser.add_argument(
        "--models",
        nargs=3,
        metavar=("TARGET", "EXPERT", "ANTI_EXPERT"),
        help="for the step; random weights if left out",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="the report's name, without .md and .json")
    args = parser.parse_args(argv)
    tasks = plan(tuple(args.only))
    if args.plan:
        for task in tasks:
            command = task.options.get("command")
            print(f"{task.part:10}{' '.join(command) if command else task.name}")
        return 0
    if not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device, nothing was run (--plan prints what would be)", file=sys.stderr)
        return 2
    about = describe(torch.device("cuda", torch.cuda.current_device()))

    def save(results: list[dict[str, Any]]) -> None:
        args.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
        args.out.with_suffix(".md").write_text(markdown(about, results))

    timer = Timer(time_tasks, tuple(args.models) if args.models else None)
    results = run_tasks(tasks, timer, 60 * args.minutes, save)
    print(f"{args.out.with_suffix('.md')} and {args.out.with_suffix('.json')} are written")
    failed = any(r.get("passed") is False or "error" in r for r in results)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
