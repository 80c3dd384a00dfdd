"""What log-probabilities list, and what edits of scores do."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ensemble_decode import ops
from ensemble_decode.engine.batch import Edits, SampleRow, Span
from ensemble_decode.engine.sampling import Sampler, apply_edits, best_tokens

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


class Whole(TorchDispatchMode):
    """Counts the calls that make a tensor as large as all scores."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.size:
            self.calls[func.overloadpacket.__name__] += 1
        return out


def sampler_of(z: torch.Tensor) -> Sampler:
    """A sampler of rows that begin with those of ``z`` [R, 50], drafts or not."""
    combination = SimpleNamespace(
        ensemble=SimpleNamespace(target=SimpleNamespace(logits=lambda h: h), layout=SimpleNamespace(vocab_size=50)),
        combines_hidden=lambda steering: True,
        combined_hidden=lambda hidden, spans, *_: z[: len(spans)],
        mixture_logits=lambda hidden, mixtures, *_: z[: len(mixtures)],
    )
    return Sampler(combination)  # type: ignore[arg-type]


def test_log_probabilities_of_plain_rows_take_one_softmax_and_no_copy() -> None:
    z = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    sampler, spans = sampler_of(z), [Span([1], 0, [], (0,), 1)] * 3

    def entries(temperatures: list[float], logprobs: list[int]) -> list:
        rows = [
            SampleRow(i, (), t, 0, 1.0, 0.0, "combined", 0, 0, k)
            for i, (t, k) in enumerate(zip(temperatures, logprobs, strict=True))
        ]
        return sampler.sample(rows, spans, None).logprobs  # type: ignore[arg-type]

    with Whole(z.numel()) as whole:
        entries([1.0, 0.0, 1.0], [2, 2, 2])
    assert whole.calls["_log_softmax"] == 1
    assert not whole.calls.keys() & {"index", "div", "clone"}
    none, *found = entries([1.0, 0.5, 2.0], [-1, 0, 3])
    assert none is None
    for row, temperature, entry in zip(z[1:], (0.5, 2.0), found, strict=True):
        expected = (row / temperature).log_softmax(-1)
        assert entry.logprob == entry.target_logprob == expected[entry.token]
        assert entry.rank == 1 + int((expected > expected[entry.token]).sum())
    assert [token for token, *_ in found[1].top] == z[2].topk(3).indices.tolist()


def test_all_parts_of_a_batch_are_launched_before_any_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain rows of both nuclei, rows with log-probabilities, and drafts: a device never stands still between them."""
    z = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    calls: list[str] = []
    sample, tolist = ops.ensemble_sample, torch.Tensor.tolist
    monkeypatch.setattr(ops, "ensemble_sample", lambda *x, **more: calls.append("launch") or sample(*x, **more))
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: calls.append("read") or tolist(tensor))
    rows = [
        SampleRow(i, (), 0.0, 0, 1.0, 0.0, nucleus, 0, 0, logprobs, mixture=mixture)
        for i, (nucleus, logprobs, mixture) in enumerate(
            [("target", -1, ()), ("combined", 1, ()), ("combined", -1, ((3, 1.0),)), ("combined", -1, ((4, 1.0),))]
        )
    ]
    output = sampler_of(z).sample(rows, [Span([1], 0, [], (0,), 1)] * 4, None)  # type: ignore[arg-type]
    assert output.tokens == [int(z.argmax())] * 4
    assert [entry is not None for entry in output.logprobs] == [False, True, False, False]
    assert calls[:5] == ["launch"] * 4 + ["read"]
