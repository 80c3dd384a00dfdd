import pytest
import torch

from ensemble_decode.ops import library, lora_, pack_lora

from .cpu import DTYPES, ROUNDING, needs_library, on_one_and_two_threads, random, relative_error, variant

__all__ = ["variant"]
CASES = [  # tokens, K, segments, rank
    (1, 64, (64,), 16),
    (5, 65, (33, 20, 16), 3),
    (40, 96, (96, 32, 32), 8),
    (17, 32, (300, 300), 1),
]


def merged(x, a, b, adapter, segments):
    """The dense way: each adapter's b · a as a matrix [N, K] of the merged linear, applied to its rows."""
    rank = b.shape[-1]
    y = torch.zeros(x.shape[0], sum(segments), dtype=torch.float64)
    for index in range(a.shape[0]):
        parts = zip(b[index].double().split(segments), a[index].double().split(rank), strict=True)
        dense = torch.cat([up @ down for up, down in parts])
        rows = adapter == index
        y[rows] = x[rows].double() @ dense.t()
    return y


def make(case, dtype):
    tokens, k, segments, rank = case
    n = sum(segments)
    return (
        random(tokens, n, dtype=dtype),
        random(tokens, k, dtype=dtype),
        random(3, len(segments) * rank, k, dtype=dtype, scale=k**-0.5),
        random(3, n, rank, dtype=dtype, scale=rank**-0.5),
        torch.randint(-1, 3, (tokens,), dtype=torch.int32),
        segments,
    )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_dense_product(variant: str, dtype: torch.dtype, case: tuple) -> None:
    torch.manual_seed(0)
    y, x, a, b, adapter, segments = make(case, dtype)
    expected = y.double() + merged(x, a, b, adapter, segments)
    plain, packed = y.clone(), y.clone()
    lora_(plain, x, a, b, adapter, segments)
    lora_(packed, x, *pack_lora(a, b), adapter, segments)
    assert relative_error(plain, expected) < ROUNDING[dtype]
    assert torch.equal(plain, packed)
    assert torch.equal(plain[adapter < 0], y[adapter < 0])


@needs_library
def test_a_row_does_not_depend_on_the_others(variant: str) -> None:
    y, x, a, b, adapter, segments = make(CASES[2], torch.float32)
    packed = pack_lora(a, b)

    def run(rows: slice) -> torch.Tensor:
        out = y[rows].clone()
        lora_(out, x[rows], *packed, adapter[rows], segments)
        return out

    batch = on_one_and_two_threads(lambda: run(slice(None)))
    for row in range(x.shape[0]):
        assert torch.equal(run(slice(row, row + 1))[0], batch[row])


@needs_library
def test_says_what_does_not_fit() -> None:
    y, x, a, b, adapter, segments = make(CASES[1], torch.float32)
    with pytest.raises(RuntimeError, match=r"adapter\[2\] is 3, it must be -1 \(none\) or an index below 3"):
        lora_(y, x, a, b, torch.tensor([0, 1, 3, 0, 0], dtype=torch.int32), segments)
    with pytest.raises(RuntimeError, match=r"packed a is \[3, 1, 65, 16\], it must be \[3, 1, 66, 16\]"):
        lora_(y, torch.cat([x, x[:, :1]], dim=1), a, b, adapter, segments)
    with pytest.raises(RuntimeError, match="segments is empty"):
        lora_(y, x, a, b, adapter, ())


@needs_library
def test_is_a_well_behaved_operator() -> None:
    y, x, a, b, adapter, segments = make(CASES[1], torch.float32)
    torch.library.opcheck(torch.ops.ensemble_decode.lora_, (y, x, *pack_lora(a, b), adapter, segments))


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    y, x, a, b, adapter, segments = make(CASES[1], torch.float32)
    expected = y.double() + merged(x, a, b, adapter, segments)
    lora_(y, x, *pack_lora(a, b), adapter, segments)
    assert relative_error(y, expected) < ROUNDING[torch.float32]
