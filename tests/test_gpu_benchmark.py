"""``benchmarks/gpu.py`` where there is no GPU: it imports, plans, writes its report from results, and says what is missing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import gpu, gpu_timings
from ensemble_decode import ExpertPair
from ensemble_decode.engine.runner import Runner
from ensemble_decode.models.ensemble import load_ensemble
from tests.conftest import Models
from tests.engine.recorder import Recorder
from tests.engine.test_correctness import ensemble

ROOT = Path(__file__).parent.parent


def test_the_plan_names_every_part(capsys: pytest.CaptureFixture) -> None:
    assert gpu.main(["--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {*gpu.PARTS, "all"}
    assert len(lines) == 1 + 2 + 4 * 5 + (1 + 6 * 6) + 3 + 1
    assert any("compute-sanitizer --tool racecheck" in line for line in lines)
    assert gpu.main(["--plan", "--only", "step", "--minutes", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 6 * 6 + 1
    assert lines[-1] == "all       ends after 9 minutes at the latest; the limits are 41 together"


def test_what_is_right_comes_before_what_is_fast() -> None:
    """The control, then memcheck, before anything is timed; sanitizers see each tensor's own memory."""
    tasks = gpu.plan(gpu.PARTS)
    first = next(number for number, task in enumerate(tasks) if task.part == "sample")
    assert ["memcheck" in task.name for task in tasks[:first]] == [False, True, True]
    assert "read_past_the_end" in tasks[1].options["command"][-1]
    for task in tasks:
        if task.part == "sanitizer":
            assert task.options["environment"] == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_the_sanitizers_cases_exist() -> None:
    command = next(task.options["command"] for task in gpu.plan(("sanitizer",)) if "-k" in task.options["command"])
    command = command[command.index(sys.executable) :]
    done = subprocess.run([*command, "--collect-only"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line] == [
        "test_parity[1023-float32]",
        "test_parity[4097-float32]",
    ]


def test_the_planted_read_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU can't take the view; what it claims is held against the memory that it stands on."""
    seen: list[Any] = []

    def as_tensor(view: Any, device: str) -> torch.Tensor:
        seen.append(view.__cuda_array_interface__)
        assert seen[0]["data"][0] == view.memory.data_ptr()
        assert seen[0]["shape"][1] > view.memory.numel()
        return torch.zeros(seen[0]["shape"], device=device)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu_timings.read_past_the_end("cpu")
    assert len(seen) == 1


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


def test_random_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a given device, and in a folder that has its name only when it is whole: a process that is killed leaves none that looks so."""
    small = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    monkeypatch.setattr(gpu_timings, "SHAPES", {"target": small, "expert": small})
    saved: list[tuple[str, str]] = []
    save = LlamaForCausalLM.save_pretrained

    def write_down(model: LlamaForCausalLM, folder: Path, **options: Any) -> None:
        saved.append((folder.name, model.device.type))
        if model.device.type == "meta":
            folder.mkdir()
        else:
            save(model, folder, **options)

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", write_down)
    (tmp_path / "elsewhere").mkdir()
    gpu_timings.random_models(tmp_path / "elsewhere", torch.device("meta"))
    assert {device for _, device in saved} == {"meta"}
    saved.clear()
    tmp_path = tmp_path / "here"
    tmp_path.mkdir()
    (tmp_path / "expert-unfinished").mkdir()  # what was being made when the process was killed
    for _ in range(2):
        folders = gpu_timings.random_models(tmp_path, torch.device("cpu"))
    assert saved == [("target-unfinished", "cpu"), ("expert-unfinished", "cpu"), ("anti-unfinished", "cpu")]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["anti", "expert", "target"]
    assert load_ensemble(folders[0], {"pair": ExpertPair(folders[1], folders[2])}).groups


class Clock:
    """Stands in for a CUDA event."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Clock) -> float:
        return (end.at - self.at) * 1e3


class Graph:
    """Stands in for a CUDA graph: what is captured is run, and a replay does nothing."""

    def replay(self) -> None:
        pass


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """``torch.cuda`` for CPU tensors: orders of streams are written down; ``broken`` is a context that answers no more."""
    stand_in = SimpleNamespace(broken=False, waits=[], capturing=False)

    class Stream:
        def wait_stream(self, other: Stream) -> None:
            stand_in.waits.append((self, other))

    main = Stream()

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        stand_in.capturing = True
        try:
            yield
        finally:
            stand_in.capturing = False

    @contextlib.contextmanager
    def stream(side: Stream) -> Iterator[None]:
        assert (side, main) in stand_in.waits, "warmed up on inputs that may not be there yet"
        yield

    def synchronize(device: torch.device | None = None) -> None:
        if stand_in.broken:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    properties = SimpleNamespace(name="X", major=9, minor=0, total_memory=1 << 30, L2_cache_size=1 << 16)
    for name, value in {
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda: main,
        "synchronize": synchronize,
        "CUDAGraph": Graph,
        "graph": capture,
        "Event": Clock,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device: (9, 0),
        "current_device": lambda: 0,
        "is_available": lambda: True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(gpu_timings, "_compiled_pipeline", gpu_timings.sort_pipeline)
    return stand_in


def sampled(dtype: str) -> Iterator[dict[str, Any]]:
    return gpu_timings.sample_times(500, 2, dtype, torch.device("cpu"))


def test_contenders_are_timed_and_those_that_fail_are_told(
    cuda: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that is there and can't be imported costs its own cell; an error need not say anything."""
    (tmp_path / "flashinfer").mkdir()
    (tmp_path / "flashinfer" / "__init__.py").write_text("raise ImportError('another CUDA\\nmore')")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    results = [r | {"names": list(r["times"])} for r in sampled("float32")]
    times = results[-1]["times"]
    assert [r["names"] for r in results] == [list(times)[: n + 1] for n in range(len(times))]
    for name in ("chosen", "torch, sort", "torch.compile, sort"):
        assert times[name]["cold"] > 0
        assert times[name]["graph"] is True
    assert times["FlashInfer"] == {"failed": "ImportError: another CUDA"}
    assert times["vLLM"] == {"failed": "AssertionError: "}
    # The GPU's forms have no device here.
    assert "failed" in times["Triton, two launches"]
    assert gpu.is_failure({"times": times})
    peers = {name: t for name, t in times.items() if name == "chosen" or name not in gpu_timings.OURS}
    assert not gpu.is_failure({"times": peers})
    text = gpu.markdown({"device": "X"}, [{"part": "sample", "name": "V=500", **results[-1]}])
    assert "* V=500, FlashInfer: ImportError: another CUDA" in text


def test_what_a_capture_refuses_is_timed_without_one(cuda: SimpleNamespace) -> None:
    def call() -> None:
        if cuda.capturing:
            raise ValueError("not in a capture")

    cold, captured = gpu_timings.median_call(call, [()] * 4)
    assert cold > 0
    assert captured is False


def test_a_broken_context_ends_the_task(cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """What would fail after it, not for its own fault, is not tried; what was timed before is out."""

    def contenders(*_: object) -> dict[str, Any]:
        def breaks(*_: object) -> None:
            cuda.broken = True
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

        return {"good": lambda *_: None, "breaks": breaks, "innocent": lambda *_: None}

    monkeypatch.setattr(gpu_timings, "contenders", contenders)
    results = sampled("bfloat16")
    assert list(next(results)["times"]) == ["good"]
    assert "illegal memory access" in next(results)["times"]["breaks"]["failed"]
    with pytest.raises(torch.AcceleratorError):
        next(results)


def test_the_process_that_times(
    cuda: SimpleNamespace, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread, on the CPU: partial results of samples, models made and loaded once, errors in one line."""
    made: list[Path] = []
    target, expert = models.model("llama"), models.model("llama", 1)

    def random_models(folder: Path, device: torch.device) -> tuple[str, str, str]:
        made.append(folder)
        return target, expert, expert

    sessions: list[str] = []
    monkeypatch.setattr(os, "setsid", lambda: sessions.append("its own"))
    monkeypatch.setattr(gpu, "random_models", random_models)
    monkeypatch.setattr(
        gpu, "sample_times", lambda vocab, device: iter([{"times": {"a": 1}}, {"times": {"a": 1, "b": 2}}])
    )
    monkeypatch.setattr(gpu, "step_time", lambda loaded, mode: {"median": float(len(loaded.groups))})
    monkeypatch.setattr(gpu, "load_ensemble", lambda *args, device: load_ensemble(*args, device="cpu"))
    ours, theirs = Pipe()

    def serve() -> None:
        with contextlib.suppress(EOFError):
            gpu.time_tasks(theirs, None, tmp_path)

    thread = threading.Thread(target=serve)
    thread.start()
    try:

        def ask(part: str, **options: Any) -> list[tuple[bool, dict[str, Any]]]:
            ours.send(gpu.Task(part, "x", 9, options))
            said = [ours.recv()]
            while not said[-1][0]:
                said.append(ours.recv())
            return said

        assert ask("sample", vocab=5) == [
            (False, {"times": {"a": 1}}),
            (False, {"times": {"a": 1, "b": 2}}),
            (True, {}),
        ]
        assert ask("step") == [(True, {})]
        assert ask("step", mode="m") == [(True, {"median": 2.0})]
        assert ask("step", wrong=1)[0][1]["error"].startswith("TypeError: ")
        assert made == [tmp_path]
        assert sessions == ["its own"]
    finally:
        ours.close()
        thread.join()


def test_the_report_tells_what_failed() -> None:
    times = {"chosen": {"cold": 5.0, "warm": 3.0, "graph": True}, "peer": {"failed": "RuntimeError: no"}}
    results = [
        {"part": "parity", "name": "pytest -m gpu", "passed": False, "tail": "1 failed"},
        {"part": "sanitizer", "name": "memcheck", "skipped": "compute-sanitizer is not installed"},
        {"part": "sanitizer", "name": "planted", "passed": True, "tail": "", "options": {"says": "x"}},
        {"part": "sanitizer", "name": "missed", "passed": False, "tail": "", "options": {"says": "x"}},
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
        "| planted | the control was found |",
        "| missed | **the control was not found** |",
        "* V=7 B=1, peer: RuntimeError: no",
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
    # A control passes by its report: said, and ended with the sanitizer's own code.
    for code, says, passed in ((99, "out of bounds", True), (99, "nothing", False), (0, "out of bounds", False)):
        command = [sys.executable, "-c", f"import os; print(os.environ['WORD']); raise SystemExit({code})"]
        assert gpu.run_command(command, 9, {"WORD": "out of bounds"}, says)["passed"] is passed


FAMILY = "import subprocess as s, sys; p = s.Popen([sys.executable, '-c', 'import time; time.sleep(99)']); print(p.pid, flush=True); p.wait()"


def is_running(pid: int) -> bool:
    """Not gone, and not a corpse that waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_a_program_that_hangs_is_stopped_with_its_children() -> None:
    """compute-sanitizer's program is its child: left alive, it would hold the device."""
    stopped = gpu.run_command([sys.executable, "-c", FAMILY], 2)
    child = int(stopped["tail"].split()[0])
    wait_until(lambda: not is_running(child))


def wait_until(condition: Any) -> None:
    end = time.perf_counter() + 20
    while not condition():
        assert time.perf_counter() < end
        time.sleep(0.05)


def stumble(connection: Connection, first: str) -> None:
    """Stands in for the process that times."""
    os.setsid()
    while True:
        task = connection.recv()
        if task.name == "hangs":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
            connection.send((False, {"times": {"chosen": {}}, "child": child.pid}))
            time.sleep(99)
        if task.name == "dies":
            os._exit(3)
        connection.send(
            (
                True,
                {"error": "CUDA error"}
                if task.name == "breaks"
                else {"median": 1.0, "p90": 1.0, "replays": 0, "from": first, "pid": os.getpid()},
            )
        )


def test_a_task_that_hangs_or_dies_costs_no_other() -> None:
    timer = gpu.Timer(stumble, "here", start="fork")
    try:
        said = {}
        for name in ("good", "hangs", "dies", "breaks", "good again", "still good"):
            said[name] = timer.run(gpu.Task("step", name, 60), 1.0 if name == "hangs" else 60.0)
    finally:
        timer.close()
    assert [said[name].get("error") for name in ("hangs", "dies", "breaks")] == [
        "stopped after 1 s",
        "the process died",
        "CUDA error",
    ]
    assert said["hangs"]["times"] == {"chosen": {}}
    wait_until(lambda: not is_running(said["hangs"]["child"]))
    assert said["good"]["pid"] != said["good again"]["pid"] == said["still good"]["pid"]


def test_the_report_is_kept_after_every_task_and_names_what_there_was_no_time_for() -> None:
    seen: list[list[str]] = []
    works = {"command": [sys.executable, "-c", ""]}
    tasks = [gpu.Task("parity", "works", 9, works), gpu.Task("step", "late", 9)]
    results = gpu.run_tasks(tasks[:1], gpu.Timer(stumble, ""), 60, lambda r: seen.append([x["name"] for x in r]))
    results += gpu.run_tasks(tasks[1:], gpu.Timer(stumble, ""), 1, lambda r: seen.append([x["name"] for x in r]))
    assert seen == [["works"], ["late"]]
    assert results[0]["passed"] is True
    assert "* late: no time was left" in gpu.markdown({"device": "X"}, results)


def test_only_a_new_process_has_time_to_start_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []

    class Watched(gpu.Timer):
        def run(self, task: gpu.Task, limit: float) -> dict[str, Any]:
            given.append(limit)
            return super().run(task, limit)

    names = ("good", "good", "breaks", "good")
    results = gpu.run_tasks(
        [gpu.Task("step", name, 60) for name in names], Watched(stumble, "", start="fork"), 999, lambda _: None
    )
    assert given == [60 + gpu.START_UP, 60, 60, 60 + gpu.START_UP]
    assert [gpu.is_failure(r) for r in results] == [False, False, True, False]


def test_a_run_from_its_start_to_its_report(
    cuda: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A failure is in the exit status; folders of models are gone at the end."""
    folders: list[Path] = []

    def timer(work: Any, models: Any, folder: Path) -> gpu.Timer:
        folders.append(folder)
        assert folder.is_dir()
        return Timer(stumble, "", start="fork")

    Timer = gpu.Timer
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(gpu, "Timer", timer)
    try:
        for names, status in ((("good",), 0), (("good", "breaks"), 1)):
            tasks = [gpu.Task("step", name, 60) for name in names]
            monkeypatch.setattr(gpu, "plan", lambda parts, tasks=tasks: tasks)
            assert gpu.main(["--out", str(tmp_path / "report")]) == status
            assert (tmp_path / "report.md").read_text().startswith("# On X")
            assert [r["name"] for r in json.loads((tmp_path / "report.json").read_text())["results"]] == list(names)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert not any(folder.exists() for folder in folders)
