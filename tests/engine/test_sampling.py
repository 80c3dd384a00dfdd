"""What log-probabilities list."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_decode.engine.batch import Edits
from ensemble_decode.engine.sampling import apply_edits, best_tokens

VALUES = st.sampled_from([0.0, -1.0, 1.0, 2.5, float("-inf")])


@settings(deadline=None, database=None)
@given(st.lists(st.lists(VALUES, min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_of_equal_tokens_the_lowest_ids_are_best(rows: list[list[float]], k: int) -> None:
    values, ids = best_tokens(torch.tensor(rows), k)
    for row, got_values, got_ids in zip(rows, values.tolist(), ids.tolist(), strict=True):
        wanted = sorted(range(9), key=lambda token: (-row[token], token))[:k]
        assert got_ids == wanted
        assert got_values == [row[token] for token in wanted]


def one_by_one(scores: torch.Tensor, edit: Edits) -> None:
    """vLLM's formulas, on one row."""
    for token, value in edit.bias.items():
        scores[token] += value
    for token in edit.banned:
        scores[token] = float("-inf")
    for token, count in [] if edit.counts is None else edit.counts.T.tolist():
        value = scores[token]
        value = value / edit.repetition_penalty if value > 0 else value * edit.repetition_penalty
        if count:
            value = value - (edit.frequency_penalty * torch.tensor(count, dtype=torch.float32) + edit.presence_penalty)
        scores[token] = value


COUNTS = st.dictionaries(st.integers(0, 19), st.integers(0, 9)).map(
    lambda counts: np.array([list(counts), list(counts.values())], np.int64)
)
EDITS = st.builds(
    Edits,
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.1, -1.7]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.9]),
    counts=st.none() | COUNTS,
    bias=st.dictionaries(st.integers(0, 19), st.sampled_from([-100.0, 0.3, 7.7])),
    banned=st.lists(st.integers(0, 19)).map(tuple),
)


@settings(deadline=None, database=None)
@given(st.lists(st.none() | EDITS, min_size=1, max_size=5), st.integers(0, 9))
def test_edits_of_many_rows_are_those_of_each_bit_for_bit(edits: list[Edits | None], seed: int) -> None:
    scores = torch.randn(len(edits), 20, generator=torch.Generator().manual_seed(seed)) * 9
    expected = scores.clone()
    for row, edit in zip(expected, edits, strict=True):
        if edit is not None:
            one_by_one(row, edit)
    apply_edits(scores, edits, torch.tensor)
    assert torch.equal(scores, expected)
