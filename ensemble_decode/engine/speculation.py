"""Speculation: cheap proposals for the next tokens, which the next step verifies all at once.

A token is a function of scores, parameters, seed and position (SAMPLING.md), so verification is sampling: the step
computes the drafted positions like any other, samples each with the noise of its position, and keeps tokens as long as
they are the drafted ones, and the first that is not. Whatever the draft, the text is the one without it.

A model drafts with the same parameters and noise, from its own logits: where it agrees with the ensemble about the
distribution, it draws the same token. Its keys and values live in a pool under the sequence's own block table. A
member of the sequence's pairs has them computed again in the verification, together with everyone's; a model that only
drafts is left out there and catches up on what it has not seen when it next drafts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike, fspath

from ensemble_decode.engine.batch import Batch, SampleRow, Span, Steering, StepOutput
from ensemble_decode.engine.drafting import Acceptance, Costs, NgramIndex, best_depth
from ensemble_decode.engine.request import ActivePair, Request, Sequence
from ensemble_decode.engine.scheduler import Scheduler, Taken
from ensemble_decode.models.layout import Layout

Execute = Callable[[Batch], StepOutput]
#: Rows at which a step is timed at start-up.
_MEASURED_ROWS = (1, 2, 4, 8, 16, 32, 64)
_MOST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to draft.

    Parameters
    ----------
    draft : str or path
        "expert": the expert of a request's first pair. "ngram": what followed in prompt or output the last time. Else a
        model of the same vocabulary, hub id or folder, or a LoRA adapter over the target.
    tokens : int
        Most tokens drafted in a step, 1 … 16.
    adaptive : bool
        Draft as deep as pays by what was accepted and by measured costs, down to nothing. False: always ``tokens`` deep.

    Raises
    ------
    ValueError
        One line: the parameter, its value, what is allowed.
    """

    draft: str | PathLike[str] = "ngram"
    tokens: int = 4
    adaptive: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.draft, str | PathLike) or not fspath(self.draft):
            raise ValueError(
                f"Speculation: draft is {self.draft!r}, allowed are 'expert', 'ngram' and a model's id or folder"
            )
        object.__setattr__(self, "draft", fspath(self.draft))
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or not 1 <= self.tokens <= _MOST_TOKENS:
            raise ValueError(f"Speculation: tokens is {self.tokens!r}, allowed is 1 … {_MOST_TOKENS}")
        if not isinstance(self.adaptive, bool):
            raise ValueError(f"Speculation: adaptive is {self.adaptive!r}, allowed are True and False")

    @property
    def model(self) -> str | None:
        """The draft model to load; None where nothing is loaded for drafting."""
        return None if self.draft in ("expert", "ngram") else str(self.draft)


class Speculator:
    """Drafts for the sequences of a scheduler, and learns from what became of the drafts.

    Parameters
    ----------
    config : Speculation
    layout : Layout
    costs : Costs
    """

    def __init__(self, config: Speculation, layout: Layout, costs: Costs) -> None:
        if config.draft == "expert" and not layout.pairs:
            raise ValueError("speculation: draft is 'expert', but there are no pairs: allowed are 'ngram' and a model")
        self.config = config
        self.layout = layout
        self.costs = costs
        self.stats = {
            "drafted": 0,
            "accepted": 0,
            "new_tokens": 0,
            "target_forwards": 0,
            "draft_seconds": 0.0,
            "saved_seconds": 0.0,
        }
        self._prior = 0.6  # acceptance of a sequence that has not been seen yet
        self._drafting: list[Sequence] = []
        self._draft_seconds = 0.0

    @classmethod
    def measured(cls, config: Speculation, layout: Layout, execute: Execute, max_num_seqs: int) -> Speculator:
        """With costs measured by running steps."""
        speculator = cls(config, layout, Costs({}))  # what can't be is refused before anything is timed
        speculator.costs = measure_costs(config, layout, execute, max_num_seqs)
        return speculator

    @property
    def statistics(self) -> dict[str, float]:
        """Sums over all requests, and of them the acceptance rate and the tokens a forward (NaN before the first)."""
        drafted, forwards = self.stats["drafted"], self.stats["target_forwards"]
        return {
            **self.stats,
            "acceptance_rate": self.stats["accepted"] / drafted if drafted else math.nan,
            "tokens_per_forward": self.stats["new_tokens"] / forwards if forwards else math.nan,
        }

    # ── who drafts ──────────────────────────────────────────────────────────────────────────────────────────────────
    def assign(self, request: Request) -> None:
        """Choose the pool and the view that draft for a new request; none where it could not pay."""
        found = self._member(request.pairs) if self.config.draft == "expert" else None
        if found is None and self.config.draft != "ngram":
            pool = self.layout.pairs[0].expert_pool if self.config.draft == "expert" else self.layout.draft_pool
            found = None if pool is None or pool == self.layout.target_pool else (pool, 0)
        if found is None:
            return
        pool, view = found
        leader = request.sequences[0]
        if pool not in leader.views[view].pools:
            limit = self.layout.draft_len if pool == self.layout.draft_pool else self.layout.max_model_len
            longest = len(leader.views[view].tokens) + request.params.max_tokens
            if min(longest, self.layout.max_model_len) > limit or request.score_only:
                return
            if pool == self.layout.draft_pool and max(leader.views[view].tokens) >= self.layout.draft_vocab:
                return
            if self.config.adaptive and not self._could_pay(pool, leader):
                return
            leader.views[view].draft_pool = pool
            leader.views[view].pools = tuple(sorted({*leader.views[view].pools, pool}))
        request.draft_pool, request.draft_view = pool, view

    def _member(self, pairs: list[ActivePair]) -> tuple[int, int] | None:
        """Pool and view of the first active pair whose expert is not the target itself."""
        for active in pairs:
            pool = self.layout.pairs[active.pair].expert_pool
            if pool != self.layout.target_pool:
                return pool, active.expert_view
        return None

    def _could_pay(self, pool: int, sequence: Sequence) -> bool:
        pools = _pools(sequence)
        verify, draft = (lambda rows: self.costs.seconds(pools, rows)), (lambda rows: self.costs.seconds((pool,), rows))
        return best_depth(0.95, self.config.tokens, 1, verify, draft) > 0

    # ── before a step ───────────────────────────────────────────────────────────────────────────────────────────────
    def propose(self, scheduler: Scheduler, execute: Execute) -> None:
        """Draft for the sequences that decode in the next step."""
        start = time.perf_counter()
        decoding = scheduler.decoding()
        depths: dict[Sequence, int] = {}
        budget = scheduler.max_num_batched_tokens - sum(len(sequence.views) for sequence in decoding)
        for sequence in decoding:
            room = min(scheduler.draft_room(sequence), budget // len(sequence.views))
            depth = self._depth(sequence, room, len(decoding))
            if depth and scheduler.reserve_draft(sequence, depth):
                depths[sequence] = depth
                budget -= depth * len(sequence.views)
        if self.config.draft == "ngram":
            for sequence, depth in depths.items():
                if sequence.ngrams is None:
                    sequence.ngrams = NgramIndex()
                sequence.draft = sequence.ngrams.propose(sequence.views[0].tokens, depth)
        else:
            self._run_model(depths, scheduler, execute)
        self._drafting = [sequence for sequence in depths if sequence.draft]
        self._draft_seconds = time.perf_counter() - start if self._drafting else 0.0

    def _depth(self, sequence: Sequence, room: int, sequences: int) -> int:
        most = min(self.config.tokens, room)
        pool = sequence.request.draft_pool
        if most <= 0 or (self.config.draft != "ngram" and not self._can_draft(sequence)):
            return 0
        if sequence.acceptance is None:
            sequence.acceptance = Acceptance(self._prior)
        if not self.config.adaptive:
            return most
        pools = _pools(sequence)

        def verify(rows: int) -> float:
            return self.costs.seconds(pools, rows)

        def draft(rows: int) -> float:
            return 0.0 if pool is None else self.costs.seconds((pool,), rows)

        return sequence.acceptance.depth(most, sequences, verify, draft)

    @staticmethod
    def _can_draft(sequence: Sequence) -> bool:
        pool = sequence.request.draft_pool
        return pool is not None and pool in sequence.views[sequence.request.draft_view].pools

    def _run_model(self, depths: dict[Sequence, int], scheduler: Scheduler, execute: Execute) -> None:
        """One forward a drafted token, for all sequences that draft as deep together."""
        for depth in range(max(depths.values(), default=0)):
            active = [sequence for sequence, most in depths.items() if most > depth and len(sequence.draft) == depth]
            if not active:
                return
            batch = Batch([], [], copies=scheduler.take_copies(), drafts=True)
            for sequence in active:
                request = sequence.request
                pool, view = request.draft_pool, sequence.views[request.draft_view]
                assert pool is not None
                known = view.computed if view.draft_pool is None else view.drafted
                if depth:
                    tokens, begin = sequence.draft[-1:], len(view.tokens) + depth - 1
                else:
                    tokens, begin = view.tokens[known:], known
                if view.draft_pool is not None:
                    view.drafted = begin + len(tokens)
                batch.samples.append(
                    sequence.sample_row(
                        len(batch.spans), (), scheduler.eos, self.layout.vocab_size, sequence.draft, pool=pool
                    )
                )
                batch.spans.append(Span(tokens, begin, view.table, (pool,), 1))
            start = time.perf_counter()
            output = execute(batch)
            if len({row.pool for row in batch.samples}) == 1 and batch.num_tokens == len(active):
                self.costs.observe(batch.spans[0].pools, len(active), time.perf_counter() - start)
            for sequence, token in zip(active, output.tokens, strict=True):
                if token >= 0:
                    sequence.draft.append(token)

    # ── after it ────────────────────────────────────────────────────────────────────────────────────────────────────
    def observe(self, batch: Batch, seconds: float, taken: dict[Sequence, Taken]) -> None:
        """Take in a step: its ``seconds``, and what it gave each sequence."""
        for sequence, found in taken.items():
            self.stats["drafted"] += found.drafted
            self.stats["accepted"] += found.accepted
            self.stats["new_tokens"] += found.new
            self.stats["target_forwards"] += 1
            metrics = sequence.request.metrics
            metrics.drafted_tokens += found.drafted
            metrics.accepted_tokens += found.accepted
            metrics.new_tokens += found.new
            metrics.target_forwards += 1
            if found.drafted and sequence.acceptance is not None:
                sequence.acceptance.observe(found.accepted, found.drafted)
                self._prior += 0.02 * (sequence.acceptance.rate - self._prior)
            self._check_vocabulary(sequence)
        self.stats["draft_seconds"] += self._draft_seconds
        if not taken or any(len(span.tokens) != span.outputs for span in batch.spans):
            return  # prompts in it: its time says nothing of decoding
        pools = tuple(sorted({pool for span in batch.spans for pool in span.pools}))
        self.costs.observe(pools, len(batch.samples), seconds)
        if self._drafting:
            rounds = sum(found.new for found in taken.values()) / len(taken)  # steps that the same tokens had taken
            saved = rounds * self.costs.seconds(pools, len(taken)) - seconds - self._draft_seconds
            self.stats["saved_seconds"] += saved
            for sequence in self._drafting:
                sequence.request.metrics.saved_seconds += saved / len(self._drafting)

    def _check_vocabulary(self, sequence: Sequence) -> None:
        """A draft model with a smaller embedding can't read every token; with one of those, it is out."""
        view = sequence.views[sequence.request.draft_view]
        if view.draft_pool == self.layout.draft_pool is not None and view.tokens[-1] >= self.layout.draft_vocab:
            view.pools, view.draft_pool = view.decode_pools, None


def _pools(sequence: Sequence) -> tuple[int, ...]:
    """Pools that verify a sequence's tokens."""
    return tuple(sorted({pool for view in sequence.views for pool in view.decode_pools}))


def measure_costs(config: Speculation, layout: Layout, execute: Execute, max_num_seqs: int, rounds: int = 3) -> Costs:
    """Time steps of one token a row on an empty cache: the target alone, all members, and each pool that may draft."""
    kinds: dict[tuple[int, ...], bool] = {(layout.target_pool,): False, layout.member_pools: True}
    if config.draft == "expert":
        kinds.update({(pair.expert_pool,): False for pair in layout.pairs if pair.expert_pool != layout.target_pool})
    elif config.draft != "ngram" and layout.draft_pool is not None:
        kinds.setdefault((layout.draft_pool,), False)
    measured: dict[tuple[int, ...], dict[int, float]] = {}
    most = max_num_seqs * (config.tokens + 1)
    for pools, steered in kinds.items():
        table = measured.setdefault(pools, {})
        for rows in _MEASURED_ROWS:
            if rows > 2 * most:
                break
            spans = [Span([0], 0, [0], pools, 1) for _ in range(rows)]
            pool = None if layout.target_pool in pools else pools[0]
            samples = []
            for row in range(rows):
                pairs = range(len(layout.pairs)) if steered else ()
                steering = tuple(Steering(pair, 1.0, row, row) for pair in pairs)
                samples.append(SampleRow(row, steering, 1.0, 0, 0.9, 0.0, "combined", row, 1, pool=pool))
            best = float("inf")
            for _ in range(rounds + (rows == 1)):
                start = time.perf_counter()
                execute(Batch(spans, samples))
                best = min(best, time.perf_counter() - start)
            table[rows] = best
    return Costs(measured)
