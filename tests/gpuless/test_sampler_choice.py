"""Which kernels sample a CUDA tensor's rows, and that the operator is whole by either way: on stand-ins for a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from torch._subclasses.fake_tensor import FakeTensorMode

from ensemble_decode import ops
from ensemble_decode.ops import library, reference
from tests.ops.cpu import needs_library
from tests.ops.sampling_cases import Case, Judge, make_case

from . import cuda_cases
from .standin import cuda_source_standing_in, planned, standing_in

CHOICE = "ENSEMBLE_DECODE_SAMPLER"
#: The module; the package's attribute of that name is the function in it.
operator = importlib.import_module("ensemble_decode.ops.ensemble_sample")
has_cuda_kernels = hasattr(torch.ops.ensemble_decode, "ensemble_sample_cuda")
needs_cuda_kernels = pytest.mark.skipif(
    not has_cuda_kernels or cuda_cases.COMPILER is None,
    reason="the operators were built without CUDA, or there is no g++",
)
ROWS = [(0.9, 0, 0.0, 1.0), (0.5, 40, 0.0, 0.7), (1.0, 0, 0.1, 1.0), (1.0, 0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("capability", "built", "triton", "chosen"),
    [
        ((9, 0), True, True, "cuda"),
        ((10, 0), True, True, "cuda"),
        ((12, 0), True, True, "cuda"),
        ((8, 0), True, True, "triton"),  # no clusters
        ((8, 0), True, False, "cuda"),
        ((9, 0), False, True, "triton"),
        (None, True, True, "triton"),  # AMD
    ],
)
def test_the_choice(
    capability: tuple[int, int] | None, built: bool, triton: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operator, "_has_cuda_kernels", built)
    monkeypatch.setattr(library, "has_triton", triton)
    monkeypatch.delenv(CHOICE, raising=False)
    assert operator._runs_cuda_kernels(capability) == (chosen == "cuda")
    for name, usable in (("triton", triton), ("cuda", built and capability is not None)):
        monkeypatch.setenv(CHOICE, name)
        if usable:
            assert operator._runs_cuda_kernels(capability) == (name == "cuda")
        else:
            with pytest.raises(ValueError, match=rf"^{CHOICE} is '{name}', allowed here are 'auto', '\w+'$"):
                operator._runs_cuda_kernels(capability)
    monkeypatch.setenv(CHOICE, "fastest")
    with pytest.raises(ValueError, match=rf"^{CHOICE} is 'fastest', allowed here are 'auto', '"):
        operator._runs_cuda_kernels(capability)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    if cuda_cases.COMPILER is None or not has_cuda_kernels:
        return None
    return cuda_cases.build(tmp_path_factory.mktemp("cuda") / "plain", threads=64)


#: What stands in for the device: (compute capability, the sampler asked for, the kernels that must have run).
WAYS = {
    "Triton, two launches": ((8, 0), "triton", {"partials_kernel", "resolve_kernel"}),
    "Triton, one launch": ((9, 0), "triton", {"whole_row_kernel"}),
    "CUDA C++": ((9, 0), "auto", {"ensemble_sample_cuda"}),
}
ways = pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[needs_cuda_kernels] if way == "CUDA C++" else [needs_library]) for way in WAYS]
)


@contextmanager
def on_a_stand_in(way: str, program: Path | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    capability, wanted, kernels = WAYS[way]
    monkeypatch.setenv(CHOICE, wanted)
    with ExitStack() as stack:
        seen = stack.enter_context(standing_in(capability))
        if program is not None:
            calls = stack.enter_context(cuda_source_standing_in(program))
        yield
        names = {name for name in seen if "." not in name and name != "combine_kernel"}
        assert names | (set(calls) if program is not None else set()) == kernels


def as_called(case: Case) -> tuple[Any, ...]:
    """The arguments of the operator itself."""
    return (*case.logits, case.alpha, case.temperature, case.top_k, case.top_p, case.min_p, case.seed, case.position)


@ways
def test_the_operator_takes_that_way(way: str, program: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge()
    with on_a_stand_in(way, program, monkeypatch):
        for pairs, nucleus in ((0, "combined"), (2, "target")):
            case = make_case(1003, ROWS, pairs=pairs, nucleus=nucleus, seed=pairs)
            judge.check(case, case.run(ops.ensemble_sample))
    assert judge.flips == 0


@ways
def test_pytorch_finds_the_operator_whole(way: str, program: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``opcheck``, one graph without breaks, and export: through the dispatcher, on tensors that have values."""
    case = make_case(1003, ROWS, pairs=1)
    arguments = (*as_called(case), False, False)

    def step(*arguments: torch.Tensor) -> torch.Tensor:
        return torch.ops.ensemble_decode.ensemble_sample(*arguments, False, False)[0] + 1

    class Step(torch.nn.Module):
        forward = staticmethod(step)

    expected = case.run(reference.ensemble_sample).token + 1
    with on_a_stand_in(way, program, monkeypatch):
        torch.library.opcheck(torch.ops.ensemble_decode.ensemble_sample.default, arguments)
        if program is not None and way == "CUDA C++":
            torch.library.opcheck(torch.ops.ensemble_decode.ensemble_sample_cuda.default, arguments)
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*as_called(case)), expected)
        exported = torch.export.export(Step(), as_called(case))
        assert torch.equal(exported.module()(*as_called(case)), expected)


@needs_cuda_kernels
def test_the_compiled_kernels_have_a_fake() -> None:
    with FakeTensorMode():
        row, whole = torch.empty(3, device="cuda"), torch.empty(3, device="cuda", dtype=torch.int64)
        arguments = (torch.empty(3, 99, device="cuda"), None, None, None, row, whole.int(), row, row, whole, whole)
        results = torch.ops.ensemble_decode.ensemble_sample_cuda(*arguments, False, False)
    assert [(x.shape, x.dtype, x.device.type) for x in results] == [
        ((3,), torch.int64, "cuda"),
        ((3,), torch.float32, "cuda"),
        ((3,), torch.float32, "cuda"),
    ]
    assert torch._C._dispatch_has_kernel_for_dispatch_key("ensemble_decode::ensemble_sample_cuda", "CUDA")


@needs_library
def test_it_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake CUDA tensors hold nothing, and reading one raises: the launches follow from shapes."""
    monkeypatch.setenv(CHOICE, "triton")
    sample = library.cuda_implementations["ensemble_sample"].__wrapped__  # type: ignore[attr-defined]  # no device to guard
    for capability, names in (((8, 0), ["partials_kernel", "resolve_kernel"]), ((9, 0), ["whole_row_kernel"])):
        monkeypatch.setattr(library, "capability", lambda tensor, capability=capability: capability)
        with planned() as launches, FakeTensorMode():
            row, whole = torch.empty(7, device="cuda"), torch.empty(7, device="cuda", dtype=torch.int64)
            logits, pair = torch.empty(7, 50257, device="cuda"), torch.empty(1, 7, 50257, device="cuda")
            alpha = torch.empty(7, 1, device="cuda")
            results = sample(logits, pair, pair, alpha, row, whole.int(), row, row, whole, whole, False, False)
        assert [launch.name for launch in launches] == names
        assert {launch.grid for launch in launches} == {(7, 50) if capability == (8, 0) else (7,)}
        assert all(x.device.type == "cuda" for x in results)
        tensors = [x for launch in launches for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert all(x.device.type == "cuda" for x in tensors)


@needs_library
def test_pytorch_finds_combine_whole() -> None:
    """As the sampler: ``opcheck``, one graph, export, on a stand-in with values; its launch on fake CUDA tensors."""
    case = make_case(1003, ROWS, pairs=2)
    assert case.alpha is not None

    class Step(torch.nn.Module):
        def forward(self, target: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            return ops.combine(target, *others).argmax(-1)  # type: ignore[arg-type]

    arguments = (*case.logits, case.alpha)
    expected = reference.combine(*arguments).argmax(-1)
    with standing_in() as seen:
        torch.library.opcheck(torch.ops.ensemble_decode.combine_out.default, (*arguments, torch.zeros(4, 1003)))
        torch._dynamo.reset()
        assert torch.equal(torch.compile(Step(), fullgraph=True, backend="aot_eager")(*arguments), expected)
        assert torch.equal(torch.export.export(Step(), arguments).module()(*arguments), expected)
        assert seen["combine_kernel"] > 2
    combine = library.cuda_implementations["combine_out"].__wrapped__  # type: ignore[attr-defined]  # no device to guard
    with planned() as launches, FakeTensorMode():
        logits, pair = torch.empty(7, 50257, device="cuda"), torch.empty(1, 7, 50257, device="cuda")
        combine(logits, pair, pair, torch.empty(7, 1, device="cuda"), torch.empty(7, 50257, device="cuda"))
    assert [(launch.name, launch.grid) for launch in launches] == [("combine_kernel", (7, 50))]


@needs_library
def test_a_parameter_on_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHOICE, "triton")
    monkeypatch.setattr(library, "capability", lambda tensor: (8, 0))
    sample = library.cuda_implementations["ensemble_sample"].__wrapped__  # type: ignore[attr-defined]
    row, whole, seed = torch.ones(2), torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match=r"^ensemble_sample: seed is on meta, it must be on target's device, cpu$"):
        sample(torch.zeros(2, 9), None, None, None, row, whole.int(), row, row, seed, whole, False, False)


@needs_library
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target": torch.zeros(2, 5).double()}, "target"),
        ({"target": torch.zeros(5, 2).t()}, "target"),
        ({"expert": torch.zeros(2, 5)}, "expert"),
        ({"expert": None}, "anti_expert"),
        ({"alpha": torch.zeros(2)}, "alpha"),
        ({"temperature": torch.ones(2).double()}, "temperature"),
        ({"top_k": torch.zeros(2)}, "top_k"),
        ({"seed": torch.zeros(3, dtype=torch.int64)}, "seed"),
        ({"target_is_combined": True}, "target_is_combined"),
    ],
    ids=str,
)
def test_what_is_not_allowed_is_said_in_one_line(
    changes: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shapes, types and devices; values are not looked at on a GPU."""
    monkeypatch.setenv(CHOICE, "triton")
    arguments: dict[str, Any] = {"target": torch.zeros(2, 5), "alpha": 1.0, "seed": 0, "position": 0}
    arguments |= {name: torch.zeros(1, 2, 5) for name in ("expert", "anti_expert")} | changes
    with standing_in(), pytest.raises(RuntimeError) as error:
        ops.ensemble_sample(**arguments)
    line = str(error.value).splitlines()[0]
    assert line.startswith("ensemble_sample: ")
    assert named in line
