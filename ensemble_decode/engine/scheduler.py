"""The scheduler: which tokens of which sequences are computed in the next step. It never sees a tensor.

Every step, in this order: running sequences that decode, one token each; running sequences in the middle of their
prompt, as many tokens as the budget has left; then waiting ones, first come first served. Who runs out of blocks
takes those of the youngest, which goes back to waiting and is recomputed later: the noise depends on seed and position
only, so nothing of its text changes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ensemble_decode.engine.batch import Batch, ScoreRow, Span, StepOutput, TokenLogprobs
from ensemble_decode.engine.block_manager import BlockManager, OutOfBlocks
from ensemble_decode.engine.request import Request, Sequence, View
from ensemble_decode.models.layout import Layout
from ensemble_decode.ops.paged_attention import BLOCK_SIZE


@dataclass(slots=True)
class _Chunk:
    """What one sequence does in the step under way."""

    sequence: Sequence
    scores: bool  # whether a row of the batch scores part of its prompt


@dataclass(slots=True)
class Taken:
    """What a step gave one sequence: ``new`` tokens, the first ``accepted`` of them out of ``drafted``."""

    drafted: int
    accepted: int
    new: int

    def cut(self, tokens: int) -> None:
        """The last ``tokens`` of the new ones lie beyond the sequence's end."""
        self.new -= tokens
        self.accepted = min(self.accepted, self.new)


class Scheduler:
    """Waiting and running sequences, and the blocks they hold.

    Parameters
    ----------
    layout : Layout
    blocks : BlockManager
    max_num_seqs : int
        Sequences that run at once.
    max_num_batched_tokens : int
        Tokens of a step, counted in each pool that computes them; decoding sequences always go on, prompts take what is left.
    eos : tuple of int
        Tokens that end a sequence.
    """

    def __init__(
        self,
        layout: Layout,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos: tuple[int, ...] = (),
    ) -> None:
        self.layout = layout
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.eos = eos
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._copies: list[tuple[int, int]] = []
        self._chunks: list[_Chunk] = []
        self._sampled: list[tuple[Sequence, int]] = []  # with how many rows
        #: What the last step gave, by sequence.
        self.taken: dict[Sequence, Taken] = {}
        self._taken: set[int] = set()  # sequences in the step under way: their blocks are not for taking
        self._late: list[Sequence] = []  # samples that get their first token in this step and then wait

    # ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────
    def check(self, request: Request) -> None:
        """Refuse a request that could never run, before it is queued."""
        views = request.sequences[0].views
        longest = max(len(view.tokens) for view in views)
        limit = self.layout.max_model_len
        if request.score_only:
            # The last token is scored, not computed.
            if longest > limit:
                raise ValueError(
                    f"the text has {longest + 1} tokens, allowed are {limit + 1} (max_model_len {limit} and one more)"
                )
        elif longest >= limit:
            raise ValueError(
                f"the prompt has {longest} tokens, allowed are {limit - 1} (max_model_len {limit} less one to generate)"
            )
        new = 0 if request.score_only else request.params.max_tokens
        needed = sum(self.blocks.blocks_for(min(len(view.tokens) + new, limit)) for view in views)
        if needed > self.blocks.num_blocks:
            raise ValueError(
                f"the request may need {needed * BLOCK_SIZE} tokens of KV cache (prompt and max_tokens={request.params.max_tokens}), "
                f"allowed are {self.blocks.num_blocks * BLOCK_SIZE} (raise kv_cache_bytes or lower max_tokens)"
            )

    def add(self, request: Request) -> None:
        """Queue a request that was checked."""
        self.waiting.append(request.sequences[0])

    def finish(
        self, sequence: Sequence, reason: str, stop_reason: int | str | None = None, error: str | None = None
    ) -> None:
        """End a sequence, wherever it is, and take its blocks back."""
        if sequence.finished:
            return
        sequence.finish_reason = reason  # type: ignore[assignment]
        sequence.stop_reason = stop_reason
        sequence.error = error
        sequence.ngrams = sequence.counts = None  # some hundred bytes a token
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self._late:
            self._late.remove(sequence)
        self._release(sequence)

    def abort(self, request: Request) -> None:
        for sequence in list(request.sequences):
            self.finish(sequence, "abort")

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def schedule(self) -> Batch:
        """The next step's work. Empty (no spans) only when nothing is waiting or running."""
        batch = Batch([], [], copies=self.take_copies())
        self._chunks, self._sampled = [], []
        self._taken.clear()
        budget = self.max_num_batched_tokens
        prompts = []
        for sequence in list(self.running):
            if sequence.pending > len(sequence.views):
                prompts.append(sequence)
            elif sequence in self.running and self._reserve(sequence, [1] * len(sequence.views)):
                budget -= self._add(batch, sequence, [1] * len(sequence.views))
        # However many decode, prompts go on.
        budget = max(budget, BLOCK_SIZE * len(self.layout.views) * self.layout.num_pools)
        for sequence in prompts:
            if (
                sequence in self.running
                and (counts := self._portion(sequence, budget))
                and self._reserve(sequence, counts)
            ):
                budget -= self._add(batch, sequence, counts)
        while self.waiting and len(self.running) < self.max_num_seqs and budget > 0:
            sequence = self.waiting[0]
            if not self._admit(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            counts = self._portion(sequence, budget)
            if counts is None or not self._reserve(sequence, counts):
                break
            budget -= self._add(batch, sequence, counts)
        return batch

    def update(self, output: StepOutput) -> list[Sequence]:
        """Take in what a step computed. Returns the sequences that changed, finished ones included."""
        changed: list[Sequence] = []
        scores = iter(output.scores)
        for chunk in self._chunks:
            self._register(chunk.sequence)
            request = chunk.sequence.request
            if chunk.scores:
                request.prompt_scores += next(scores)
            if request.score_only and chunk.sequence.pending == 0:
                self.finish(chunk.sequence, "stop")
                changed.append(chunk.sequence)
        self.taken = {}
        answers = zip(output.tokens, output.logprobs, strict=True)
        for sequence, rows in self._sampled:
            answer = list(itertools.islice(answers, rows))
            if not sequence.finished:
                changed.append(sequence)
                self._take(sequence, answer)
        self.waiting.extendleft(reversed([s for s in self._late if not s.finished]))
        self._late = []
        return changed

    def take_copies(self) -> list[tuple[int, int]]:
        """Blocks to copy before anything else is computed, asked for by the forks of the step before."""
        copies, self._copies = self._copies, []
        return copies

    # ── drafts ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def decoding(self) -> list[Sequence]:
        """Sequences whose next step may verify a draft: those that have a first token and nothing else to compute."""
        return [s for s in self.running if s.output and s.pending == len(s.views)]

    def coming(self) -> list[Sequence]:
        """Waiting sequences that there are places for."""
        return list(itertools.islice(self.waiting, self.max_num_seqs - len(self.running)))

    def prompt_rows(self) -> int:
        """Rows of the prompts that the next step can go on with, were its budget large enough."""
        prompts, free = [s for s in self.running if s.pending > len(s.views)], self.blocks.num_free
        for sequence in self.coming():
            free -= sum(self.blocks.blocks_for(len(view.tokens)) for view in sequence.views)
            if free < 0:
                break
            prompts.append(sequence)
        return sum(view.pending * len(view.pools) for sequence in prompts for view in sequence.views)

    def unknown(self, sequence: Sequence, view: View, pools: tuple[int, ...]) -> int:
        """Tokens of a waiting sequence's ``view`` that ``pools`` would have to compute."""
        if sequence.request.scores_prompt:
            return len(view.tokens)
        table = self.blocks.match(view.tokens, pools)
        known = len(table) * BLOCK_SIZE
        self.blocks.release(table)
        return len(view.tokens) - known

    def draft_room(self, sequence: Sequence) -> int:
        """Tokens that may be drafted: a step gives one more than it verifies."""
        longest = max(len(view.tokens) for view in sequence.views)
        left = sequence.request.params.max_tokens - len(sequence.output)
        return min(left, self.layout.max_model_len - longest) - 1

    def reserve_draft(self, sequence: Sequence, depth: int) -> bool:
        """Blocks for a draft, if they are free and every running sequence still finds one for each view."""
        needs = [self.blocks.blocks_for(view.computed + 1 + depth) - len(view.table) for view in sequence.views]
        spare = self.blocks.num_free - sum(len(s.views) for s in self.running)
        if sum(n for n in needs if n > 0) > max(spare, 0):
            return False
        for view, count in zip(sequence.views, needs, strict=True):
            view.table += [self.blocks.allocate() for _ in range(count)]
        return True

    # ── details ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _portion(self, sequence: Sequence, budget: int) -> list[int] | None:
        """How many tokens of each view fit into a ``budget`` of rows, one for each pool that computes a token; None if none do.

        The last tokens of all views must come in one step, since their logits meet there: a view that would be complete
        before the others keeps its last token back.
        """
        if sum(view.pending * len(view.pools) for view in sequence.views) <= budget:
            return [view.pending for view in sequence.views]
        counts = []
        for view in sequence.views:
            count = min(view.pending - 1, budget // len(view.pools))
            counts.append(count)
            budget -= count * len(view.pools)
        return counts if any(counts) else None

    def _admit(self, sequence: Sequence) -> bool:
        """Find the known prefix of a waiting sequence; False if blocks for the rest are not free."""
        request = sequence.request
        for view in sequence.views:
            if not view.table and not request.scores_prompt:
                view.table = self.blocks.match(view.tokens, view.pools)
                view.registered = len(view.table)
                view.hold(view.registered * BLOCK_SIZE)
        missing = sum(self.blocks.blocks_for(len(view.tokens)) - len(view.table) for view in sequence.views)
        if missing <= self.blocks.num_free:
            request.metrics.cached_tokens += sum(view.computed for view in sequence.views)
            return True
        self._release(sequence)
        return False

    def _reserve(self, sequence: Sequence, counts: list[int]) -> bool:
        """Blocks for the next ``counts`` tokens of each view, from the youngest where none are free."""
        for view, count in zip(sequence.views, counts, strict=True):
            needed = self.blocks.blocks_for(view.computed + count)
            while len(view.table) < needed:
                try:
                    view.table.append(self.blocks.allocate())
                except OutOfBlocks:
                    victim = next((s for s in reversed(self.running) if id(s) not in self._taken), sequence)
                    self._preempt(victim)
                    if victim is sequence:
                        return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.request.metrics.preemptions += 1
        if not sequence.output:
            sequence.request.prompt_scores.clear()
            sequence.request.shown_prompt.clear()
        self.waiting.appendleft(sequence)

    def _release(self, sequence: Sequence) -> None:
        sequence.draft = []
        for view in sequence.views:
            self.blocks.release(view.table)
            view.forget()

    def _add(self, batch: Batch, sequence: Sequence, counts: list[int]) -> int:
        """Put a sequence's spans, and what is sampled of them, into the batch; how many rows the pools compute for it."""
        request, first, draft = sequence.request, len(batch.spans), sequence.draft
        decodes = bool(sequence.output) and sequence.pending == len(sequence.views)
        self._taken.add(id(sequence))
        complete, rows = True, 0
        for view, count in zip(sequence.views, counts, strict=True):
            start, end = view.computed, view.computed + count
            last = end == len(view.tokens)
            complete &= last
            if count == 0:
                continue  # the budget ended before this view; the spans of an incomplete chunk are not referred to
            tokens = view.tokens[-1:] if last and count == 1 else view.tokens[start:end]
            pools = view.decode_pools if decodes else view.pools
            batch.drafts |= not set(view.draft_pools).isdisjoint(pools)
            batch.spans.append(Span(tokens + draft, start, view.table, pools, 1 + len(draft) if last else 0))
            rows += len(pools) * (count + len(draft))
            if decodes:
                view.computed = end  # what is drafted counts once it is accepted
            else:
                view.hold(end)
        samples = complete and not request.score_only
        scores = request.scores_prompt and not sequence.output
        if scores:
            self._score(batch, sequence, first, counts[0])
        if not complete:
            for span in batch.spans[first:]:
                span.outputs = span.outputs if scores else 0
        self._chunks.append(_Chunk(sequence, scores))
        if samples:
            self._sample(batch, sequence, first)
        return rows

    def _score(self, batch: Batch, sequence: Sequence, first: int, count: int) -> None:
        request, span = sequence.request, batch.spans[first]
        span.outputs = count
        targets = request.prompt_token_ids[span.start + 1 : span.start + 1 + count]
        best = request.params.prompt_logprobs or 0
        batch.scores.append(ScoreRow(first, sequence.steering(first), targets, best))

    def _sample(self, batch: Batch, sequence: Sequence, first: int) -> None:
        request, params = sequence.request, sequence.request.params
        rows = [sequence]
        if not sequence.output and sequence.index == 0 and params.n > 1 and len(request.sequences) == 1:
            rows += self._fork(sequence)
        steering, size = sequence.steering(first), self.layout.vocab_size
        for row in rows:
            for i in range(len(row.draft)):
                batch.samples.append(row.sample_row(first, steering, self.eos, size, row.draft[:i], output=i))
            batch.samples.append(row.sample_row(first, steering, self.eos, size, row.draft))
            self._sampled.append((row, 1 + len(row.draft)))

    def _fork(self, leader: Sequence) -> Iterator[Sequence]:
        """The other samples of a prompt that is computed in this step. Each shares the prompt's full blocks."""
        for index in range(1, leader.request.params.n):
            views = [View(list(view.tokens), view.pools, draft_pools=view.draft_pools) for view in leader.views]
            sequence = Sequence(leader.request, index, views)
            leader.request.sequences.append(sequence)
            if len(self.running) < self.max_num_seqs and self._share(leader, sequence):
                self.running.append(sequence)
                # The copies are made in the next step: until then nobody may take the blocks they go to.
                self._taken.add(id(sequence))
            else:
                # No room beside the others: it waits, and finds the prompt's blocks by content when its turn comes.
                self._late.append(sequence)
            yield sequence

    def _share(self, leader: Sequence, sequence: Sequence) -> bool:
        partial = sum(len(view.tokens) % BLOCK_SIZE != 0 for view in leader.views)
        if partial > self.blocks.num_free:
            return False
        for mine, theirs in zip(sequence.views, leader.views, strict=True):
            full = len(theirs.tokens) // BLOCK_SIZE
            mine.table = [self.blocks.share(block) for block in theirs.table[:full]]
            if len(theirs.tokens) % BLOCK_SIZE:
                mine.table.append(self.blocks.allocate())
                self._copies.append((theirs.table[full], mine.table[full]))
            mine.hold(len(mine.tokens))
            mine.registered = full
        return True

    def _register(self, sequence: Sequence) -> None:
        for view in sequence.views:
            while view.registered < view.full_blocks:
                self.blocks.register(view.table, view.registered, view.tokens, view.pools)
                view.registered += 1

    def _take(self, sequence: Sequence, answer: list[tuple[int, TokenLogprobs | None]]) -> None:
        """Append what was sampled, as long as it is what was drafted, and the first token that is not."""
        draft, sequence.draft = sequence.draft, []
        before, accepted = len(sequence.output), 0
        for index, (token, entry) in enumerate(answer):
            if token < 0:
                self.finish(sequence, "error", error=self._invalid(sequence))
                break
            sequence.append(token, entry)
            agrees = index < len(draft) and token == draft[index]
            accepted += agrees
            if agrees:
                for view in sequence.views:
                    view.computed += 1
            self._register(sequence)
            self._stop(sequence, token)
            if sequence.finished or not agrees:
                break
        for view in sequence.views:
            view.drafted = min(view.drafted, view.computed)  # beyond it are the keys of what was not accepted
        self.taken[sequence] = Taken(len(draft), accepted, len(sequence.output) - before)

    def _stop(self, sequence: Sequence, token: int) -> None:
        params = sequence.request.params
        if len(sequence.output) >= params.min_tokens:
            if token in self.eos and not params.ignore_eos:
                return self.finish(sequence, "stop", token)
            if params.stop_token_ids and token in params.stop_token_ids:
                return self.finish(sequence, "stop", token)
        longest = max(len(view.tokens) for view in sequence.views)
        if len(sequence.output) >= params.max_tokens or longest >= self.layout.max_model_len:
            return self.finish(sequence, "length")
        return None

    def _invalid(self, sequence: Sequence) -> str:
        return (
            f"no token could be sampled at position {len(sequence.views[0].tokens)}: the model's logits hold NaN or +inf, "
            "or every token is masked"
        )
