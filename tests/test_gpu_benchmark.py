"""``benchmarks/gpu.py`` where there is no GPU: it imports, plans, writes its report from results, and says what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_timings
from ensemble_decode.engine.runner import Runner
from ensemble_decode.models.ensemble import load_ensemble
from tests.conftest import Models
from tests.engine.recorder import Recorder
from tests.engine.test_correctness import ensemble

ROOT = Path(__file__).parent.parent


def test_the_plan_names_every_part(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == set(gpu.PARTS)
    assert len(lines) == 1 + 4 * 5 + 6 * 6 + 4
    assert any("compute-sanitizer --tool racecheck" in line for line in lines)
    assert gpu.main(["--plan", "--only", "step"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6 * 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--out", str(tmp_path / "report")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "gpu.py: torch sees no CUDA device, nothing was run (--plan prints what would be)"
    ]
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_tests_that_need_a_gpu_are_skipped_with_a_reason() -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-rs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "no CUDA device is visible to torch" in done.stdout
    assert "passed" not in done.stdout


def test_a_step_that_is_timed_is_one_the_graph_takes(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are timed as planned, on the stand-in: captured where the mode says so, and only there."""
    pairs, _ = ensemble("llama", "full", models)
    loaded = load_ensemble(models.model("llama"), pairs, dtype="float32")

    def on_stand_in(*args: object, **options: object) -> Runner:
        return Runner(*args, device=Recorder(), **options)  # type: ignore[arg-type]

    monkeypatch.setattr(gpu_timings, "Runner", on_stand_in)
    for name, _, _, graphs in gpu_timings.STEP_MODES:
        result = gpu_timings.step_time(loaded, name, 3, 40, rounds=3)
        assert result["median"] > 0
        assert result["replays"] == (8 if graphs else 0)


def test_the_report_tells_what_failed() -> None:
    times = {"chosen": {"cold": 5.0, "warm": 3.0, "graph": True}, "peer": {"failed": "RuntimeError: no"}}
    results = [
        {"part": "parity", "name": "pytest -m gpu", "passed": False, "tail": "1 failed"},
        {"part": "sanitizer", "name": "memcheck", "skipped": "compute-sanitizer is not installed"},
        {"part": "sample", "name": "V=7 B=1", "times": times},
        {"part": "step", "name": "streams, graph", "median": 1.0, "p90": 2.0, "replays": 3},
        {"part": "step", "name": "streams, eager", "error": "ValueError: x"},
    ]
    text = gpu.markdown({"device": "Device X"}, results)
    for expected in (
        "# On Device X",
        "**failed**",
        "1 failed",
        "compute-sanitizer is not installed",
        "5.0 (3.0) | failed",
        "| streams, graph | 1.00 | 2.00 | yes |",
        "* streams, eager: ValueError: x",
    ):
        assert expected in text


def test_programs_that_are_missing_fail_or_hang() -> None:
    assert gpu.run_command(["no-such-program"], 9) == {"skipped": "no-such-program is not installed"}
    assert gpu.run_command([sys.executable, "-c", "print(1); raise SystemExit(3)"], 9)["passed"] is False
    stopped = gpu.run_command([sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(99)"], 0.5)
    assert stopped["passed"] is False
    assert stopped["tail"].splitlines() == ["so far", "stopped after 0 s"]


def stumble(connection: Connection, first: str) -> None:
    """Stands in for the process that times."""
    while task := connection.recv():
        if task.name == "hangs":
            time.sleep(99)
        if task.name == "dies":
            os._exit(3)
        connection.send(
            {"error": "CUDA error"} if task.name == "breaks" else {"median": 1.0, "from": first, "pid": os.getpid()}
        )


def test_a_task_that_hangs_or_dies_costs_no_other() -> None:
    timer = gpu.Timer(stumble, "here", start="fork")
    try:
        said = {}
        for name in ("good", "hangs", "dies", "breaks", "good again", "still good"):
            said[name] = timer.run(gpu.Task("step", name), 1.0 if name == "hangs" else 60.0)
    finally:
        timer.close()
    assert [said[name].get("error") for name in ("hangs", "dies", "breaks")] == [
        "stopped after 1 s",
        "the process died",
        "CUDA error",
    ]
    assert said["good"]["pid"] != said["good again"]["pid"] == said["still good"]["pid"]


def test_the_report_is_kept_after_every_task_and_names_what_there_was_no_time_for() -> None:
    seen: list[list[str]] = []
    tasks = [gpu.Task("parity", "works", {"command": [sys.executable, "-c", ""]}), gpu.Task("step", "late")]
    results = gpu.run_tasks(tasks[:1], gpu.Timer(stumble, ""), 60, lambda r: seen.append([x["name"] for x in r]))
    results += gpu.run_tasks(tasks[1:], gpu.Timer(stumble, ""), 1, lambda r: seen.append([x["name"] for x in r]))
    assert seen == [["works"], ["late"]]
    assert results[0]["passed"] is True
    assert "* late: no time was left" in gpu.markdown({"device": "X"}, results)
