"""The Triton kernel of ``ops.combine`` under the checking interpreter: the reference's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
pytest.importorskip("greenlet", reason="needs greenlet")

from ensemble_decode.kernels import combine
from ensemble_decode.ops import reference

from ..ops.sampling_cases import make_case
from .interp import run


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
