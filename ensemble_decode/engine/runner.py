"""The runner: one step's :class:`Batch` through every model group, and from hidden states to tokens.

Three ways lead from hidden states to a row's scores, the cheapest that fits is taken:

* all sides on the target's weights and head, and nobody asks for z: hidden states are combined before the head,
  W·(h + Σ α(h⁺ − h⁻)), one head product a row;
* both sides of a pair on one head: one product for their difference, W·(h⁺ − h⁻);
* otherwise each side has its own logits.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch

from ensemble_decode import ops
from ensemble_decode.engine.batch import (
    BLOCK_SIZE,
    Batch,
    Edits,
    SampleRow,
    ScoreRow,
    Span,
    Steering,
    StepOutput,
    TokenLogprobs,
)
from ensemble_decode.engine.lanes import PLACEMENTS, Lanes, Placement
from ensemble_decode.models.ensemble import Ensemble
from ensemble_decode.models.group import Group, Rows

#: Rows of full logits kept at a time while scoring: V = 50,000 in float32 is 0.2 MB a row.
_SCORE_ROWS = 128


@dataclass(slots=True)
class _Hidden:
    """Hidden states of one step: ``states[group]`` [R, E], and where each (span, pool)'s outputs begin in it."""

    states: list[torch.Tensor | None]
    first: dict[tuple[int, int], int]


class Runner:
    """Owns the KV pools of an ensemble and executes batches.

    Parameters
    ----------
    ensemble : Ensemble
    num_blocks : int
        KV blocks of 16 tokens in every pool.
    placement : {"auto", "sequential", "lanes"}
        Where groups run; "auto" measures both at start-up.
    """

    def __init__(self, ensemble: Ensemble, num_blocks: int, placement: Placement = "auto") -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}, allowed are {', '.join(map(repr, PLACEMENTS))}")
        self.ensemble = ensemble
        self.groups = ensemble.groups
        self.layout = ensemble.layout
        self.num_blocks = num_blocks
        self.timings: dict[str, float] = defaultdict(float)
        for group in self.groups:
            group.allocate(num_blocks)
        #: Seconds of one decode step by placement, as measured; empty where there was no choice.
        self.measured: dict[str, float] = {}
        self._lanes = Lanes(len(self.groups), "sequential")
        if len(self.groups) > 1 and placement != "sequential":
            self._place(placement)

    @property
    def placement(self) -> str:
        """The placement in use: "sequential" or "lanes"."""
        return self._lanes.placement

    def close(self) -> None:
        self._lanes.close()

    # ── placement ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _place(self, placement: Placement) -> None:
        parallel = Lanes(len(self.groups), "lanes")
        if placement == "auto":
            self.measured = {"sequential": self._measure(self._lanes), "lanes": self._measure(parallel)}
            if self.measured["sequential"] <= self.measured["lanes"]:
                parallel.close()
                return
        self._lanes = parallel

    def _measure(self, lanes: Lanes, rows: int = 4, rounds: int = 5) -> float:
        """Fastest of a few decode steps of ``rows`` sequences through every group, in seconds."""
        spans = [Span([0], 0, [0], tuple(range(self.layout.num_pools)), 1) for _ in range(rows)]
        best = float("inf")
        for _ in range(rounds):
            start = time.perf_counter()
            self._forward(spans, lanes)
            best = min(best, time.perf_counter() - start)
        return best

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────
    @torch.inference_mode()
    def execute(self, batch: Batch) -> StepOutput:
        """Compute every span, then sample and score. Rows come back in the batch's order."""
        # Our operators bring threads of their own. torch's are kept out of a step: after every parallel region an OpenMP
        # worker spins for a while, on the core that ours needs (measured: a step of 17 ms became one of 29).
        threads = torch.get_num_threads()
        if threads > 1:
            torch.set_num_threads(1)
        try:
            return self._execute(batch)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)

    def _execute(self, batch: Batch) -> StepOutput:
        start = time.perf_counter()
        if batch.copies:
            source, destination = (torch.tensor(x) for x in zip(*batch.copies, strict=True))
            for group in self.groups:
                group.copy_blocks(source, destination)
        hidden = self._forward(batch.spans, self._lanes)
        forwarded = time.perf_counter()
        self.timings["forward"] += forwarded - start
        output = self._sample(batch.samples, batch.spans, hidden)
        output.scores = [self._score(row, batch.spans[row.span], batch.spans, hidden) for row in batch.scores]
        self.timings["sample"] += time.perf_counter() - forwarded
        self.timings["steps"] += 1
        return output

    def _forward(self, spans: list[Span], lanes: Lanes) -> _Hidden:
        first: dict[tuple[int, int], int] = {}
        work: list[Callable[[], torch.Tensor] | None] = []
        for number, group in enumerate(self.groups):
            rows = self._rows(number, group, spans, first)
            work.append(None if rows is None else partial(group.forward, rows))
        return _Hidden(lanes.run(work), first)

    def _rows(self, number: int, group: Group, spans: list[Span], first: dict[tuple[int, int], int]) -> Rows | None:
        """Lay the spans that this group computes one after another, pool by pool."""
        tokens: list[int] = []
        positions: list[int] = []
        adapters: list[int] = []
        query_start, context_len, outputs = [0], list[int](), list[int]()
        tables: list[tuple[list[int], int]] = []
        all_outputs = True
        for pool_id, pool in enumerate(self.ensemble.pools):
            if pool.group != number:
                continue
            offset = pool.index * group.blocks_per_pool
            adapter = group.pool_adapters[pool.index]
            for index, span in enumerate(spans):
                if pool_id not in span.pools:
                    continue
                count = len(span.tokens)
                tokens += span.tokens
                if count == 1:
                    positions.append(span.start)
                    adapters.append(adapter)
                else:
                    positions += range(span.start, span.start + count)
                    adapters += [adapter] * count
                context_len.append(span.start + count)
                tables.append((span.block_table, offset))
                if span.outputs:
                    first[index, pool_id] = len(outputs)
                    outputs += range(len(tokens) - span.outputs, len(tokens))
                all_outputs &= span.outputs == count
                query_start.append(len(tokens))
        if not tokens:
            return None
        blocks = max(-(-length // BLOCK_SIZE) for length in context_len)
        table = np.zeros((len(tables), blocks), np.int32)
        for row, ((ids, offset), length) in enumerate(zip(tables, context_len, strict=True)):
            used = -(-length // BLOCK_SIZE)
            table[row, :used] = ids[:used]
            if offset:
                table[row, :used] += offset
        return Rows(
            torch.tensor(tokens),
            torch.tensor(positions),
            torch.tensor(adapters, dtype=torch.int32) if any(a >= 0 for a in adapters) else None,
            torch.tensor(query_start, dtype=torch.int32),
            torch.tensor(context_len, dtype=torch.int32),
            torch.from_numpy(table),
            None if all_outputs else torch.tensor(outputs),
        )

    # ── from hidden states to scores ────────────────────────────────────────────────────────────────────────────────
    def _combines_hidden(self, steering: Sequence[Steering]) -> bool:
        """Whether every side of ``steering`` runs on the target's weights, and so shares its head."""
        group = self.ensemble.pools[self.layout.target_pool].group
        for item in steering:
            pair = self.layout.pairs[item.pair]
            anti = self.layout.target_pool if pair.anti_expert_pool is None else pair.anti_expert_pool
            if self.ensemble.pools[pair.expert_pool].group != group or self.ensemble.pools[anti].group != group:
                return False
        return True

    def _states(self, hidden: _Hidden, keys: list[tuple[int, int]], offsets: list[int]) -> torch.Tensor:
        """Hidden states [len(keys), E] of outputs ``offsets`` of (span, pool) ``keys``, all of one group."""
        states = hidden.states[self.ensemble.pools[keys[0][1]].group]
        assert states is not None
        rows = [hidden.first[key] + offset for key, offset in zip(keys, offsets, strict=True)]
        if rows == list(range(rows[0], rows[0] + len(rows))):
            return states[rows[0] : rows[0] + len(rows)]
        return states[torch.tensor(rows)]

    def _sides(self, item: Steering, span: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(span, pool) of a pair's two sides; a pair without an anti-expert has the target there."""
        pair = self.layout.pairs[item.pair]
        if pair.anti_expert_pool is None:
            return (item.expert_span, pair.expert_pool), (span, self.layout.target_pool)
        return (item.expert_span, pair.expert_pool), (item.anti_expert_span, pair.anti_expert_pool)

    def _combined_hidden(
        self, hidden: _Hidden, spans: list[int], steering: list[tuple[Steering, ...]], offsets: list[int]
    ) -> torch.Tensor:
        """h + Σ α(h⁺ − h⁻) in float32, [rows, E] in the model's dtype; a difference that is not finite counts as 0."""
        h = self._states(hidden, [(span, self.layout.target_pool) for span in spans], offsets)
        by_pair: dict[int, list[tuple[int, Steering]]] = defaultdict(list)
        for row, items in enumerate(steering):
            for item in items:
                by_pair[item.pair].append((row, item))
        if not by_pair:
            return h
        dtype, h = h.dtype, h.float()
        for steered in by_pair.values():
            rows = [row for row, _ in steered]
            alpha = torch.tensor([item.alpha for _, item in steered]).unsqueeze(1)
            difference = self._difference(
                hidden, [self._sides(item, spans[row]) for row, item in steered], [offsets[r] for r in rows]
            )
            if len(rows) == len(spans):
                h = h + alpha * difference
            else:
                h = h.index_add(0, torch.tensor(rows), alpha * difference)
        return h.to(dtype)

    def _difference(
        self, hidden: _Hidden, sides: list[tuple[tuple[int, int], tuple[int, int]]], offsets: list[int]
    ) -> torch.Tensor:
        """h⁺ − h⁻ in float32, [rows, E]; 0 for a row in which it is not finite, as the contract has it for logits."""
        plus = self._states(hidden, [expert for expert, _ in sides], offsets)
        minus = self._states(hidden, [anti for _, anti in sides], offsets)
        difference = plus.float() - minus.float()
        return difference.masked_fill_(~difference.sum(1, keepdim=True).isfinite(), 0.0)

    def _scores(
        self, hidden: _Hidden, spans: list[int], steering: list[tuple[Steering, ...]], offsets: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """z [B, V], z⁺ and z⁻ [P, B, V] and α [B, P] of rows that need z; z⁻ is None where z⁺ holds differences."""
        size = self.layout.vocab_size
        target = self.ensemble.target
        z = target.logits(self._states(hidden, [(span, self.layout.target_pool) for span in spans], offsets))[:, :size]
        used = sorted({item.pair for items in steering for item in items})
        if not used:
            return z, None, None, None
        alpha = torch.zeros(len(spans), len(used))
        expert = torch.empty(len(used), len(spans), size)
        anti: torch.Tensor | None = None
        if all(self._own_heads(pair) for pair in used):
            anti = torch.empty_like(expert)
        for place, pair in enumerate(used):
            items = [(row, item) for row, row_items in enumerate(steering) for item in row_items if item.pair == pair]
            rows = torch.tensor([row for row, _ in items])
            alpha[rows, place] = torch.tensor([item.alpha for _, item in items])
            sides = [self._sides(item, spans[row]) for row, item in items]
            at = [offsets[row] for row, _ in items]
            if self._own_heads(pair):
                plus = self._side_logits(hidden, [side for side, _ in sides], at)
                minus = self._side_logits(hidden, [side for _, side in sides], at)
                if anti is None:
                    expert[place, rows] = plus - minus
                else:
                    expert[place, rows], anti[place, rows] = plus, minus
            else:
                group = self.groups[self.ensemble.pools[sides[0][0][1]].group]
                difference = self._difference(hidden, sides, at).to(group.dtype)
                expert[place, rows] = _without_bias(group, group.logits(difference))[:, :size]
        return z, expert, anti, alpha

    def _own_heads(self, index: int) -> bool:
        """Whether the two sides of a pair end in heads of their own."""
        pair, pools = self.layout.pairs[index], self.ensemble.pools
        anti = self.layout.target_pool if pair.anti_expert_pool is None else pair.anti_expert_pool
        return pools[pair.expert_pool].group != pools[anti].group

    def _side_logits(self, hidden: _Hidden, keys: list[tuple[int, int]], offsets: list[int]) -> torch.Tensor:
        group = self.groups[self.ensemble.pools[keys[0][1]].group]
        return group.logits(self._states(hidden, keys, offsets))[:, : self.layout.vocab_size]

    # ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────
    def _sample(self, rows: list[SampleRow], spans: list[Span], hidden: _Hidden) -> StepOutput:
        output = StepOutput([-1] * len(rows), [None] * len(rows))
        plain: list[int] = []  # the combination is all that anyone asks for
        whole: list[int] = []  # z is needed by itself
        for index, row in enumerate(rows):
            needs_target = row.steering and (row.nucleus == "target" or row.logprobs >= 0)
            (whole if needs_target or not self._combines_hidden(row.steering) else plain).append(index)
        for indices, combine in ((plain, True), (whole, False)):
            # Two samplers for the two nuclei: one call each, since "nucleus" is not a parameter of a row.
            for nucleus, part in itertools.groupby(
                sorted(indices, key=lambda i: rows[i].nucleus), lambda i: rows[i].nucleus
            ):
                self._sample_part(rows, list(part), nucleus, combine, spans, hidden, output)
        return output

    def _sample_part(
        self,
        rows: list[SampleRow],
        indices: list[int],
        nucleus: Literal["combined", "target"],
        combine: bool,
        spans: list[Span],
        hidden: _Hidden,
        output: StepOutput,
    ) -> None:
        part = [rows[i] for i in indices]
        at, steering, offsets = (
            [row.span for row in part],
            [row.steering for row in part],
            [spans[row.span].outputs - 1 for row in part],
        )
        expert = anti = alpha = None
        if combine:
            z = self.ensemble.target.logits(self._combined_hidden(hidden, at, steering, offsets))[
                :, : self.layout.vocab_size
            ]
        else:
            z, expert, anti, alpha = self._scores(hidden, at, steering, offsets)
        target = z
        combined = combine and any(steering)
        if any(row.edits is not None for row in part):
            z = z.clone() if expert is None else ops.combine(z, expert, anti, alpha)
            _apply_edits(z, [row.edits for row in part])
            if expert is not None and nucleus == "target":
                # The kept set is the target's, the scores are the edited combination: hand over their difference.
                # A banned token's difference is not finite and would count as 0, so z itself is banned.
                expert, anti, alpha = (z - target).unsqueeze(0), None, torch.ones(len(part), 1)
                z = target.masked_fill(z == float("-inf"), float("-inf"))
            elif expert is not None:
                expert = anti = alpha = None
                combined = True
        temperature = torch.tensor([row.temperature for row in part])
        sampled = ops.ensemble_sample(
            z,
            expert,
            anti,
            alpha=alpha,
            temperature=temperature,
            top_k=torch.tensor([row.top_k for row in part], dtype=torch.int32),
            top_p=torch.tensor([row.top_p for row in part]),
            min_p=torch.tensor([row.min_p for row in part]),
            seed=torch.tensor([row.seed for row in part]),
            position=torch.tensor([row.position for row in part]),
            nucleus=nucleus,
            target_is_combined=combined,
        )
        tokens = sampled.token.tolist()
        for place, index in enumerate(indices):
            output.tokens[index] = tokens[place]
        wanted = [place for place, row in enumerate(part) if row.logprobs >= 0]
        if wanted:
            pick = torch.tensor(wanted)
            scores = (z if expert is None else ops.combine(z, expert, anti, alpha))[pick]
            heat = torch.where(temperature[pick] > 0, temperature[pick], 1.0).unsqueeze(1)
            entries = _logprobs(
                scores / heat, target[pick] / heat, [tokens[p] for p in wanted], [part[p].logprobs for p in wanted]
            )
            for place, entry in zip(wanted, entries, strict=True):
                output.logprobs[indices[place]] = entry

    # ── scoring ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _score(self, row: ScoreRow, span: Span, spans: list[Span], hidden: _Hidden) -> list[TokenLogprobs]:
        """Log-probabilities of ``row.tokens``, a slab of rows at a time, so that memory stays bounded."""
        out: list[TokenLogprobs] = []
        for start in range(0, len(row.tokens), _SCORE_ROWS):
            tokens = row.tokens[start : start + _SCORE_ROWS]
            offsets = list(range(start, start + len(tokens)))
            z, expert, anti, alpha = self._scores(
                hidden, [row.span] * len(tokens), [row.steering] * len(tokens), offsets
            )
            combined = z if expert is None else ops.combine(z, expert, anti, alpha)
            out += _logprobs(combined, z, tokens, [row.logprobs] * len(tokens))
        return out


def _without_bias(group: Group, logits: torch.Tensor) -> torch.Tensor:
    """A head's bias cancels in a difference of two logits, but W·(h⁺ − h⁻) + b has it."""
    return logits if group.head.bias is None else logits - group.head.bias.float()


def _apply_edits(scores: torch.Tensor, edits: list[Edits | None]) -> None:
    """Change combined scores [B, V] in place: logit bias, bans, then penalties (vLLM's order and formulas)."""
    for row, edit in zip(scores, edits, strict=True):
        if edit is None:
            continue
        if edit.bias:
            row[torch.tensor(list(edit.bias))] += torch.tensor(list(edit.bias.values()))
        if edit.banned:
            row[torch.tensor(edit.banned)] = float("-inf")
        if edit.repetition_penalty != 1.0 and edit.seen:
            seen = torch.tensor(edit.seen)
            values = row[seen]
            row[seen] = torch.where(values > 0, values / edit.repetition_penalty, values * edit.repetition_penalty)
        if edit.counts and (edit.presence_penalty or edit.frequency_penalty):
            counted = torch.tensor(list(edit.counts))
            counts = torch.tensor(list(edit.counts.values()), dtype=torch.float32)
            row[counted] -= edit.frequency_penalty * counts + edit.presence_penalty


def _logprobs(combined: torch.Tensor, target: torch.Tensor, tokens: list[int], best: list[int]) -> list[TokenLogprobs]:
    """Log-probabilities of ``tokens`` and of the best of each row, under the ensemble and under the target alone."""
    ensemble = combined.log_softmax(-1)
    alone = ensemble if combined is target else target.log_softmax(-1)
    token = torch.tensor(tokens).clamp_min(0).unsqueeze(1)
    own = ensemble.gather(1, token)
    ranks = ((ensemble > own).sum(1) + 1).tolist()
    own_target = alone.gather(1, token).squeeze(1).tolist()
    own_list = own.squeeze(1).tolist()
    k = min(max(best), ensemble.shape[1])
    values, ids = ensemble.topk(k, dim=-1)
    values_list, ids_list, target_list = values.tolist(), ids.tolist(), alone.gather(1, ids).tolist()
    return [
        TokenLogprobs(
            tokens[i],
            own_list[i],
            own_target[i],
            ranks[i],
            [(ids_list[i][j], values_list[i][j], target_list[i][j], j + 1) for j in range(min(best[i], k))],
        )
        for i in range(len(tokens))
    ]
