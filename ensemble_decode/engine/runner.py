"""The runner: one step's :class:`Batch` through every model group, then on to combination and sampling."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ensemble_decode import ops
from ensemble_decode.engine.batch import BLOCK_SIZE, Batch, Span, Steering, StepOutput
from ensemble_decode.engine.combination import Combination, Hidden
from ensemble_decode.engine.device import Device, StreamDevice, device_of
from ensemble_decode.engine.graphs import DecodeGraphs
from ensemble_decode.engine.lanes import PLACEMENTS, Lanes, Placement, StreamLanes
from ensemble_decode.engine.plan import MAIN
from ensemble_decode.engine.sampling import SCORE_ROWS, Sampler
from ensemble_decode.engine.sweep import logprobs_at
from ensemble_decode.models.ensemble import Ensemble
from ensemble_decode.models.group import Group, Rows

#: Placements are measured at steps of so many rows, each so often: one row is bound by reading weights, eight by arithmetic
#: nearly. A group's share of the cores fits one model better than another, so lanes must be clearly faster.
_PLACED_ROWS, _PLACING_ROUNDS, _LANES_GAIN = (1, 8), 4, 0.95


class Runner:
    """Owns the KV pools of an ensemble and executes batches.

    Parameters
    ----------
    ensemble : Ensemble
    num_blocks : int
        KV blocks of 16 tokens in every pool.
    placement : {"auto", "sequential", "lanes"}
        Where groups run; "auto" measures both at start-up.
    device : Device, optional
        What drives the device that the weights lie on; None: chosen by it.
    graphs : bool
        Whether decode steps are captured and replayed where the device can.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        num_blocks: int,
        placement: Placement = "auto",
        *,
        device: Device | None = None,
        graphs: bool = True,
    ) -> None:
        if placement not in PLACEMENTS:
            raise ValueError(f"placement is {placement!r}, allowed are {', '.join(map(repr, PLACEMENTS))}")
        self.ensemble = ensemble
        self.groups = ensemble.groups
        self.layout = ensemble.layout
        self.num_blocks = num_blocks
        self.timings: dict[str, float] = defaultdict(float)
        for group in self.groups:
            group.allocate(num_blocks + 1)  # the last block is nobody's: a captured step's padding writes there
        self.device: Device = device_of(self.groups[0].k_cache[0]) if device is None else device
        #: Seconds of decode steps by placement, as measured; empty where there was no choice.
        self.measured: dict[str, float] = {}
        self._sampler = Sampler(Combination(ensemble, self.device.upload), self.device.upload)
        self.device.synchronize()  # weights and pools were made on another stream than those of the steps
        self._lanes = self._new_lanes("sequential")
        if len(self.groups) > 1 and placement != "sequential":
            self._place(placement)
        self.graphs = self._new_graphs() if graphs else None

    @property
    def placement(self) -> str:
        """The placement in use: "sequential" or "lanes"."""
        return self._lanes.placement

    def close(self) -> None:
        self._lanes.close()

    # ── placement ───────────────────────────────────────────────────────────────────────────────────────────────────
    def _new_lanes(self, placement: Literal["sequential", "lanes"]) -> Lanes | StreamLanes:
        if not isinstance(self.device, StreamDevice):
            return Lanes(len(self.groups), placement)
        main_group = self.ensemble.pools[self.layout.target_pool].group
        return StreamLanes(self.device, len(self.groups), main_group, placement)

    def _new_graphs(self) -> DecodeGraphs | None:
        if not (isinstance(self.device, StreamDevice) and isinstance(self._lanes, StreamLanes)):
            return None
        return DecodeGraphs(self.ensemble, self.device, self._lanes, self.num_blocks)

    def _place(self, placement: Placement) -> None:
        parallel = self._new_lanes("lanes")
        if placement == "auto":
            self.measured = self._measure({"sequential": self._lanes, "lanes": parallel})
            if self.measured["lanes"] > _LANES_GAIN * self.measured["sequential"]:
                parallel.close()
                return
        self._lanes = parallel

    def _measure(self, placements: dict[str, Lanes | StreamLanes]) -> dict[str, float]:
        """Seconds of decode steps through every group: the fastest of a few of each size, turn by turn, summed over sizes."""
        members = self.layout.member_pools
        found = dict.fromkeys(placements, 0.0)
        for rows in _PLACED_ROWS:
            spans = [Span([0], 0, [0], members, 1) for _ in range(rows)]
            best = dict.fromkeys(placements, float("inf"))
            for _ in range(_PLACING_ROUNDS):
                for name, lanes in placements.items():
                    start = time.perf_counter()
                    with self.device.on(MAIN):
                        self._forward(spans, lanes)
                    self.device.synchronize()
                    best[name] = min(best[name], time.perf_counter() - start)
            for name, seconds in best.items():
                found[name] += seconds
        return found

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
            with self.device.on(MAIN):
                return self._execute(batch)
        finally:
            if threads > 1:
                torch.set_num_threads(threads)

    def _execute(self, batch: Batch) -> StepOutput:
        start = time.perf_counter()
        if batch.copies:
            source, destination = (self.device.upload(x, dtype=torch.int64) for x in zip(*batch.copies, strict=True))
            for group in self.groups:
                group.copy_blocks(source, destination)
        if self.graphs is not None and (tokens := self.graphs.run(batch)) is not None:
            self.timings["forward"] += time.perf_counter() - start
            self.timings["steps"] += 1
            return StepOutput(tokens, [None] * len(tokens))
        hidden = self._forward(batch.spans, self._lanes)
        forwarded = time.perf_counter()
        self.timings["forward"] += forwarded - start
        output = self._sampler.sample(batch.samples, batch.spans, hidden)
        output.scores = [self._sampler.score(row, batch.spans[row.span], batch.spans, hidden) for row in batch.scores]
        self.timings["sample"] += time.perf_counter() - forwarded
        self.timings["steps"] += 1
        return output

    @torch.inference_mode()
    def parts(self, spans: list[Span], steering: tuple[Steering, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the target and each pair say at the outputs of the first span: the scores before they are combined.

        Every span computes as many outputs as the first one, or none; without outputs this only fills the cache.

        Returns
        -------
        z : float32 [T, V]
        differences : float32 [P, T, V]
            z⁺ − z⁻ of ``steering``'s pairs in the order of their indices; 0 where it is not finite.
        """
        with self.device.on(MAIN):
            hidden = self._forward(spans, self._lanes)
            count = spans[0].outputs
            size = self.layout.vocab_size
            if count == 0:
                return torch.empty(0, size), torch.empty(len(steering), 0, size)
            z, expert, anti, _ = self._sampler.combination.scores(
                hidden, [0] * count, [steering] * count, list(range(count))
            )
            if expert is None:
                return z.float(), z.new_empty(0, count, size, dtype=torch.float32)
            difference = expert if anti is None else expert - anti
            return z.float(), torch.where(difference.isfinite(), difference, 0.0)

    @torch.inference_mode()
    def combined(self, spans: list[Span], rows: Sequence[tuple[int, tuple[Steering, ...]]]) -> torch.Tensor:
        """Combined scores at the first output of each row's span, float32 [rows, V]."""
        with self.device.on(MAIN):
            hidden = self._forward(spans, self._lanes)
            z, expert, anti, alpha = self._sampler.combination.scores(
                hidden, [span for span, _ in rows], [steering for _, steering in rows], [0] * len(rows)
            )
            return z.float() if expert is None else ops.combine(z, expert, anti, alpha)

    @torch.inference_mode()
    def sweep(
        self, spans: list[Span], targets: list[list[int]], pairs: tuple[int, ...], alphas: torch.Tensor
    ) -> list[NDArray[np.float32]]:
        """Log-probabilities of ``targets`` at all outputs of the spans, under several α at once.

        Parameters
        ----------
        spans : list of Span
            Of view 0, each of another sequence; all their tokens are outputs.
        targets : list of list of int
            The token that follows each token of each span.
        pairs : tuple of int
            Indices in ``Layout.pairs``, ascending.
        alphas : float32 [K, P]

        Returns
        -------
        list of float32 array [K, tokens of the span]
        """
        threads = torch.get_num_threads()
        with self.device.on(MAIN):
            torch.set_num_threads(1)  # as in a step: our operators bring threads of their own
            try:
                hidden = self._forward(spans, self._lanes)
            finally:
                torch.set_num_threads(threads)
            rows = [(span, offset) for span, listed in enumerate(targets) for offset in range(len(listed))]
            steering = [tuple(Steering(pair, 1.0, span, span) for pair in pairs) for span in range(len(spans))]
            tokens = self.device.upload([token for listed in targets for token in listed], dtype=torch.int64)
            found = []
            for start in range(0, len(rows), SCORE_ROWS):
                at, offsets = (list(part) for part in zip(*rows[start : start + SCORE_ROWS], strict=True))
                z, expert, anti, _ = self._sampler.combination.scores(hidden, at, [steering[s] for s in at], offsets)
                change = z.new_empty(0, *z.shape) if expert is None else expert if anti is None else expert - anti
                change = torch.where(change.isfinite(), change, 0.0)
                found.append(logprobs_at(z.float(), change, alphas, tokens[start : start + len(at)]).cpu())
        return [part.numpy() for part in torch.cat(found, 1).split([len(listed) for listed in targets], 1)]

    def _forward(self, spans: list[Span], lanes: Lanes | StreamLanes) -> Hidden:
        first: dict[tuple[int, int], int] = {}
        work: list[Callable[[], torch.Tensor] | None] = []
        for number, group in enumerate(self.groups):
            rows = self._rows(number, group, spans, first)
            work.append(None if rows is None else partial(group.forward, rows))
        return Hidden(lanes.run(work), first)

    def _rows(self, number: int, group: Group, spans: list[Span], first: dict[tuple[int, int], int]) -> Rows | None:
        """Lay the spans that this group computes one after another, pool by pool."""
        tokens: list[int] = []
        positions: list[int] = []
        adapters: list[int] = []
        query_start, context_len, outputs = [0], list[int](), list[int]()
        tables: list[tuple[int, int]] = []  # span, and where its pool's blocks begin
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
                tables.append((index, offset))
                if span.outputs:
                    first[index, pool_id] = len(outputs)
                    outputs += range(len(tokens) - span.outputs, len(tokens))
                all_outputs &= span.outputs == count
                query_start.append(len(tokens))
        if not tokens:
            return None
        used = [-(-length // BLOCK_SIZE) for length in context_len]
        table = np.zeros((len(tables), max(used)), np.int32)
        ids: dict[int, NDArray[np.int32]] = {}  # of a span, which its pools share: a list becomes an array once
        for row, ((index, offset), count) in enumerate(zip(tables, used, strict=True)):
            if index not in ids:
                ids[index] = np.array(spans[index].block_table[:count], np.int32)
            np.add(ids[index], offset, out=table[row, :count])
        upload = self.device.upload
        return Rows(
            upload(tokens, dtype=torch.int64),
            upload(positions, dtype=torch.int64),
            upload(adapters, dtype=torch.int32) if any(a >= 0 for a in adapters) else None,
            upload(query_start, dtype=torch.int32),
            upload(context_len, dtype=torch.int32),
            upload(table, dtype=torch.int32),
            None if all_outputs else upload(outputs, dtype=torch.int64),
        )
