"""Scores at many α at once, held against :meth:`LLM.score` at one."""

from __future__ import annotations

import numpy as np
import pytest

from ensemble_decode import LLM, ExpertPair
from ensemble_decode.engine.sweep import pack, score_sweep
from tests.conftest import Models

TEXTS = [[1, 5, 9, 30, 7], [4] * 2, [11], [7, 8, 9] * 23, [3, 1, 4, 1, 5, 9, 2, 6]]
ALPHAS = [0.0, 1.0, {"a": 0.5}, {"b": -2.0}, {"a": 3.0, "b": 0.25}, None]


@pytest.fixture(scope="module")
def llm(models: Models) -> LLM:
    pairs = {
        "a": ExpertPair(models.adapter("llama", 1), models.adapter("llama", 2), alpha=0.75),
        "b": ExpertPair(models.model("llama", 3), models.model("llama", 4), alpha=0.5),
        "c": ExpertPair(models.adapter("llama", 5), alpha=0.0),
    }
    return LLM(models.model("llama"), pairs, dtype="float32", max_num_batched_tokens=24)


def test_each_alpha_is_what_score_gives(llm: LLM) -> None:
    found = score_sweep(llm, TEXTS, ALPHAS)
    free = llm.engine.blocks.num_free
    for place, alpha in enumerate(ALPHAS):
        for text, score in enumerate(llm.score(TEXTS, alpha=alpha)):  # type: ignore[arg-type]
            np.testing.assert_allclose(found[text][place], score.logprobs[1:], atol=1e-4)
    assert llm.engine.blocks.num_free == free == llm.engine.blocks.num_blocks


def test_values_depend_neither_on_company_nor_on_other_alphas(llm: LLM) -> None:
    together = score_sweep(llm, TEXTS, ALPHAS)
    for text in (0, 3):
        for place in (1, 2, 4):
            alone = score_sweep(llm, [TEXTS[text]], [ALPHAS[place]])[0][0]
            assert np.array_equal(alone, together[text][place])


def test_what_cannot_be_served_is_said(llm: LLM) -> None:
    with pytest.raises(ValueError, match="alphas 1: alpha names the pair 'x'"):
        score_sweep(llm, TEXTS, [1.0, {"x": 1.0}])
    with pytest.raises(ValueError, match="prompt is empty"):
        score_sweep(llm, [[]], [1.0])


@pytest.mark.parametrize("most", [1, 5, 16, 100])
@pytest.mark.parametrize("free", [3, 100])
def test_steps_hold_what_fits_and_every_token_once_in_order(most: int, free: int) -> None:
    lengths = [3, 40, 0, 7, 7, 16, 17]
    at = dict.fromkeys(range(len(lengths)), 0)
    for step in pack(lengths, most, free):
        assert sum(end - start for _, start, end in step) <= most
        assert sum(-(-lengths[text] // 16) for text in {text for text, _, _ in step}) <= free
        assert len({text for text, _, _ in step}) == len(step)
        for text, start, end in step:
            assert start == at[text] < end
            at[text] = end
    assert list(at.values()) == lengths
