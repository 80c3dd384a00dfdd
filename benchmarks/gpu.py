"""Everything that only a GPU can tell, in one command, and a report of it.

    python benchmarks/gpu.py                            # parity, memcheck, timings, sanitizers: gpu-report.md and .json
    python benchmarks/gpu.py --only sample --minutes 9  # one part (parity, sample, step or sanitizer) in nine minutes
    python benchmarks/gpu.py --plan                     # print what would run and how long it may take, needs no GPU

Parity and memcheck come first, the other sanitizers, which are slow, last. The report is written anew after every task, so that
what has run is there however it ends; what there was no time for is named in it. Timings run in a process of their own: a
kernel that hangs or breaks the device's context costs its own task and no other. How long the whole takes is not known:
every task has a limit, and all of them together end after --minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
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

from benchmarks.gpu_timings import DTYPES, OURS, STEP_MODES, in_one_line, random_models, sample_times, step_time
from ensemble_decode import ExpertPair
from ensemble_decode.models.ensemble import Ensemble, load_ensemble

PARTS = ("parity", "sample", "step", "sanitizer")
VOCABULARIES = (128256, 50257, 151936, 32000)
BATCHES = (1, 8, 64, 512)
CONTEXTS = (128, 1024)
STEP_BATCHES = (1, 8, 32)
#: What compute-sanitizer is told to end with if it has errors to report.
REPORTED = 99
#: Seconds that a timing in a new process may take beyond its limit: torch is imported, kernels compiled, models loaded.
START_UP = 240.0


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to run: its part of the report, the seconds that it may take, and what is varied.

    A program's options are its command, the variables that it is run with, and, if it is to report an error, what it says then.
    """

    part: str
    name: str
    limit: float
    options: dict[str, Any] = field(default_factory=dict)


def plan(parts: tuple[str, ...]) -> list[Task]:
    """Everything that a run does, in its order: what is right, then what matters most."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-m", "gpu", "-s"]
    planted = [python, "-c", "from benchmarks.gpu_timings import read_past_the_end; read_past_the_end()"]
    cases = [*tests, "tests/gpu/test_ensemble_sample.py", "-k", "parity and (1023 or 4097) and float32"]
    reported = {"says": "Invalid __global__ read"}
    memcheck, *others = (
        Task("sanitizer", f"compute-sanitizer {tool}", 300, sanitized(tool, cases))
        for tool in ("memcheck", "racecheck", "synccheck", "initcheck")
    )
    tasks = [
        Task("parity", "pytest -m gpu", 900, {"command": [*tests, "tests/gpu"]}),
        Task("sanitizer", "memcheck of a planted read out of bounds", 120, sanitized("memcheck", planted) | reported),
        memcheck,
    ]
    tasks += [
        Task("sample", f"V={vocab} B={batch} {dtype}", 60, {"vocab": vocab, "batch": batch, "dtype": dtype})
        for dtype in DTYPES
        for vocab in (VOCABULARIES if dtype == "bfloat16" else VOCABULARIES[:1])
        for batch in BATCHES
    ]
    tasks.append(Task("step", "models are made and loaded", 300))
    tasks += [
        Task("step", f"{name}, B={batch}, context {context}", 60, {"mode": name, "batch": batch, "context": context})
        for name, *_ in STEP_MODES
        for context in CONTEXTS
        for batch in STEP_BATCHES
    ]
    return [task for task in (*tasks, *others) if task.part in parts]


def sanitized(tool: str, command: list[str]) -> dict[str, Any]:
    """Options of a program under compute-sanitizer, which ends with 99 if it has errors to report."""
    start = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(REPORTED)]
    if tool == "memcheck":
        start += [
            "--report-api-errors",
            "no",
        ]  # torch asks the driver for what may not be there, and handles the answer
    # A read past the end of a tensor lies inside the blocks of torch's caching allocator.
    return {"command": [*start, *command], "environment": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}


# ── running: other programs, and a process for the timings ──────────────────────────────────────────────────────────
def run_command(
    command: list[str], limit: float, environment: dict[str, str] | None = None, says: str | None = None
) -> dict[str, Any]:
    """Run a program for at most ``limit`` seconds, and keep how it ended and the end of what it said.

    It passes by ending with 0; where it is to say something, by saying that and ending with what a sanitizer's report ends with.
    """
    if shutil.which(command[0]) is None:
        return {"skipped": f"{command[0]} is not installed"}
    start = time.perf_counter()
    root = Path(__file__).parent.parent
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            cwd=root,
            env=os.environ | (environment or {}),
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started: a sanitizer's program is its child
                process.wait()
        said.seek(0)
        text = said.read().strip()
    tail = text.splitlines()[-15:]
    if code is None:
        tail.append(f"stopped after {limit:.0f} s")
    passed = code == 0 if says is None else code == REPORTED and says in text
    return {"passed": passed, "seconds": time.perf_counter() - start, "tail": "\n".join(tail)}


def time_tasks(connection: Connection, models: tuple[str, str, str] | None, folder: Path) -> None:
    """The process that times: a task comes in, and (whether that was all, what is new of its result) goes out, until killed.

    Models are loaded for the first step; if none are given, they are made in ``folder``.
    """
    os.setsid()
    device = torch.device("cuda", torch.cuda.current_device())
    ensemble: Ensemble | None = None
    while True:
        task = connection.recv()
        result: dict[str, Any] = {}
        try:
            if task.part == "sample":
                for so_far in sample_times(**task.options, device=device):
                    connection.send((False, so_far))
            else:
                if ensemble is None:
                    target, expert, anti = models or random_models(folder, device)
                    ensemble = load_ensemble(target, {"pair": ExpertPair(expert, anti)}, device=str(device))
                if task.options:
                    result = step_time(ensemble, **task.options)
        except Exception as error:
            result = {"error": in_one_line(error)}
        connection.send((True, result))


class Timer:
    """Runs tasks in a process that is replaced when it takes too long, dies, or can't use its device any more."""

    def __init__(self, work: Callable[..., None], *arguments: Any, start: str = "spawn") -> None:
        self.work, self.arguments, self.context = work, arguments, multiprocessing.get_context(start)
        self.process: multiprocessing.process.BaseProcess | None = None
        self.connection: Connection | None = None

    def run(self, task: Task, limit: float) -> dict[str, Any]:
        """The task's result; with an "error", what was known of it by then."""
        end = time.perf_counter() + limit
        if self.connection is None:
            self.connection, theirs = self.context.Pipe()
            self.process = self.context.Process(target=self.work, args=(theirs, *self.arguments), daemon=True)  # type: ignore[attr-defined]
            self.process.start()
            theirs.close()
        result: dict[str, Any] = {}
        finished = False
        try:
            self.connection.send(task)
            while not finished:
                if self.connection.poll(max(0.0, end - time.perf_counter())):
                    finished, new = self.connection.recv()
                else:
                    finished, new = True, {"error": f"stopped after {limit:.0f} s"}
                result |= new
        except (EOFError, ConnectionError):
            result["error"] = "the process died"
        if "error" in result and not result["error"].startswith("OutOfMemoryError"):
            self.close()
        return result

    def close(self) -> None:
        if self.process is not None and self.connection is not None:
            assert self.process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # it may not lead a group yet, or have died
                os.killpg(self.process.pid, signal.SIGKILL)
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
    try:
        for task in tqdm(tasks, unit="task"):
            is_program = "command" in task.options
            start_up = START_UP if timer.process is None and not is_program else 0.0
            limit = min(task.limit + start_up, end - time.perf_counter())
            if limit < 5:
                result: dict[str, Any] = {"skipped": "no time was left"}
            elif is_program:
                result = run_command(limit=limit, **task.options)
            else:
                result = timer.run(task, limit)
            results.append(asdict(task) | result)
            save(results)
    finally:
        timer.close()
    return results


def is_failure(result: dict[str, Any]) -> bool:
    """Whether a check failed, a task ended with an error, or a form of ours did; peers may fail."""
    ours = (result.get("times", {}).get(name, {}) for name in OURS)
    return result.get("passed") is False or "error" in result or any("failed" in times for times in ours)


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
            is_control = "says" in r.get("options", {})
            good, bad = (
                ("the control was found", "**the control was not found**") if is_control else ("passed", "**failed**")
            )
            outcome = r.get("skipped") or (good if r["passed"] else bad)
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
    for r in sampled:
        broken += [(f"{r['name']}, {name}", t["failed"]) for name, t in r["times"].items() if "failed" in t]
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
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="when all ends; tasks that haven't begun by then are left out"
    )
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
            print(f"{task.part:10}{task.limit:5.0f} s  {' '.join(task.options.get('command', [task.name]))}")
        limits = sum(task.limit for task in tasks) / 60
        print(f"all       ends after {args.minutes:.0f} minutes at the latest; the limits are {limits:.0f} together")
        return 0
    if not torch.cuda.is_available():
        print("gpu.py: torch sees no CUDA device, nothing was run (--plan prints what would be)", file=sys.stderr)
        return 2
    about = describe(torch.device("cuda", torch.cuda.current_device()))

    def save(results: list[dict[str, Any]]) -> None:
        args.out.with_suffix(".json").write_text(json.dumps({"about": about, "results": results}, indent=1))
        args.out.with_suffix(".md").write_text(markdown(about, results))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu.py: stopped"))  # so that what runs is stopped, and files go
    with tempfile.TemporaryDirectory() as folder:  # here, not in the process that may be killed
        timer = Timer(time_tasks, tuple(args.models) if args.models else None, Path(folder))
        results = run_tasks(tasks, timer, 60 * args.minutes, save)
    print(f"{args.out.with_suffix('.md')} and {args.out.with_suffix('.json')} are written")
    return 1 if any(is_failure(r) for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
