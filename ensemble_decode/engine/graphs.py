"""Decode steps captured once and replayed: static buffers, filled on the host, copied in one piece.

What a captured step holds is planned in ``engine/plan.py``. The arithmetic of a row is that of the eager path
(``combination``, ``sampling``), operation for operation, so that a row's bits do not tell which path it took.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ensemble_decode import ops
from ensemble_decode.engine.batch import BLOCK_SIZE, Batch, SampleRow, Span
from ensemble_decode.engine.combination import Combination, difference
from ensemble_decode.engine.device import StreamDevice
from ensemble_decode.engine.lanes import StreamLanes
from ensemble_decode.engine.plan import (
    MAIN,
    ROWS,
    Bucket,
    Member,
    StepPlan,
    bucket_of,
    sides,
    step_plan,
    takes_logits,
    target,
    widths,
)
from ensemble_decode.models.ensemble import Ensemble
from ensemble_decode.models.group import Rows

#: Captured steps that are kept. A batch that would need one more takes the eager path.
MAX_GRAPHS = 128


class DecodeGraphs:
    """The captured decode steps of a runner.

    Parameters
    ----------
    ensemble : Ensemble
        Its groups' pools hold one block more than ``scratch``: padding writes there.
    device : StreamDevice
    lanes : StreamLanes
        Where the groups run inside a step.
    scratch : int
        The block of every pool that no sequence owns.
    """

    def __init__(self, ensemble: Ensemble, device: StreamDevice, lanes: StreamLanes, scratch: int) -> None:
        self.ensemble = ensemble
        self.device = device
        self.lanes = lanes
        self.scratch = scratch
        self.combination = Combination(ensemble, device.upload)
        self.steps: dict[Bucket, CapturedStep] = {}
        self.replays = 0
        layout, pools = ensemble.layout, ensemble.pools
        self._pool_groups = tuple(pool.group for pool in pools)
        self._blocks = widths(layout.max_model_len)
        main = pools[layout.target_pool].group
        #: Whether a pair can be combined before the target's head.
        self.joins = tuple(
            all(pools[member.pool].group == main for member in sides(layout, pair)) for pair in range(len(layout.pairs))
        )

    def bucket(self, batch: Batch) -> Bucket | None:
        """The bucket that serves ``batch``, None for the eager path."""
        return bucket_of(batch, self.joins, ROWS, self._blocks)

    def run(self, batch: Batch) -> list[int] | None:
        """The tokens of ``batch``, one a sample row; None if it is not one for a graph."""
        bucket = self.bucket(batch)
        if bucket is None:
            return None
        step = self.steps.get(bucket)
        if step is None:
            if len(self.steps) >= MAX_GRAPHS:
                return None
            plan = step_plan(self.ensemble.layout, self._pool_groups, self.lanes.streams, bucket)
            step = self.steps[bucket] = CapturedStep(self, plan)
        self.replays += 1
        return step.run(batch)


class CapturedStep:
    """One bucket's graph with its buffers. Everything that a replay touches is allocated before the capture."""

    def __init__(self, graphs: DecodeGraphs, plan: StepPlan) -> None:
        self.plan = plan
        self._ensemble, self._device, self._lanes = graphs.ensemble, graphs.device, graphs.lanes
        self._combination = graphs.combination
        device, bucket = graphs.device, plan.bucket
        self._buffer = device.buffer((plan.input_bytes,), torch.uint8)
        self.inputs = {f.name: _view(self._buffer, f.offset, f.end, f.dtype, f.shape) for f in plan.fields}
        self._host = HostInputs(graphs, plan, (device.pinned(plan.input_bytes), device.pinned(plan.input_bytes)))
        self._rows: dict[int, Rows] = {}
        self._hidden: dict[int, torch.Tensor] = {}
        for group_plan in plan.groups:
            group = self._ensemble.groups[group_plan.group]
            number, count = group_plan.group, len(group_plan.members) * bucket.rows
            of_member = [group.pool_adapters[self._ensemble.pools[m.pool].index] for m in group_plan.members]
            adapters = [adapter for adapter in of_member for _ in range(bucket.rows)]
            self._rows[number] = Rows(
                self.inputs[f"tokens {number}"],
                self.inputs[f"positions {number}"],
                device.upload(adapters, dtype=torch.int32) if max(of_member) >= 0 else None,
                device.upload(range(count + 1), dtype=torch.int32),
                self.inputs[f"context_len {number}"],
                self.inputs[f"block_table {number}"],
                None,
            )
            # What crosses from a side stream to the main one has a place of its own.
            self._hidden[number] = device.buffer((count, group.head.in_features), group.dtype)
        self._tokens = device.buffer((bucket.rows,), torch.int64)
        self._read = device.pinned(bucket.rows * 8).view(torch.int64)
        self._done = device.event()
        self._functions = [
            partial(self._forward, number) if number in self._rows else None
            for number in range(len(self._ensemble.groups))
        ]
        # Until it is filled, every row is padding: the capture's own runs write to the scratch block.
        device.copy_async(self._buffer, self._host.memory)
        device.synchronize()  # the same memory is filled next
        self._graph: Any = device.capture(self._step)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def run(self, batch: Batch) -> list[int]:
        """Fill, copy, replay; while the device computes, the host makes the next step's inputs; then read back."""
        self._host.fill(batch)
        self._device.copy_async(self._buffer, self._host.memory)
        self._device.replay(self._graph)
        self._device.copy_async(self._read, self._tokens)
        self._device.record(self._done, MAIN)
        self._host.advance()
        self._device.finish(self._done)
        return self._read[: len(batch.samples)].tolist()

    # ── what is captured ────────────────────────────────────────────────────────────────────────────────────────────
    def _step(self) -> None:
        self._lanes.carry_out(self.plan.operations, self._functions)
        self._sample()

    def _forward(self, number: int) -> None:
        self._hidden[number].copy_(self._ensemble.groups[number].forward(self._rows[number]))

    def _states(self, member: Member) -> torch.Tensor:
        group, first = self.plan.place(member)
        return self._hidden[group][first : first + self.plan.bucket.rows]

    def _sample(self) -> None:
        bucket, layout, inputs = self.plan.bucket, self._ensemble.layout, self.inputs
        h = self._states(target(layout))
        if bucket.hidden:
            combined = h.float()
            for place, pair in enumerate(bucket.hidden):
                plus, minus = sides(layout, pair)
                alpha = inputs["alpha hidden"][:, place : place + 1]
                combined = combined + alpha * difference(self._states(plus), self._states(minus))
            h = combined.to(h.dtype)
        expert, anti = self._experts()
        sampled = ops.ensemble_sample(
            self._ensemble.target.logits(h)[:, : layout.vocab_size],
            expert,
            anti,
            alpha=None if expert is None else inputs["alpha logits"],
            temperature=inputs["temperature"],
            top_k=inputs["top_k"],
            top_p=inputs["top_p"],
            min_p=inputs["min_p"],
            seed=inputs["seed"],
            position=inputs["position"],
            nucleus=bucket.nucleus,
            target_is_combined=bool(bucket.hidden) and expert is None,
        )
        self._tokens.copy_(sampled.token)

    def _experts(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """z⁺ and z⁻ [P, B, V] of the pairs that steer by logits; z⁻ is None where z⁺ holds differences."""
        plus_logits, minus_logits = list[torch.Tensor](), list[torch.Tensor]()
        apart = all(self._combination.own_heads(pair) for pair in self.plan.bucket.logits)
        for pair in self.plan.bucket.logits:
            plus, minus = sides(self._ensemble.layout, pair)
            z_plus, z_minus = self._combination.pair_logits(pair, self._states(plus), self._states(minus), apart)
            plus_logits.append(z_plus)
            if z_minus is not None:
                minus_logits.append(z_minus)
        if not plus_logits:
            return None, None
        return _stack(plus_logits), _stack(minus_logits) if minus_logits else None


@dataclass(slots=True)
class _Place:
    """What a member's place in a row holds: the position of the new token, and the blocks up to it."""

    start: int
    blocks: list[int]


class HostInputs:
    """A step's inputs on the host, laid out like the device's buffer, in two pinned memories by turns.

    Rows stay in their places from step to step as a rule. So :meth:`advance` makes the next step's inputs in the other
    memory while the device still computes (and may still read this one), every row moved on by one token;
    :meth:`fill` then writes the tokens, and corrects the rows that went another way.
    """

    def __init__(self, graphs: DecodeGraphs, plan: StepPlan, memories: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.plan = plan
        self._memories = memories
        self._turn = 0
        self._fields = [
            {f.name: memory.numpy()[f.offset : f.end].view(f.dtype).reshape(f.shape) for f in plan.fields}
            for memory in memories
        ]
        self._joins = graphs.joins
        pools, layout = graphs.ensemble.pools, graphs.ensemble.layout
        self._target = target(layout)
        self._sides = [sides(layout, pair) for pair in range(len(layout.pairs))]
        #: By member: its group, its first row in it, the block number at which its pool begins.
        self._places: dict[Member, tuple[int, int, int]] = {}
        for group_plan in plan.groups:
            group = graphs.ensemble.groups[group_plan.group]
            for member in group_plan.members:
                offset = pools[member.pool].index * group.blocks_per_pool
                self._places[member] = (*plan.place(member), offset)
        self._scratch = graphs.scratch
        #: What each row's places hold: its parameters (none: padding), and its members'.
        self._known: list[dict[Member, _Place]] = [{} for _ in range(plan.bucket.rows)]
        self._parameters: list[tuple] = [()] * plan.bucket.rows
        for row in range(plan.bucket.rows):
            self._clear(row)

    @property
    def memory(self) -> torch.Tensor:
        """The pinned memory whose turn it is."""
        return self._memories[self._turn]

    @property
    def fields(self) -> dict[str, np.ndarray]:
        return self._fields[self._turn]

    def fill(self, batch: Batch) -> None:
        """Write the rows of ``batch``; those behind them are padding."""
        for row, sample in enumerate(batch.samples):
            self._fill_row(row, sample, batch.spans)
        for row in range(len(batch.samples), self.plan.bucket.rows):
            if self._parameters[row]:
                self._clear(row)

    def advance(self) -> None:
        """Make the next step's inputs, but for the tokens, as they are if every row goes on by one token."""
        before, self._turn = self.memory, 1 - self._turn
        self.memory.numpy()[:] = before.numpy()
        for row, known in enumerate(self._known):
            for member, place in known.items():
                place.start += 1
                self._write_start(row, member, place.start)

    def _write_start(self, row: int, member: Member, start: int) -> None:
        group, first, _ = self._places[member]
        self.fields[f"positions {group}"][first + row] = start
        self.fields[f"context_len {group}"][first + row] = start + 1

    def _fill_row(self, row: int, sample: SampleRow, spans: list[Span]) -> None:
        fields = self.fields
        fields["position"][row] = sample.position
        span_of = {self._target: spans[sample.span]}
        for item in sample.steering:
            plus, minus = self._sides[item.pair]
            span_of[plus] = spans[item.expert_span]
            if minus != self._target:
                span_of[minus] = spans[item.anti_expert_span]
        for member in self._known[row].keys() - span_of.keys():
            self._clear_member(row, member)
        for member, span in span_of.items():
            self._fill_member(row, member, span)
        parameters = (
            sample.temperature,
            sample.top_k,
            sample.top_p,
            sample.min_p,
            sample.seed,
            tuple((item.pair, item.alpha) for item in sample.steering),
            takes_logits(sample, self._joins),
        )
        if parameters == self._parameters[row]:
            return
        self._parameters[row] = parameters
        for name, value in zip(("temperature", "top_k", "top_p", "min_p", "seed"), parameters, strict=False):
            fields[name][row] = value
        fields["alpha hidden"][row] = 0.0
        fields["alpha logits"][row] = 0.0
        if takes_logits(sample, self._joins):
            name, pairs = "alpha logits", self.plan.bucket.logits
        else:
            name, pairs = "alpha hidden", self.plan.bucket.hidden
        for item in sample.steering:
            fields[name][row, pairs.index(item.pair)] = item.alpha

    def _fill_member(self, row: int, member: Member, span: Span) -> None:
        group, first, offset = self._places[member]
        fields = self.fields
        fields[f"tokens {group}"][first + row] = span.tokens[0]
        place = self._known[row].get(member)
        if place is None:
            place = self._known[row][member] = _Place(-1, [])
        if place.start != span.start:
            place.start = span.start
            self._write_start(row, member, span.start)
        used = -(-(span.start + 1) // BLOCK_SIZE)
        blocks = span.block_table[:used]
        if place.blocks != blocks:
            same = len(place.blocks) if blocks[: len(place.blocks)] == place.blocks else 0
            table = fields[f"block_table {group}"][first + row]
            table[same:used] = blocks[same:]
            table[same:used] += offset
            place.blocks = blocks

    def _clear(self, row: int) -> None:
        """Make a row padding: one token at the beginning of the scratch block, greedy, no pair."""
        for member in self._places:
            self._clear_member(row, member)
        self._parameters[row] = ()
        for name in ("temperature", "top_k", "min_p", "seed", "position", "alpha hidden", "alpha logits"):
            self.fields[name][row] = 0
        self.fields["top_p"][row] = 1.0

    def _clear_member(self, row: int, member: Member) -> None:
        group, first, offset = self._places[member]
        at, fields = first + row, self.fields
        fields[f"tokens {group}"][at] = 0
        fields[f"positions {group}"][at] = 0
        fields[f"context_len {group}"][at] = 1
        fields[f"block_table {group}"][at, 0] = self._scratch + offset
        self._known[row].pop(member, None)


def _view(buffer: torch.Tensor, start: int, end: int, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return buffer[start:end].view(getattr(torch, dtype)).view(shape)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """[P, B, V]; one pair is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
