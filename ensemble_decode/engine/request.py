"""Requests, their sequences and views: plain data; the scheduler mutates it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ensemble_decode.engine.batch import Edits, Mixture, SampleRow, Steering, TokenLogprobs
from ensemble_decode.engine.drafting import Acceptance, NgramIndex
from ensemble_decode.engine.outputs import FinishReason, Logprob, RequestMetrics
from ensemble_decode.engine.params import SamplingParams, sample_seed
from ensemble_decode.ops.paged_attention import BLOCK_SIZE


@dataclass(slots=True)
class View:
    """One token sequence that some pools compute: a prompt, followed by the generated tokens.

    ``computed`` tokens from the start have their keys and values in the cache, ``registered`` full blocks are known to the
    block manager by content. Those of ``pools`` that only draft are ``draft_pools``: they compute prompts with the
    others, are left out while decoding, and hold the first ``drafted`` tokens.
    """

    tokens: list[int]
    pools: tuple[int, ...]
    table: list[int] = field(default_factory=list)
    computed: int = 0
    registered: int = 0
    draft_pools: tuple[int, ...] = ()
    drafted: int = 0

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decode_pools(self) -> tuple[int, ...]:
        return tuple(pool for pool in self.pools if pool not in self.draft_pools)

    @property
    def full_blocks(self) -> int:
        """Blocks that are full and computed in every pool."""
        known = self.computed if not self.draft_pools else min(self.computed, self.drafted)
        return min(known // BLOCK_SIZE, len(self.table))

    def hold(self, tokens: int) -> None:
        """The first ``tokens`` tokens are in the cache, in every pool."""
        self.computed = self.drafted = tokens

    def forget(self) -> None:
        """Nothing of it is in the cache any more."""
        self.hold(0)
        self.registered = 0


@dataclass(slots=True)
class ActivePair:
    """A pair with α ≠ 0 in a request, and the places of its two views among the request's."""

    pair: int
    alpha: float
    expert_view: int
    anti_expert_view: int


@dataclass(frozen=True, slots=True)
class Drafter:
    """What drafts for a request: the ``mixture`` of pools that see its view ``view``."""

    view: int
    mixture: Mixture

    @property
    def pools(self) -> tuple[int, ...]:
        return tuple(pool for pool, _ in self.mixture)


class TokenCounts:
    """Distinct tokens, those of a prompt among them, and how often an output has each of them.

    Another token takes constant time, however long the context is: penalties ask for all of it at every step.
    """

    def __init__(self, prompt: Iterable[int] = ()) -> None:
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt))}
        self._prompt = len(self._place)
        self._table = np.zeros((2, max(2 * self._prompt, 64)), np.int64)
        self._table[0, : self._prompt] = list(self._place)

    def add(self, token: int) -> None:
        """Count a token of the output."""
        place = self._place.setdefault(token, len(self._place))
        if place == self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, place)))
        self._table[0, place] = token
        self._table[1, place] += 1

    def remove(self, token: int) -> None:
        """Undo the last :meth:`add`, which was of ``token``."""
        place = self._place[token]
        self._table[1, place] -= 1
        if place >= self._prompt and self._table[1, place] == 0:
            del self._place[token]  # the last one: what came later was undone before

    def table(self, draft: list[int]) -> np.ndarray:
        """int64 [2, N], each token and its count as if ``draft`` followed the output. Without one a view, until the next ``add``."""
        if not draft:
            return self._table[:, : len(self._place)]
        for token in draft:
            self.add(token)
        table = self._table[:, : len(self._place)].copy()
        for token in reversed(draft):
            self.remove(token)
        return table


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a request. ``views[0]`` is the request's own tokens."""

    request: Request
    index: int
    views: list[View]
    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0  # sum of ``logprobs``: a stream would add them all up at each step
    shown_logprobs: list[dict[int, Logprob]] = field(default_factory=list)  # the first of them, as outputs have them
    counts: TokenCounts | None = field(init=False, default=None)  # kept only where penalties ask for it
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    text: str | None = None  # final text, once a stop string has cut it
    draft: list[int] = field(default_factory=list)  # proposed to follow, in the next step
    acceptance: Acceptance | None = None
    ngrams: NgramIndex | None = None

    def __post_init__(self) -> None:
        params = self.request.params
        if params.repetition_penalty != 1.0:
            self.counts = TokenCounts(self.request.prompt_token_ids)
        elif params.presence_penalty or params.frequency_penalty:
            self.counts = TokenCounts()

    @property
    def seed(self) -> int:
        return sample_seed(self.request.seed, self.index)

    @property
    def pending(self) -> int:
        """Tokens of all views that are not computed yet."""
        return sum(view.pending for view in self.views)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def append(self, token: int, logprobs: TokenLogprobs | None = None) -> None:
        self.output.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs.logprob
        for view in self.views:
            view.tokens.append(token)
        if self.counts is not None:
            self.counts.add(token)

    def steering(self, first_span: int) -> tuple[Steering, ...]:
        """The request's pairs, pointing at this sequence's spans, which begin at ``first_span`` in the batch."""
        return tuple(
            Steering(p.pair, p.alpha, first_span + p.expert_view, first_span + p.anti_expert_view)
            for p in self.request.pairs
        )

    def cut(self, tokens: int) -> int:
        """End the output after ``tokens`` tokens; returns how many were cut off. Only for a sequence that is over."""
        beyond = len(self.output) - tokens
        if beyond:
            del self.output[tokens:], self.logprobs[tokens:], self.shown_logprobs[tokens:]
            self.cumulative_logprob = sum(entry.logprob for entry in self.logprobs)
            for view in self.views:
                del view.tokens[-beyond:]
        return beyond

    def sample_row(
        self,
        first_span: int,
        steering: tuple[Steering, ...],
        eos: tuple[int, ...],
        vocab_size: int,
        draft: list[int],
        *,
        output: int = -1,
        mixture: Mixture = (),
    ) -> SampleRow:
        """The row that samples the token after ``draft``; from a ``mixture`` where that drafts."""
        params = self.request.params
        return SampleRow(
            first_span,
            steering,
            params.temperature,
            min(max(params.top_k, 0), vocab_size),
            params.top_p,
            params.min_p,
            params.nucleus if not mixture else "combined",
            self.seed,
            len(self.views[0].tokens) + len(draft),
            -1 if params.logprobs is None or mixture else params.logprobs,
            self.edits(eos, draft),
            output,
            mixture,
        )

    def edits(self, eos: tuple[int, ...], draft: list[int]) -> Edits | None:
        """Changes to the scores of the token after ``draft``, as if its tokens had been sampled."""
        params = self.request.params
        if not params.has_edits:
            return None
        banned: tuple[int, ...] = ()
        if len(self.output) + len(draft) < params.min_tokens:
            banned = (() if params.ignore_eos else eos) + tuple(params.stop_token_ids or ())
        if not banned and not params.has_penalties:
            return None  # min_tokens has been reached: this row is a plain one from here on
        return Edits(
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            None if self.counts is None else self.counts.table(draft),
            params.logit_bias or {},
            banned,
        )


@dataclass(slots=True, eq=False)
class Request:
    """What was asked for. ``sequences`` holds the leader until the prompt is computed, then all ``n`` samples."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    seed: int
    pairs: list[ActivePair]
    metrics: RequestMetrics
    score_only: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    prompt_scores: list[TokenLogprobs] = field(default_factory=list)
    shown_prompt: list[dict[int, Logprob]] = field(default_factory=list)  # the first of them, as outputs have them
    drafter: Drafter | None = None
    assigned: bool = False  # whether it was decided what drafts, if anything

    @property
    def scores_prompt(self) -> bool:
        return self.score_only or self.params.prompt_logprobs is not None

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)
