"""The whole next-token distribution after many prompts, without sampling: a step of our own, outside the scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ensemble_decode.engine.batch import Span
from ensemble_decode.engine.request import Request

if TYPE_CHECKING:
    from ensemble_decode.engine.llm import LLM


def next_logprobs(llm: LLM, requests: Sequence[Request]) -> torch.Tensor:
    """See :meth:`LLM.next_logprobs`. Nothing else runs in the engine between two calls of ``LLM``."""
    found = torch.empty(len(requests), llm.ensemble.layout.vocab_size)
    first = 0
    for batch in _batches(llm, requests):
        found[first : first + len(batch)] = _scores(llm, batch).log_softmax(-1).cpu()
        first += len(batch)
    return found


def _batches(llm: LLM, requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Neighbours that fit into one step and into the free blocks; a request that doesn't fit a step is by itself."""
    blocks, most = llm.engine.blocks, llm.engine.scheduler.max_num_batched_tokens
    batch: list[Request] = []
    tokens = held = 0
    for request in requests:
        lengths = [len(view.tokens) for view in request.sequences[0].views]
        needed = sum(map(blocks.blocks_for, lengths))
        if batch and (tokens + sum(lengths) > most or held + needed > blocks.num_free):
            yield batch
            batch, tokens, held = [], 0, 0
        batch.append(request)
        tokens, held = tokens + sum(lengths), held + needed
    if batch:
        yield batch


def _scores(llm: LLM, requests: Sequence[Request]) -> torch.Tensor:
    """Combined scores after each request's prompt, float32 [N, V]."""
    runner, size = llm.runner, llm.engine.scheduler.max_num_batched_tokens
    views = [view for request in requests for view in request.sequences[0].views]
    spans: list[Span] = []
    rows = []
    with llm.engine.blocks.borrow([len(view.tokens) for view in views]) as tables:
        for view, table in zip(views, tables, strict=True):
            start = 0
            while len(view.tokens) - start > size:
                runner.parts([Span(view.tokens[start : start + size], start, table, view.pools)], ())
                start += size
            spans.append(Span(view.tokens[start:], start, table, view.pools, 1))
        place = 0
        for request in requests:
            rows.append((place, request.sequences[0].steering(place)))
            place += len(request.sequences[0].views)
        return runner.combined(spans, rows)
