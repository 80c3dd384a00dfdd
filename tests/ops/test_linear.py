import pytest
import torch

from ensemble_decode.ops import library, linear, pack_int8, pack_weight, reference_layers

from .cpu import (
    DTYPES,
    ROUNDING,
    SHAPES,
    SUM_ERROR,
    needs_library,
    on_one_and_two_threads,
    random,
    relative_error,
    threads,
    variant,
)

__all__ = ["variant"]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 8, 12, 13, 17, 64, 513])
def test_equals_the_reference(variant: str, dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(rows)
    for n, k in SHAPES:
        x, weight, bias = random(rows, k, dtype=dtype), random(n, k, dtype=dtype, scale=k**-0.5), random(n, dtype=dtype)
        packed = pack_weight(weight)
        for b in (None, bias):
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            assert relative_error(linear(x, packed, b, n, True), exact) < SUM_ERROR
            assert relative_error(linear(x, packed, b, n), exact) < ROUNDING[dtype]
            assert relative_error(reference_layers.linear(x, weight, b), exact) < ROUNDING[dtype]


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_others(variant: str, dtype: torch.dtype) -> None:
    x, packed = random(200, 65, dtype=dtype), pack_weight(random(300, 65, dtype=dtype))
    batch = on_one_and_two_threads(lambda: linear(x, packed, None, 300, True))
    for first, last in [(0, 1), (7, 8), (199, 200), (3, 8), (90, 103), (0, 113), (96, 200)]:
        part = on_one_and_two_threads(lambda first=first, last=last: linear(x[first:last], packed, None, 300, True))
        assert torch.equal(part, batch[first:last])


@needs_library
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
def test_who_computes_what_does_not_matter(variant: str, dtype: torch.dtype) -> None:
    """Pairs of groups, uneven tiles, several blocks of rows; threads with an odd share, and more of them than groups."""
    weight = random(330, 300, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)
    packed, scale = pack_int8(weight) if dtype == torch.int8 else (pack_weight(weight), None)
    x = random(192, 300, dtype=weight.dtype)
    with threads(1):
        batch = linear(x, packed, None, 330, True, scale)
    for rows in (1, 2, 3, 4, 8, 9, 96, 97, 192):
        for count in (1, 2, 5, 16):
            with threads(count):
                assert torch.equal(linear(x[-rows:], packed, None, 330, True, scale), batch[-rows:])


@needs_library
def test_takes_any_leading_shape_and_stride() -> None:
    wide, weight = random(4, 6, 80), random(24, 40)
    packed = pack_weight(weight)
    for x in (wide[..., :40], wide[..., ::2], wide[:, 2:3, 40:], wide[0, 0, :40], wide[:0, :, :40]):
        expected = reference_layers.linear(x, weight)
        y = linear(x, packed, None, 24)
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        linear(wide[..., :40], pack_weight(weight.t().contiguous().t()), None, 24)[0, 0],
        y.new_tensor((wide[0, 0, :40] @ weight.t()).tolist()),
    )


@needs_library
def test_says_what_does_not_fit() -> None:
    packed = pack_weight(random(40, 16))
    with pytest.raises(RuntimeError, match=r"packed is \[2, 16, 32\], it must be \[2, 15, 32\]"):
        linear(random(1, 15), packed, None, 40)
    with pytest.raises(RuntimeError, match=r"bias is \[39\], it must be \[40\]"):
        linear(random(1, 16), packed, random(39), 40)
    with pytest.raises(RuntimeError, match="packed has another dtype"):
        linear(random(1, 16, dtype=torch.float16), packed, None, 40)
    with pytest.raises(RuntimeError, match="weight must be float32, bfloat16 or float16"):
        pack_weight(torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"weight is \[3\], it must be \[out_features, in_features\]"):
        pack_weight(random(3))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_behaved_operator(dtype: torch.dtype) -> None:
    x, weight, bias = random(3, 2, 17, dtype=dtype), random(40, 17, dtype=dtype), random(40, dtype=dtype)
    torch.library.opcheck(torch.ops.ensemble_decode.pack_weight, (weight,))
    torch.library.opcheck(torch.ops.ensemble_decode.linear, (x, pack_weight(weight), bias, 40, True))
    packed = pack_weight(weight)
    compiled = torch.compile(lambda x: linear(x, packed, bias, 40) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), linear(x, packed, bias, 40) * 2)


def test_works_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", False)
    x, weight = random(3, 17), random(40, 17)
    torch.testing.assert_close(linear(x, pack_weight(weight), None, 40), x @ weight.t())


@needs_library
def test_the_environment_chooses_the_variant() -> None:
    import os
    import subprocess
    import sys

    code = "from ensemble_decode.ops.linear import cpu_variant; print(cpu_variant())"
    for name in ("base", torch.ops.ensemble_decode.cpu_variant()):
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "ENSEMBLE_DECODE_CPU": name},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.strip() == name
