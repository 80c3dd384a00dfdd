"""The Triton kernel of ``ops.combine`` under the checking interpreter, and compiled: the reference's bits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.kernels import combine
from ensemble_decode.ops import reference

from ..ops.sampling_cases import make_case
from . import triton_launch
from .aot import compile_call
from .interp import run
from .ptxsim import PtxError
from .test_ptxsim import without


@pytest.mark.parametrize(
    ("pairs", "difference", "padding", "dtype"),
    [
        (0, False, 0, torch.float32),
        (2, False, 7, torch.bfloat16),
        (3, True, 0, torch.float16),
        (6, False, 3, torch.float32),
    ],
    ids=str,
)
def test_the_bits_of_the_reference(pairs: int, difference: bool, padding: int, dtype: torch.dtype) -> None:
    case = make_case(2500, [(1.0, 0, 0.0, 1.0)] * 3, pairs=pairs, difference=difference, padding=padding, dtype=dtype)
    out = torch.full((3, 2507), 5.0)
    for launch in combine.plan(*case.logits, case.alpha, out[:, :2500]):
        run(launch.kernel, launch.grid, races=True, **launch.arguments, **launch.options)
    assert torch.equal(out[:, :2500], reference.combine(*case.logits, case.alpha))
    assert (out[:, 2500:] == 5.0).all()


def test_pairs_further_apart_than_32_bits_count(tmp_path: Path) -> None:
    """The third pair begins 2³¹ + 32 elements after the first, and the stride itself is an int32: in a file of holes."""
    stride, vocab = 2**30 + 16, 40
    size = 2 * stride + vocab
    far = torch.from_file(str(tmp_path / "pairs"), shared=True, size=size, dtype=torch.float16)
    case = make_case(vocab, [(1.0, 0, 0.0, 1.0)], pairs=3, dtype=torch.float16)
    assert case.expert is not None
    expert = far.as_strided((3, 1, vocab), (stride, vocab, 1))
    expert.copy_(case.expert)
    out = torch.empty(1, vocab)
    logits, alpha = (case.target, expert, case.anti_expert), torch.tensor([[0.5, 1.0, 2.0]])
    (launch,) = combine.plan(*logits, alpha, out)
    run(launch.kernel, launch.grid, **launch.arguments, **launch.options)
    assert torch.equal(out, reference.combine(*logits, alpha))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_the_compiled_kernel_has_the_bits_of_the_reference(arch: int, dtype: torch.dtype) -> None:
    """An odd vocabulary, in rows that are padded as a model's are and in rows that are not, to results that never are.

    Padded rows are read 16 bytes at a time and their results pass through shared memory to be stored 4 bytes at a time.
    """
    vocab = 2501
    for padding in (-vocab % 16, 0):
        case = make_case(vocab, [(1.0, 0, 0.0, 1.0)] * 2, pairs=2, padding=padding, dtype=dtype)
        out = torch.empty(2, vocab)
        launches = combine.plan(*case.logits, case.alpha, out)
        (machine,) = triton_launch.run_all(launches, arch, ["out"], order="random")
        assert torch.equal(out, reference.combine(*case.logits, case.alpha))
        assert machine.memory.stored["out"] == 2 * vocab * 4
        assert any(name.startswith("ldmatrix") for name in machine.instructions) == (padding > 0)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_bug_in_the_compiled_kernel_is_found(arch: int) -> None:
    """Each barrier left out, a matrix read 8 bytes further on, a row whose last token is taken away."""
    vocab = 2501
    case = make_case(vocab, [(1.0, 0, 0.0, 1.0)] * 2, pairs=1, padding=-vocab % 16, dtype=torch.bfloat16)
    launches = combine.plan(*case.logits, case.alpha, torch.empty(2, vocab))
    (launch,) = launches
    ptx = compile_call(launch.kernel, arch, launch.arguments, **launch.options).asm["ptx"]
    changed = without(ptx, r"\n\s*bar\.sync[^\n]*")
    assert len(changed) >= 2  # one in each branch, that of whole blocks and that of the last
    for text in changed:
        with pytest.raises(PtxError, match="shared-memory race"):
            triton_launch.run_all(launches, arch, edit=lambda _, text=text: text)
    with pytest.raises(PtxError, match="misaligned 16-byte shared-memory load"):
        triton_launch.run_all(launches, arch, edit=lambda text: re.sub(r"(ldmatrix.*, \[%r\d+)\]", r"\1+8]", text))
    with pytest.raises(PtxError, match="out-of-bounds global store"):
        triton_launch.run_all(launches, arch, withheld={"out": 4})
