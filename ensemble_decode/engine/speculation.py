"""Speculation: cheap proposals for the next tokens, which the next step verifies all at once.

A token is a function of scores, parameters, seed and position (SAMPLING.md), so verification is sampling: the step
computes the drafted positions like any other, samples each with the noise of its position, and keeps tokens as long as
they are the drafted ones, and the first that is not. Whatever the draft, the text is the one without it.

A model drafts with the same parameters and noise, from its own logits: where it agrees with the ensemble about the
distribution, it draws the same token. Where expert and anti-expert are adapters over one small model, that model and both
of them draft as rows of one forward, by the ensemble's own formula with the small model in the target's place. Keys and
values live in pools under the sequence's own block table. A member of the sequence's pairs has them computed again in the
verification, together with everyone's; a model that only drafts is left out there and catches up on what it has not seen
when it next drafts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike, fspath

from ensemble_decode.engine.batch import Batch, Mixture, SampleRow, Span, Steering, StepOutput
from ensemble_decode.engine.drafting import Acceptance, Candidate, Costs, NgramIndex, Seconds, best_depths
from ensemble_decode.engine.request import ActivePair, Drafter, Request, Sequence
from ensemble_decode.engine.scheduler import Scheduler, Taken
from ensemble_decode.models.layout import Layout
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

Execute = Callable[[Batch], StepOutput]
#: Rows at which a step is timed at start-up.
_MEASURED_ROWS = (1, 2, 3, 4, 5, 8, 12, 16, 32, 64)
_DEAR_ROWS = 8
_MOST_TOKENS = 16
#: Context at which reading keys and values is timed, and with how many rows.
_MEASURED_CONTEXT, _CONTEXT_ROWS = 1024, 4
#: Acceptance before anything was drafted, of what must be able to pay to be tried at all, and tokens that all remember.
_FIRST_RATE, _BEST_RATE, _WINDOW = 0.6, 0.95, 200.0
#: Where drafting doesn't pay, one token is tried now and then: a sequence's after so many steps, and with this share of time.
_PAUSE, _TRIES = 32, 0.015
#: Tokens that a sequence may be ahead of the last one of a batch, where none waits for its place, before drafts for it are worth less.
_LEAD = 8
#: Share of the time that drafts may lose, whatever was expected of them.
_LOSS = 0.04
#: Steps' time that may be saved up for tries and losses: a drafter that was left out for long has much to read first.
_MOST_CREDIT = 8


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to draft.

    Parameters
    ----------
    draft : str or path
        "expert": the expert of a request's first pair; where the pair is adapters over a model other than the target,
        that model, steered as the target is. "ngram": what followed in prompt or output the last time. Else a
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
        self._prior = Acceptance(_FIRST_RATE, window=_WINDOW)  # of a sequence that has not been seen yet
        self._drafting: list[Sequence] = []
        self._draft_seconds = 0.0
        self._tried: Sequence | None = None  # drafts although it doesn't seem to pay
        self._draft_cost = 0.0  # what the drafts' forwards cost, by the model of costs
        self._credit = 0.0  # seconds that tries may cost
        self._slack = 0.0  # seconds that drafts may lose beside their share of the time to come

    @classmethod
    def measured(
        cls, config: Speculation, layout: Layout, execute: Execute, max_num_seqs: int, num_blocks: int
    ) -> Speculator:
        """With costs measured by running steps."""
        speculator = cls(config, layout, Costs({}))  # what can't be is refused before anything is timed
        speculator.costs = measure_costs(config, layout, execute, max_num_seqs, num_blocks)
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
    def assign(self, scheduler: Scheduler) -> None:
        """Choose what drafts for the requests whose prompts are next, and the view that it sees; nothing where it would not pay."""
        if self.config.draft == "ngram":
            return
        coming = scheduler.coming()
        for sequence in coming:
            if not sequence.request.assigned:
                sequence.request.assigned = True
                self._assign(sequence.request, coming, scheduler)

    def _assign(self, request: Request, coming: list[Sequence], scheduler: Scheduler) -> None:
        found = self._drafter(request.pairs)
        if found is None or request.score_only:
            return
        leader = request.sequences[0]
        view = leader.views[found.view]
        strangers = tuple(pool for pool in found.pools if pool not in view.pools)  # no members of the request's pairs
        if strangers:
            own = strangers == (self.layout.draft_pool,)  # a draft model with limits of its own
            limit = self.layout.draft_len if own else self.layout.max_model_len
            longest = len(view.tokens) + request.params.max_tokens
            if min(longest, self.layout.max_model_len) > limit:
                return
            if own and max(view.tokens) >= self.layout.draft_vocab:
                return
            if self.config.adaptive and not self._pays(leader, found, strangers, coming, scheduler):
                return
            view.draft_pools = strangers
            view.pools = tuple(sorted({*view.pools, *strangers}))
        request.drafter = found

    def _drafter(self, pairs: list[ActivePair]) -> Drafter | None:
        """The draft model; or the expert of the first active pair that has one, else of the first pair of all."""
        layout = self.layout
        if self.config.draft != "expert":
            pool = layout.draft_pool
            return None if pool is None or pool == layout.target_pool else Drafter(0, ((pool, 1.0),))
        for active in [*pairs, ActivePair(0, 0.0, 0, 0)]:
            if layout.pairs[active.pair].expert_pool != layout.target_pool:
                return Drafter(active.expert_view, draft_mixture(layout, active, pairs))
        return None

    def _pays(
        self,
        sequence: Sequence,
        drafter: Drafter,
        strangers: tuple[int, ...],
        coming: list[Sequence],
        scheduler: Scheduler,
    ) -> bool:
        """Whether drafts are expected to save more than it takes to compute a prompt in the ``strangers`` pools as well.

        By what was accepted lately; where that doesn't pay but the best could, tries' time pays for it, if there is enough.
        """
        request, view = sequence.request, sequence.views[drafter.view]
        new = 1 + scheduler.draft_room(sequence)
        if new < 3:
            return False  # the first token comes with the prompt, the last is never drafted
        company = [s for s in (*scheduler.running, *coming) if not s.request.score_only]
        company = (company + [sequence] * (request.params.n - 1))[: scheduler.max_num_seqs]
        step = _Step(company)
        rows, keys = step.of(sequence)
        seconds = self._seconds(step.pools, drafter.pools)

        def saved(rate: float) -> float:
            candidates = [Candidate(rate, min(self.config.tokens, new - 2), rows, keys / rows)] * len(company)
            _, each = best_depths(candidates, len(company), step.rows, step.keys, *seconds)
            return each * (new - 1) * request.params.n

        # Blocks that were computed without the strangers are of no use with them, and the other way round.
        both = tuple(sorted({*view.pools, *strangers}))
        known, more = (scheduler.unknown(sequence, view, pools) for pools in (view.pools, both))
        price = self._prompt_seconds(strangers, more)
        price += self._prompt_seconds(view.pools, more) - self._prompt_seconds(view.pools, known)
        ahead = self._prompt_seconds(view.pools, known) + (new - 1) * step.seconds(self.costs) / len(company)
        if price > self._slack + _LOSS * ahead:
            return False
        if saved(self._prior.rate) <= price:
            if price > self._credit or saved(_BEST_RATE) <= price:
                return False
            self._credit -= price
            sequence.acceptance = Acceptance(0.0, weight=0.0, idle=_PAUSE)  # its first step is the try
        self._slack -= price
        return True

    def _prompt_seconds(self, pools: tuple[int, ...], tokens: int) -> float:
        return self.costs.seconds(pools, tokens, tokens * tokens / 2)

    def _seconds(
        self, pools: tuple[int, ...], drafting: tuple[int, ...] | None
    ) -> tuple[Seconds, Seconds, Seconds | None]:
        """What a step through ``pools`` takes, what one that verifies drafts, and what one of the ``drafting`` pools."""
        curve = self.costs.curve
        return (
            partial(curve, pools),
            partial(curve, pools, verifies=True),
            None if drafting is None else partial(curve, drafting),
        )

    # ── before a step ───────────────────────────────────────────────────────────────────────────────────────────────
    def propose(self, scheduler: Scheduler, execute: Execute) -> None:
        """Draft for the sequences that decode in the next step."""
        self.assign(scheduler)
        start = time.perf_counter()
        self._drafting, self._draft_seconds, self._draft_cost, self._tried = [], 0.0, 0.0, None
        decoding, prompts = scheduler.decoding(), scheduler.prompt_rows()
        if prompts and self.config.adaptive:
            return  # weights are read for the prompts already: a drafted row costs what a token does
        most = {sequence: self._most(sequence, scheduler.draft_room(sequence)) for sequence in decoding}
        most = {sequence: tokens for sequence, tokens in most.items() if tokens > 0}
        if not most:
            return
        if self.config.adaptive:
            left = {sequence: 1 + scheduler.draft_room(sequence) for sequence in decoding}
            depths = self._depths(most, left, bool(scheduler.waiting))
        else:
            depths = most
        rows = {s: sum(len(view.decode_pools) for view in s.views) for s in decoding}  # for a token of each
        budget = max(scheduler.max_num_batched_tokens - sum(rows.values()) - prompts, 0)  # what prompts leave
        granted: dict[Sequence, int] = {}
        for sequence, wanted in depths.items():
            depth = min(wanted, budget // rows[sequence])
            if depth > 0 and scheduler.reserve_draft(sequence, depth):
                granted[sequence] = depth
                budget -= depth * rows[sequence]
        if self.config.draft == "ngram":
            for sequence in most:
                del sequence.draft[granted.get(sequence, 0) :]
        else:
            self._run_model(granted, scheduler, execute)
        self._drafting = [sequence for sequence in granted if sequence.draft]
        if self._drafting:
            self._draft_seconds = time.perf_counter() - start

    def _most(self, sequence: Sequence, room: int) -> int:
        """Tokens that can be drafted for a sequence; prompt lookup leaves them in ``sequence.draft``."""
        most = min(self.config.tokens, room)
        if most <= 0:
            return 0
        if self.config.draft == "ngram":
            if sequence.ngrams is None:
                sequence.ngrams = NgramIndex()
            sequence.draft = sequence.ngrams.propose(sequence.views[0].tokens, most)
            most = len(sequence.draft)
        elif not self._can_draft(sequence):
            return 0
        if sequence.acceptance is None:
            sequence.acceptance = Acceptance(0.0, weight=0.0)  # nothing seen: only what others had counts
        return most

    @staticmethod
    def _can_draft(sequence: Sequence) -> bool:
        drafter = sequence.request.drafter
        return drafter is not None and set(drafter.pools) <= set(sequence.views[drafter.view].pools)

    def _depths(self, most: dict[Sequence, int], left: dict[Sequence, int], replaced: bool) -> dict[Sequence, int]:
        """The depths that pay, and now and then one token for a sequence whose drafts don't: text changes.

        ``left`` is how many steps there may be to come for each that decodes: drafts may lose their share of those.
        ``replaced``: others wait for a place.
        """
        decoding = list(left)
        step = _Step(decoding)
        last = -1 if replaced else max(left.values()) - _LEAD
        candidates = [
            self._candidate(sequence, tokens, step, left[sequence] < last) for sequence, tokens in most.items()
        ]
        # All draft with one model or its like: the first one's forward stands for all.
        drafter = next(iter(most)).request.drafter
        seconds = self._seconds(step.pools, None if drafter is None else drafter.pools)
        stake = self._slack + _LOSS * sum(left.values()) / len(left) * step.seconds(self.costs)
        depths, _ = best_depths(candidates, len(decoding), step.rows, step.keys, *seconds, stake)
        found = dict(zip(most, depths, strict=True))
        idle = None
        for sequence, depth in found.items():
            assert sequence.acceptance is not None
            sequence.acceptance.idle = 0 if depth else sequence.acceptance.idle + 1
            if sequence.acceptance.idle >= _PAUSE and (
                idle is None or sequence.acceptance.idle > idle.acceptance.idle  # type: ignore[union-attr]
            ):
                idle = sequence
        if idle is not None:
            self._try(idle, found, candidates, step, seconds)
        return found

    def _try(
        self,
        sequence: Sequence,
        depths: dict[Sequence, int],
        candidates: list[Candidate],
        step: _Step,
        seconds: tuple[Seconds, Seconds, Seconds | None],
    ) -> None:
        """Draft one token for a sequence, if there is credit for it and drafts that are accepted would pay."""
        mine, drafter = candidates[list(depths).index(sequence)], sequence.request.drafter
        more = self.costs.seconds(step.pools, step.rows + mine.rows, step.keys + mine.rows * mine.keys, verifies=True)
        cost = more - self.costs.seconds(step.pools, step.rows, step.keys)
        if drafter is not None:
            cost += self.costs.seconds(drafter.pools, mine.unseen, mine.unseen * mine.keys)
        if cost > self._credit:
            return
        hopeful = [replace(candidate, rate=_BEST_RATE) for candidate in candidates]
        if not any(best_depths(hopeful, step.sequences, step.rows, step.keys, *seconds)[0]):
            for other in depths:
                assert other.acceptance is not None
                other.acceptance.idle = 0  # nothing that could be accepted would pay for it: not before the next pause
            return
        assert sequence.acceptance is not None
        sequence.acceptance.doubt()
        sequence.acceptance.idle = 0
        self._prior.doubt()
        self._credit -= cost
        self._tried = sequence
        depths[sequence] = 1

    def _candidate(self, sequence: Sequence, most: int, step: _Step, early: bool) -> Candidate:
        assert sequence.acceptance is not None
        unseen = 1
        if sequence.request.drafter is not None:
            view = sequence.views[sequence.request.drafter.view]
            if view.draft_pools:
                unseen = len(view.tokens) - view.drafted
        rows, keys = step.of(sequence)
        return Candidate(sequence.acceptance.beside(self._prior.rate), most, rows, keys / rows, unseen, early)

    def _run_model(self, depths: dict[Sequence, int], scheduler: Scheduler, execute: Execute) -> None:
        """One forward a drafted token, for all sequences that draft as deep together."""
        for depth in range(max(depths.values(), default=0)):
            active = [sequence for sequence, most in depths.items() if most > depth and len(sequence.draft) == depth]
            if not active:
                return
            batch = Batch([], [], copies=scheduler.take_copies(), drafts=True)
            for sequence in active:
                drafter = sequence.request.drafter
                assert drafter is not None
                view = sequence.views[drafter.view]
                known = view.drafted if view.draft_pools else view.computed
                if depth:
                    tokens, begin = sequence.draft[-1:], len(view.tokens) + depth - 1
                else:
                    tokens, begin = view.tokens[known:], known
                if view.draft_pools:
                    view.drafted = begin + len(tokens)
                batch.samples.append(
                    sequence.sample_row(
                        len(batch.spans),
                        (),
                        scheduler.eos,
                        self.layout.vocab_size,
                        sequence.draft,
                        mixture=drafter.mixture,
                    )
                )
                batch.spans.append(Span(tokens, begin, view.table, drafter.pools, 1))
            start = time.perf_counter()
            output = execute(batch)
            load = load_of(batch)
            if len({span.pools for span in batch.spans}) == 1:
                self.costs.observe(*load, time.perf_counter() - start)
            self._draft_cost += self.costs.seconds(*load)
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
                self._prior.observe(found.accepted, found.drafted)
            self._check_vocabulary(sequence)
        self.stats["draft_seconds"] += self._draft_seconds
        pools, rows, keys = load_of(batch)
        if not taken or any(len(span.tokens) != span.outputs for span in batch.spans):
            self._slack += _LOSS * self.costs.seconds(pools, rows, keys)
            return  # prompts in it: its time says nothing of decoding
        verifies = any(len(span.tokens) > 1 for span in batch.spans)
        self.costs.observe(pools, rows, keys, seconds, verifies=verifies)
        share = len(taken) / (len(taken) + sum(found.drafted for found in taken.values()))
        alone = self.costs.seconds(pools, rows * share, keys * share)  # of the step without drafts
        self._credit = min(self._credit + _TRIES * alone, _MOST_CREDIT * alone)
        rounds = sum(found.new for found in taken.values()) / len(
            taken
        )  # such steps as the same tokens would have taken
        if self.config.adaptive:
            # By the model of costs, not the clock: a neighbour that comes in one step is no loss of its drafts.
            lost = self.costs.seconds(pools, rows, keys, verifies=verifies) + self._draft_cost - rounds * alone
            self._slack = min(self._slack + _LOSS * rounds * alone - lost, _MOST_CREDIT * alone)
        if self._drafting:
            saved = rounds * alone - seconds - self._draft_seconds
            self.stats["saved_seconds"] += saved
            for sequence in self._drafting:
                sequence.request.metrics.saved_seconds += saved / len(self._drafting)
            if self._tried is not None and (tried := taken.get(self._tried)) is not None and tried.accepted:
                assert self._tried.acceptance is not None
                self._credit += alone / len(taken)  # a try that went well has paid a token, and another follows at once
                self._tried.acceptance.idle = _PAUSE

    def _check_vocabulary(self, sequence: Sequence) -> None:
        """A draft model with a smaller embedding can't read every token; with one of those, it is out."""
        view = sequence.views[0]
        if view.draft_pools == (self.layout.draft_pool,) and view.tokens[-1] >= self.layout.draft_vocab:
            view.pools, view.draft_pools = view.decode_pools, ()


def draft_mixture(layout: Layout, first: ActivePair, pairs: list[ActivePair]) -> Mixture:
    """What stands for the ensemble in a draft: z₀ + Σ α(z⁺ − z⁻), z₀ of the small model under the adapters of these pairs.

    Of ``first`` and the other ``pairs`` those count whose sides are adapters over the same model and see the same text. Where
    the first pair's are not, its expert drafts alone: a forward for each side would cost more than agreement gains.
    """
    base = layout.pairs[first.pair].base_pool
    if base is None or first.expert_view != first.anti_expert_view:
        return ((layout.pairs[first.pair].expert_pool, 1.0),)
    weights = {base: 1.0}
    for active in [first, *(other for other in pairs if other.pair != first.pair)]:
        pair = layout.pairs[active.pair]
        if pair.base_pool == base and {active.expert_view, active.anti_expert_view} == {first.expert_view}:
            for pool, weight in ((pair.expert_pool, active.alpha), (pair.anti_expert_pool, -active.alpha)):
                assert pool is not None
                weights[pool] = weights.get(pool, 0.0) + weight
    return tuple(sorted((pool, weight) for pool, weight in weights.items() if weight))


class _Step:
    """What a step of one token a sequence computes, rows and keys as means over its pools."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = len(sequences)
        self.pools = tuple(sorted({pool for s in sequences for view in s.views for pool in view.decode_pools}))
        self.rows = self.keys = 0.0
        for sequence in sequences:
            rows, keys = self.of(sequence)
            self.rows += rows
            self.keys += keys

    def seconds(self, costs: Costs) -> float:
        return costs.seconds(self.pools, self.rows, self.keys)

    def of(self, sequence: Sequence) -> tuple[float, float]:
        """Rows and keys of one sequence in it."""
        rows = keys = 0
        for view in sequence.views:
            count = len(view.decode_pools)
            rows += count
            keys += count * len(view.tokens)
        return rows / len(self.pools), keys / len(self.pools)


def load_of(batch: Batch) -> tuple[tuple[int, ...], float, float]:
    """Pools of a batch, and rows and keys as means over them."""
    pools = tuple(sorted({pool for span in batch.spans for pool in span.pools}))
    rows = keys = 0
    for span in batch.spans:
        count = len(span.tokens) * len(span.pools)
        rows += count
        keys += count * (span.start + len(span.tokens))
    return pools, rows / len(pools), keys / len(pools)


def measure_costs(
    config: Speculation, layout: Layout, execute: Execute, max_num_seqs: int, num_blocks: int, rounds: int = 4
) -> Costs:
    """Time steps of one token a row, on an empty cache and on a long context, and one that verifies a drafted token.

    Measured are the target alone, the target with each pair, all members, and each pool that may draft.
    """
    target = layout.target_pool
    kinds: dict[tuple[int, ...], tuple[int, ...]] = {(target,): ()}  # pools → pairs that steer
    for index, pair in enumerate(layout.pairs):
        anti = target if pair.anti_expert_pool is None else pair.anti_expert_pool
        kinds.setdefault(tuple(sorted({target, pair.expert_pool, anti})), (index,))
    kinds.setdefault(layout.member_pools, tuple(range(len(layout.pairs))))
    if config.draft == "expert":
        every = [
            ActivePair(index, 1.0, pair.expert_view, pair.anti_expert_view) for index, pair in enumerate(layout.pairs)
        ]
        for active in every:
            # For an unsteered row, alone, and with all that may draft beside it.
            for first, company in ((replace(active, alpha=0.0), []), (active, []), (active, every)):
                kinds.setdefault(tuple(pool for pool, _ in draft_mixture(layout, first, company)), ())
    elif config.draft != "ngram" and layout.draft_pool is not None:
        kinds.setdefault((layout.draft_pool,), ())
    most = 2 * max_num_seqs * (config.tokens + 1)
    row_counts = [rows for rows in _MEASURED_ROWS if rows <= most]
    context = min(_MEASURED_CONTEXT, layout.max_model_len - 1, num_blocks * BLOCK_SIZE - 1)
    small = (layout.draft_pool,) if layout.draft_pool not in layout.member_pools else ()

    def context_of(pools: tuple[int, ...]) -> int:
        return min(context, layout.draft_len - 1) if pools == small else context

    best: dict[tuple[tuple[int, ...], int, int, int], float] = {}
    for number in range(rounds):
        for pools, pairs in kinds.items():
            verification = [(2, 0, 2)] if target in pools else []
            for rows, start, tokens in [
                *((rows, 0, 1) for rows in row_counts),
                (_CONTEXT_ROWS, context_of(pools), 1),
                *verification,
            ]:
                if number % 2 and rows > _DEAR_ROWS:
                    continue  # they take long and vary little
                begun = time.perf_counter()
                execute(_measured_batch(pools, pairs, target, rows, start, tokens))
                key = (pools, rows, start, tokens)
                best[key] = min(best.get(key, math.inf), time.perf_counter() - begun)
    measured = {pools: {rows: best[pools, rows, 0, 1] for rows in row_counts} for pools in kinds}
    per_key = {}
    for pools in kinds:
        keys = _CONTEXT_ROWS * context_of(pools)
        more = best[pools, _CONTEXT_ROWS, context_of(pools), 1] - measured[pools].get(_CONTEXT_ROWS, math.inf)
        per_key[pools] = max(more, 0.0) / keys if keys else 0.0
    per_verification = {
        pools: max(best[pools, 2, 0, 2] - measured[pools][2], 0.0) for pools in kinds if target in pools
    }
    return Costs(measured, per_key, per_verification)


def _measured_batch(
    pools: tuple[int, ...], pairs: tuple[int, ...], target: int, rows: int, start: int, tokens: int
) -> Batch:
    """Spans of ``tokens`` tokens at position ``start``, all sampled. They share their blocks: what is in them doesn't matter."""
    table = list(range((start + tokens - 1) // BLOCK_SIZE + 1))
    spans = [Span([0] * tokens, start, table, pools, tokens) for _ in range(rows // tokens)]
    mixture = () if target in pools else tuple((pool, 1 / len(pools)) for pool in pools)
    samples = []
    for row in range(rows):
        span, output = divmod(row, tokens)
        steering = tuple(Steering(pair, 1.0, span, span) for pair in pairs)
        position = start + 1 + output
        samples.append(
            SampleRow(span, steering, 1.0, 0, 0.9, 0.0, "combined", row, position, output=output, mixture=mixture)
        )
    return Batch(spans, samples)
