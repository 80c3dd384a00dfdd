"""Plain data between the scheduler and the runner: one step's work, and what came of it.

The scheduler fills a :class:`Batch` from requests and never sees a tensor; the runner turns it into tensors and
never sees a request.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np

from ensemble_decode.models.layout import Layout, PairLayout
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

__all__ = [
    "BLOCK_SIZE",
    "Batch",
    "Edits",
    "Layout",
    "Mixture",
    "PairLayout",
    "SampleRow",
    "ScoreRow",
    "Span",
    "Steering",
    "StepOutput",
    "TokenLogprobs",
]

#: Pools in ascending order, and the weight of each one's logits in a sum.
Mixture: TypeAlias = tuple[tuple[int, float], ...]


@dataclass(slots=True)
class Span:
    """Consecutive new tokens of one view of one sequence, computed in one step by each of ``pools``.

    ``block_table`` covers at least positions 0 … start + len(tokens) − 1. The last ``outputs`` tokens need logits.
    """

    tokens: list[int]
    start: int
    block_table: list[int]
    pools: tuple[int, ...]
    outputs: int = 0


@dataclass(slots=True)
class Steering:
    """One pair at work on one row: its index in ``Layout.pairs``, α ≠ 0, and the spans its two sides come from."""

    pair: int
    alpha: float
    expert_span: int
    anti_expert_span: int


@dataclass(slots=True)
class Edits:
    """Changes to the combined scores of one row, in vLLM's order: logit bias, bans, then penalties.

    ``counts``, int64 [2, N], holds the distinct tokens that penalties are for, and how often each occurred in the output:
    those of the output, and with a repetition penalty those of the prompt. ``banned`` are the tokens that may not be
    sampled (``min_tokens``).
    """

    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    counts: np.ndarray | None = None
    bias: dict[int, float] = field(default_factory=dict)
    banned: tuple[int, ...] = ()


@dataclass(slots=True)
class SampleRow:
    """One token to sample, from output ``output`` of span ``span`` (view 0 of its sequence) and of its steering's spans.

    ``mixture`` not empty: from that sum of pools' logits, without steering; so a draft is sampled.
    """

    span: int
    steering: tuple[Steering, ...]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    nucleus: Literal["combined", "target"]
    seed: int
    position: int
    logprobs: int = -1  # -1: none; k ≥ 0: the sampled token's and the k best
    edits: Edits | None = None
    output: int = -1  # counted among the span's outputs; -1: the last
    mixture: Mixture = ()


@dataclass(slots=True)
class ScoreRow:
    """Log-probabilities of given ``tokens`` at the outputs of span ``span``: token i at output i."""

    span: int
    steering: tuple[Steering, ...]
    tokens: list[int]
    logprobs: int = 0  # how many of the best tokens to list at each position


@dataclass(slots=True)
class Batch:
    """One step: block copies first, then every span, then the rows."""

    spans: list[Span]
    samples: list[SampleRow]
    scores: list[ScoreRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)  # (source block, destination block), in every pool
    drafts: bool = False  # some span is computed by a pool that only drafts: not a step for a captured graph


@dataclass(slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, natural logarithm: of one token, and of the best.

    ``logprob`` is under the ensemble, ``target_logprob`` under the target alone; ``top`` lists
    (token, logprob, target_logprob, rank) of the best tokens under the ensemble, rank from 1.
    """

    token: int
    logprob: float
    target_logprob: float
    rank: int
    top: list[tuple[int, float, float, int]] = field(default_factory=list)


@dataclass(slots=True)
class StepOutput:
    """``tokens[i]`` answers ``samples[i]``; −1 where the row had no valid sample (NaN, +inf, or all masked).

    ``logprobs[i]`` is None where row i asked for none. ``scores[i]`` answers ``scores[i]``, one entry per token.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    scores: list[list[TokenLogprobs]] = field(default_factory=list)
