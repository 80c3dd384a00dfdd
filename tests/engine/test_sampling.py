"""What log-probabilities list."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_decode.engine.sampling import best_tokens

VALUES = st.sampled_from([0.0, -1.0, 1.0, 2.5, float("-inf")])


@settings(deadline=None, database=None)
@given(st.lists(st.lists(VALUES, min_size=9, max_size=9), min_size=1, max_size=4), st.integers(0, 9))
def test_of_equal_tokens_the_lowest_ids_are_best(rows: list[list[float]], k: int) -> None:
    values, ids = best_tokens(torch.tensor(rows), k)
    for row, got_values, got_ids in zip(rows, values.tolist(), ids.tolist(), strict=True):
        wanted = sorted(range(9), key=lambda token: (-row[token], token))[:k]
        assert got_ids == wanted
        assert got_values == [row[token] for token in wanted]
