"""What comes back: vLLM's shapes and names."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural log-probability of one token under the ensemble, its rank from 1, and the target's own beside it.

    ``decoded_token`` is None without a tokenizer, and where that has no text for the token.
    """

    logprob: float
    rank: int
    decoded_token: str | None
    target_logprob: float


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request. ``error`` says in one line what went wrong where ``finish_reason`` is "error"."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Seconds on ``time.perf_counter``'s clock, and what was saved."""

    arrival: float
    first_token: float | None = None
    finished: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    #: With speculation: forwards that gave new tokens of this request, the tokens they gave, and drafted tokens of them.
    target_forwards: int = 0
    new_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    #: Seconds that speculation saved (lost, where negative), estimated from measured step times.
    saved_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafted tokens as a share of all drafted; NaN where none were."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else math.nan

    @property
    def tokens_per_forward(self) -> float:
        """New tokens a target forward; 1 without speculation, NaN before the first."""
        return self.new_tokens / self.target_forwards if self.target_forwards else math.nan


@dataclass(slots=True)
class RequestOutput:
    """A request and its samples so far. ``seed`` is the one that was used, drawn where none was given."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    seed: int
    metrics: RequestMetrics
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(slots=True)
class Score:
    """Per-token log-probabilities of a text. The first token has none where nothing comes before it.

    ``ranks`` are the tokens' ranks under the ensemble, from 1.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float | None]
    target_logprobs: list[float | None] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Sum over the tokens that have a log-probability."""
        return sum(value for value in self.logprobs if value is not None)

    @property
    def mean(self) -> float:
        count = sum(value is not None for value in self.logprobs)
        return self.total / count if count else float("nan")
