"""Barriers of a CTA and of a cluster: who waits, who may go on, what each warp then knows."""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.races import Clocks
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError

RUNNING, AT_BARRIER, AT_CLUSTER, EXITED = range(4)
IDLE, ARRIVED, COMPLETE = range(3)


class Barriers:
    """State of all barriers of a launch.

    ``state`` [threads] says what each thread does; ``phase`` [threads] where it is between the arrival and the wait of the
    cluster's barrier.
    """

    def __init__(self, registers: Registers, warp: Array, ctas: int, per_cluster: int, clocks: Clocks) -> None:
        threads = warp.size
        self.registers, self.warp, self.clocks = registers, warp, clocks
        self.ctas, self.per_cta, self.per_cluster = ctas, threads // ctas, per_cluster
        self.state = np.full(threads, RUNNING, np.int8)
        self.phase = np.full(threads, IDLE, np.int8)
        self.number = np.zeros(threads, np.int64)
        self.needed = np.zeros(threads, np.int64)
        self.at = np.full(threads, -1)
        self.vote = np.zeros(threads, bool)

    def _whole_warps(self, sel: Selection, name: str) -> None:
        """An ``.aligned`` barrier must be executed by all threads of a warp at once."""
        warps = np.unique(self.warp[sel.threads])
        here = np.bincount(self.warp[sel.threads], minlength=int(warps[-1]) + 1)[warps]
        alive = np.bincount(self.warp[self.state != EXITED], minlength=int(warps[-1]) + 1)[warps]
        if (here != alive).any():
            raise PtxError(f"barrier divergence: {name} executed by {int(here.min())} of a warp's threads")

    def arrive(self, ins: Instruction, index: int, sel: Selection) -> None:
        """bar.sync and bar.red, and their ``barrier`` spellings, with a number and a count of threads."""
        if ins.base == "bar" or "aligned" in ins.parts:
            self._whole_warps(sel, ins.name)
        operands = ins.operands[1:] if "red" in ins.parts else ins.operands
        vote = operands[-1] if "red" in ins.parts else None
        numbers = operands[:-1] if vote else operands
        read = [self.registers.reader(token, "u32")(sel).astype(np.int64) for token in numbers]
        number, needed = read[0], read[1] if len(read) > 1 else np.zeros(1, np.int64)
        if "arrive" in ins.parts:
            raise PtxError(f"{ins.name}: not simulated")
        self.state[sel.index] = AT_BARRIER
        self.number[sel.index], self.needed[sel.index], self.at[sel.index] = number, needed, index
        if vote:
            self.vote[sel.index] = self.registers.predicate(vote)(sel)
        self.release(np.unique(sel.threads // self.per_cta))

    def release(self, ctas: Array) -> None:
        """Let go whom nobody is missing any more."""
        for cta in ctas:
            own = slice(int(cta) * self.per_cta, (int(cta) + 1) * self.per_cta)
            state = self.state[own]
            waiting = state == AT_BARRIER
            if not waiting.any():
                continue
            for number in np.unique(self.number[own][waiting]):
                here = waiting & (self.number[own] == number)
                needed = int(self.needed[own][here][0]) or int((state != EXITED).sum())
                if int(here.sum()) >= needed:
                    self._open(own.start + np.flatnonzero(here))

    def _open(self, threads: Array) -> None:
        where = np.unique(self.at[threads])
        if where.size > 1:
            raise PtxError("barrier divergence: threads of one CTA wait at different barrier instructions")
        ins = self.registers.kernel.code[int(where[0])]
        if "red" in ins.parts:
            votes = self.vote[threads]
            operation = next(p for p in ins.parts if p in ("popc", "and", "or"))
            outcome = {"popc": np.uint32(votes.sum()), "and": votes.all(), "or": votes.any()}[operation]
            self.registers.writer(ins.operands[0])(Selection(threads, threads), np.array([outcome]))
        self.state[threads] = RUNNING
        self.clocks.join(np.unique(self.warp[threads]))

    def cluster_arrive(self, ins: Instruction, sel: Selection) -> None:
        """barrier.cluster.arrive."""
        if "aligned" in ins.parts:
            self._whole_warps(sel, ins.name)
        if (self.phase[sel.index] != IDLE).any():
            raise PtxError("barrier.cluster.arrive twice without a wait between")
        self.phase[sel.index] = ARRIVED
        self.clocks.arrive(np.unique(self.warp[sel.threads]), release="relaxed" not in ins.parts)
        self.complete(np.unique(sel.threads // (self.per_cta * self.per_cluster)))

    def complete(self, clusters: Array) -> None:
        """Open the barrier of the clusters whose threads have all arrived or exited."""
        size = self.per_cta * self.per_cluster
        for cluster in clusters:
            own = slice(int(cluster) * size, (int(cluster) + 1) * size)
            alive = self.state[own] != EXITED
            if not alive.any() or (self.phase[own][alive] != ARRIVED).any():
                continue
            self.clocks.complete(int(cluster))
            self.phase[own][alive] = COMPLETE
            waiting = own.start + np.flatnonzero(self.state[own] == AT_CLUSTER)
            if waiting.size:
                self._go_on(waiting)

    def cluster_wait(self, ins: Instruction, sel: Selection) -> None:
        """barrier.cluster.wait."""
        if "aligned" in ins.parts:
            self._whole_warps(sel, ins.name)
        phase = self.phase[sel.index]
        if (phase == IDLE).any():
            raise PtxError("barrier.cluster.wait without an arrival: a deadlock")
        through = sel.threads[phase == COMPLETE]
        self.state[sel.threads[phase == ARRIVED]] = AT_CLUSTER
        if through.size:
            self._go_on(through)

    def _go_on(self, threads: Array) -> None:
        self.phase[threads] = IDLE
        self.state[threads] = RUNNING
        self.clocks.acquire(np.unique(self.warp[threads]))

    def leave(self, threads: Array) -> None:
        """Threads exit; nobody waits for them any longer."""
        self.state[threads] = EXITED
        self.release(np.unique(threads // self.per_cta))
        self.complete(np.unique(threads // (self.per_cta * self.per_cluster)))
