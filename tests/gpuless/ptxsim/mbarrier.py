"""mbarrier: barriers in shared memory, whose phases asynchronous operations complete.

That their initialisation must be published to the asynchronous proxy is not checked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute
from tests.gpuless.ptxsim.memory import SharedMemory
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError

_NAME = re.compile(r"mbarrier\.(init|inval|(?:try|test)_wait\.parity)(?:\.shared(?:::cta)?)\.b64")


@dataclass(slots=True)
class MBarrier:
    """One barrier: arrivals that make a phase, those that are missing, and what arrivals of either phase published."""

    count: int
    pending: int
    arrived: Array
    completed: Array = field(init=False)
    phase: int = 0

    def __post_init__(self) -> None:
        self.completed = self.arrived.copy()

    def arrive(self, known: Array) -> None:
        """One arrival, which publishes ``known``."""
        np.maximum(self.arrived, known, out=self.arrived)
        self.pending -= 1
        if not self.pending:
            self.completed, self.arrived = self.arrived, np.zeros_like(self.arrived)
            self.pending, self.phase = self.count, self.phase + 1


class MBarriers:
    """Decodes mbarrier for one launch."""

    def __init__(self, registers: Registers, shared: SharedMemory) -> None:
        self.registers, self.shared, self.clocks = registers, shared, shared.races.clocks
        self.live: dict[tuple[int, int], MBarrier] = {}

    def _access(self, address: Array, threads: Array, warp: Array, store: bool) -> list[tuple[int, int]]:
        """CTA and offset of each, after the checks of an ordinary access by ``warp``."""
        cta, offset = self.shared.place(address & np.uint64(0xFFFFFFFF), 8, threads, "mbarrier", cluster=False)
        first = (cta * self.shared.stride + offset) // self.shared.granule
        places = first[:, None] + np.arange(8 // self.shared.granule)
        if self.shared.copied_to[places].any():
            raise PtxError("mbarrier where a cp.async is under way: its thread has not waited for it")
        warps = np.repeat(warp, places.shape[1])
        if store:
            self.shared.races.store(places.ravel(), warps, np.ones(places.size, bool))
        else:
            self.shared.races.load(places.ravel(), warps)
        return list(zip(cta.tolist(), offset.tolist(), strict=True))

    def _mark(self, place: tuple[int, int], live: bool) -> None:
        """Between init and inval nobody else may touch the eight bytes; afterwards they hold nothing."""
        first = (place[0] * self.shared.stride + place[1]) // self.shared.granule
        own = slice(first, first + 8 // self.shared.granule)
        self.shared.mbarrier[own], self.shared.written[own] = live, False
        self.shared.mbarriers = True

    def _find(self, place: tuple[int, int]) -> MBarrier:
        if place not in self.live:
            raise PtxError(f"mbarrier at byte {place[1]} of shared memory: not initialised")
        return self.live[place]

    def decode(self, ins: Instruction) -> Execute:
        """mbarrier.init, inval, try_wait and test_wait (which never suspend here: their loop goes round)."""
        found = _NAME.fullmatch(ins.name)
        if found is None:
            raise PtxError(f"{ins.name}: not simulated")
        action = {"init": self._init, "inval": self._invalidate}.get(found[1], self._wait)
        return action(ins)

    def _init(self, ins: Instruction) -> Execute:
        address, read = self.registers.address(ins.operands[0]), self.registers.reader(ins.operands[1], "u32")

        def execute(sel: Selection) -> None:
            counts = np.broadcast_to(read(sel), (sel.size,)).tolist()
            places = self._access(address(sel), sel.threads, self.shared.warp[sel.threads], True)
            for place, count in zip(places, counts, strict=True):
                if place in self.live:
                    raise PtxError("mbarrier.init of a live mbarrier")
                self.live[place] = MBarrier(count, count, np.zeros_like(self.clocks.both[0]))
                self._mark(place, True)

        return execute

    def _invalidate(self, ins: Instruction) -> Execute:
        address = self.registers.address(ins.operands[0])

        def execute(sel: Selection) -> None:
            for place in self._access(address(sel), sel.threads, self.shared.warp[sel.threads], True):
                self._find(place)
                del self.live[place]
                self._mark(place, False)

        return execute

    def _wait(self, ins: Instruction) -> Execute:
        """Is the phase of that parity complete? Whoever learns it knows what was published by those that completed it."""
        write, address = self.registers.writer(ins.operands[0]), self.registers.address(ins.operands[1])
        parity = self.registers.reader(ins.operands[2], "u32")

        def execute(sel: Selection) -> None:
            warp, wanted = self.shared.warp[sel.threads], np.broadcast_to(parity(sel), (sel.size,)) & 1
            places = self._access(address(sel), sel.threads, warp, False)
            over = np.array([self._find(place).phase for place in places]) & 1 != wanted
            for one, place in {(w, p) for w, p, passes in zip(warp.tolist(), places, over, strict=True) if passes}:
                self.clocks.learn(one, self.live[place].completed)
            write(sel, over)

        return execute

    def arrive(self, address: Array, threads: Array, warp: Array) -> None:
        """Arrivals by other means than mbarrier.arrive, each on its thread's barrier, publishing what ``warp`` knows."""
        places = self._access(address, threads, warp, False)
        for place, row in zip(places, self.clocks.release(warp), strict=True):
            self._find(place).arrive(row)
