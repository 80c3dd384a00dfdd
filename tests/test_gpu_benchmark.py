"""``benchmarks/gpu.py`` where there is no GPU: it imports, plans, writes its report from results, and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
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
    assert len(lines) == 1 + 4 + 32 + 6 * 8
    assert any("compute-sanitizer --tool racecheck" in line for line in lines)
    assert gpu.main(["--plan", "--only", "step"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6 * 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--out", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
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

    monkeypatch.setattr(gpu, "Runner", on_stand_in)
    for name, _, _, graphs in gpu.STEP_MODES:
        result = gpu.step_time(loaded, name, 3, 40, rounds=3)
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


def test_a_program_that_is_missing_is_skipped() -> None:
    assert gpu.run_command(["no-such-program"]) == {"skipped": "no-such-program is not installed"}
    assert gpu.run_command([sys.executable, "-c", "print(1); raise SystemExit(3)"])["passed"] is False
