"""ops.combine against the reference, bit for bit: it has no exp and no log, so nothing may differ."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from ensemble_decode import ops
from ensemble_decode.ops import reference

from .sampling_cases import POISON, Case, make_case, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case_of(vocab: int, batch: int = 3, **options: object) -> Case:
    return make_case(vocab, [(1.0, 0, 0.0, 1.0)] * batch, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 3, 7, 16, 255, 256, 257, 4097, 50257])
def test_combine_equals_the_reference(vocab: int, dtype: torch.dtype) -> None:
    for pairs, difference, padding in itertools.product((0, 1, 3), (False, True), (0, 13)):
        case = case_of(vocab, pairs=pairs, difference=difference, padding=padding, dtype=dtype)
        combined = ops.combine(*case.logits, case.alpha)
        assert combined.dtype == torch.float32
        assert torch.equal(combined, reference.combine(*case.logits, case.alpha))


def test_combine_writes_into_out_and_nowhere_else() -> None:
    case = case_of(1001, pairs=2)
    wide = torch.full((3, 1020), POISON)
    out = wide[:, :1001]
    assert ops.combine(*case.logits, case.alpha, out=out) is out
    assert torch.equal(out, reference.combine(*case.logits, case.alpha))
    assert (wide[:, 1001:] == POISON).all()


def test_combine_takes_one_alpha_for_all() -> None:
    case = case_of(77, pairs=2)
    assert torch.equal(ops.combine(*case.logits, 0.75), reference.combine(*case.logits, torch.full((3, 2), 0.75)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_of_numbers_that_are_not_finite(dtype: torch.dtype) -> None:
    """−inf masks; a difference that is not finite counts as 0; what z holds stays."""
    values = [0.5, -math.inf, math.inf, math.nan]
    patterns = torch.tensor(list(itertools.product(values, repeat=3))).t().contiguous()
    target, expert, anti = (patterns[i].unsqueeze(0).to(dtype) for i in range(3))
    combined = ops.combine(target, expert.unsqueeze(0), anti.unsqueeze(0), 2.0)[0]
    for (z, plus, minus), got in zip(patterns.t().tolist(), combined.tolist(), strict=True):
        difference = plus - minus
        assert got == pytest.approx(z + 2 * difference if math.isfinite(difference) else z, nan_ok=True)
    assert torch.equal(
        combined.nan_to_num(7),
        reference.combine(target, expert.unsqueeze(0), anti.unsqueeze(0), torch.tensor([[2.0]]))[0].nan_to_num(7),
    )


def test_a_mask_holds_where_the_correction_overflows() -> None:
    target, expert = torch.tensor([[-math.inf, 0.0]]), torch.tensor([[[3e38, 0.0]]])
    assert ops.combine(target, expert, None, 10.0)[0, 0] == -math.inf


def test_a_pair_with_alpha_0_adds_nothing_whatever_it_holds() -> None:
    case = case_of(300, pairs=2)
    alpha = torch.tensor([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    assert case.expert is not None
    assert case.anti_expert is not None
    want = reference.combine(*case.logits, alpha)
    case.expert[0, :2] = POISON * 1e8
    case.anti_expert[1, 1:] = math.nan
    assert torch.equal(ops.combine(*case.logits, alpha), want)


def test_an_empty_batch() -> None:
    assert ops.combine(torch.empty(0, 5), None, None, None).shape == (0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5), None, None, None), "target"),
        ((torch.zeros(2, 5, dtype=torch.int64), None, None, None), "target"),
        ((torch.zeros(5, 2).t(), None, None, None), "target"),
        ((torch.zeros(2, 5), torch.zeros(2, 5), None, 1.0), "expert"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 6), None, 1.0), "expert"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 5).half(), None, 1.0), "expert"),
        ((torch.zeros(2, 5), None, torch.zeros(1, 2, 5), 1.0), "anti_expert"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 5), torch.zeros(2, 2, 5), 1.0), "anti_expert"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 5), None, None), "alpha"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 5), None, torch.zeros(2)), "alpha"),
        ((torch.zeros(2, 5), torch.zeros(1, 2, 5), None, torch.zeros(2, 1).double()), "alpha"),
        ((torch.zeros(2, 5), None, None, None, torch.zeros(2, 6)), "out"),
        ((torch.zeros(2, 5), None, None, None, torch.zeros(2, 5).half()), "out"),
    ],
)
def test_what_is_not_allowed_is_said_in_one_line(arguments: tuple, message: str) -> None:
    with pytest.raises((ValueError, RuntimeError)) as error:
        ops.combine(*arguments)
    line = str(error.value).splitlines()[0]
    assert message in line


def test_strided_helper_poisons_what_is_between_the_rows() -> None:
    x = strided(torch.zeros(2, 3), 2)
    assert x.stride() == (5, 1)
    assert x.as_strided((2, 5), (5, 1))[:, 3:].eq(POISON).all()
