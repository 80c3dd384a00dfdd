"""The reference is the definition of correct: here it is held to the words of the contract, independently."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ensemble_decode.ops import reference

from .sampling_cases import logits

# Few different values, so that ties are the rule.
scores = st.lists(
    st.sampled_from([-math.inf, -9.0, -1.0, -0.5, 0.0, 0.25, 0.5, 2.0, 7.0]), min_size=1, max_size=12
).filter(lambda row: max(row) > -math.inf)
filters = st.tuples(
    st.integers(0, 14), st.sampled_from([1e-6, 0.05, 0.3, 0.5, 0.9, 0.99, 1.0]), st.sampled_from([0.0, 0.01, 0.3, 0.9])
)


def kept_in_words(row: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The contract's three sentences, token by token, without a sort."""
    kept = {i for i, s in enumerate(row) if s > -math.inf}
    if 0 < top_k < len(row):  # fewer than k tokens are above a token of the top k
        kept = {i for i in kept if sum(other > row[i] for other in row) < top_k}
    weight = {i: math.exp(row[i] - max(row)) for i in kept}
    if top_p < 1:  # the mass above a token of the nucleus is less than p
        kept = {
            i
            for i in kept
            if math.fsum(weight[j] for j in weight if row[j] > row[i]) < top_p * math.fsum(weight.values())
        }
    return {i for i in kept if min_p == 0 or row[i] >= max(row) + math.log(min_p)}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(scores, filters)
def test_kept_is_what_the_contract_says(row: list[float], which: tuple[int, float, float]) -> None:
    assert set(reference.kept(torch.tensor(row), *which).nonzero().flatten().tolist()) == kept_in_words(row, *which)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(scores, filters)
def test_kept_is_a_prefix_that_has_the_best_token_and_whole_ties(
    row: list[float], which: tuple[int, float, float]
) -> None:
    score = torch.tensor(row)
    keep = reference.kept(score, *which)
    assert keep[score.argmax()]
    lowest = score[keep].min()
    assert torch.equal(keep, score >= lowest)


@pytest.mark.parametrize(
    ("which", "warper"),
    [
        ((50, 1.0, 0.0), TopKLogitsWarper(50)),
        ((0, 0.9, 0.0), TopPLogitsWarper(0.9)),
        ((0, 0.3, 0.0), TopPLogitsWarper(0.3)),
        ((0, 1.0, 0.05), MinPLogitsWarper(0.05)),
    ],
    ids=["top-k", "top-p 0.9", "top-p 0.3", "min-p"],
)
def test_kept_agrees_with_the_warpers_of_transformers(which: tuple[int, float, float], warper: object) -> None:
    """Where there are no ties, which those cut by accident of position."""
    for row in logits(6, 5003, torch.Generator().manual_seed(3))[[0, 1, 2, 4, 5]]:
        assert torch.equal(reference.kept(row, *which), warper(None, row.unsqueeze(0))[0] > -math.inf)  # type: ignore[operator]


def test_kept_applies_the_filters_in_the_order_of_transformers() -> None:
    """top-p is renormalised over the survivors of top-k."""
    for row in logits(6, 5003, torch.Generator().manual_seed(4))[[0, 1, 2, 4, 5]]:
        warped = MinPLogitsWarper(0.02)(
            None, TopPLogitsWarper(0.8)(None, TopKLogitsWarper(100)(None, row.unsqueeze(0)))
        )
        assert torch.equal(reference.kept(row, 100, 0.8, 0.02), warped[0] > -math.inf)


def sample_row(z: list[float], **changes: float) -> tuple[int, float, float]:
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "position": 1, **changes}
    token, logprob, target_logprob = reference.ensemble_sample(
        torch.tensor([z]), None, None, alpha=None, **{name: torch.tensor([value]) for name, value in values.items()}
    )
    return int(token), float(logprob), float(target_logprob)


def test_the_token_is_the_argmax_of_score_plus_noise() -> None:
    z = [0.3, -1.0, 2.0, 0.7, 1.9]
    for seed in range(40):
        noise = reference.gumbel_noise(torch.tensor([seed]), torch.tensor([1]), 5)[0]
        token, logprob, target_logprob = sample_row(z, seed=seed, temperature=2.0)
        assert token == int((torch.tensor(z) / 2 + noise).argmax())
        assert logprob == target_logprob == pytest.approx(float((torch.tensor(z) / 2).log_softmax(0)[token]))


def test_greedy_takes_the_lowest_id_and_scores_at_temperature_1() -> None:
    token, logprob, _ = sample_row([0.0, 3.0, 1.0, 3.0], temperature=0.0)
    assert token == 1
    assert logprob == pytest.approx(3 - math.log(2 * math.exp(3) + math.e + 1))


# Words from 0xFFFFFF80 on round to u = 1: the noise is −inf. Token 0 has such a word under the first seed, token 5
# under the second; a kept set of that token alone still has one argmax.
U_IS_ONE_AT_0, U_IS_ONE_AT_5 = 16390493, 1142540


def test_a_lone_token_is_sampled_even_with_noise_of_minus_infinity() -> None:
    assert reference.gumbel_noise(torch.tensor([U_IS_ONE_AT_0]), torch.tensor([0]), 1).item() == -math.inf
    assert reference.gumbel_noise(torch.tensor([U_IS_ONE_AT_5]), torch.tensor([0]), 6)[0, 5] == -math.inf
    assert sample_row([0.5], seed=U_IS_ONE_AT_0, position=0)[:2] == (0, 0.0)
    assert sample_row([0, 0, 0, 0, 0, 9.0], seed=U_IS_ONE_AT_5, position=0, top_k=1)[0] == 5
    assert sample_row([-math.inf] * 5 + [9.0], seed=U_IS_ONE_AT_5, position=0)[0] == 5


def test_nucleus_target_filters_by_the_targets_own_distribution() -> None:
    """Contrastive decoding's plausibility mask: token 2 is what the pair wants, but the target never would."""
    target, expert = torch.tensor([[4.0, 3.9, -4.0]]), torch.tensor([[[0.0, 1.0, 50.0]]])
    arguments = {"alpha": 1.0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.1, "seed": 0, "position": 0}
    keywords = {name: torch.tensor([value]) for name, value in arguments.items()}
    keywords["alpha"] = keywords["alpha"].unsqueeze(1)
    assert reference.ensemble_sample(target, expert, None, **keywords)[0].item() == 2
    assert reference.ensemble_sample(target, expert, None, **keywords, nucleus="target")[0].item() == 1
