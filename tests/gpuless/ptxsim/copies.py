"""cp.async: copies from global to shared memory that are under way until the thread that began them waits."""

from __future__ import annotations

import re

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute
from tests.gpuless.ptxsim.memory import GlobalMemory, SharedMemory
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError

_COPY = re.compile(r"cp\.async\.(ca|cg)\.shared(?:::cta)?\.global(?:\.L2::(?:64|128|256)B)?")


class Copies:
    """Decodes cp.async for one launch, and keeps what is under way: by thread, in groups, finished in their order."""

    def __init__(self, registers: Registers, outer: GlobalMemory, shared: SharedMemory) -> None:
        self.registers, self.outer, self.shared = registers, outer, shared
        self.committed = np.zeros(registers.threads, np.int64)
        self.under_way: list[tuple[Array, Array, Array]] = []  # threads, the group of each, granules it writes

    def decode(self, ins: Instruction) -> Execute:
        """cp.async, its commit_group, wait_group and wait_all."""
        if ins.name == "cp.async.commit_group":
            return self._commit
        if ins.name == "cp.async.wait_group":
            youngest = int(ins.operands[0], 0)
            return lambda sel: self._wait(sel, youngest)
        if ins.name == "cp.async.wait_all":
            return self._wait_for_all
        return self._copy(ins)

    def _copy(self, ins: Instruction) -> Execute:
        found = _COPY.fullmatch(ins.name)
        size = int(ins.operands[2], 0) if found else 0
        if found is None or size not in {"ca": (4, 8, 16), "cg": (16,)}[found[1]] or len(ins.operands) > 4:
            raise PtxError(f"{ins.name}: not simulated")
        to, source = (self.registers.address(operand) for operand in ins.operands[:2])
        read_size = self.registers.reader(ins.operands[3] if len(ins.operands) > 3 else str(size), "u32")

        def execute(sel: Selection) -> None:
            wanted = np.broadcast_to(read_size(sel), (sel.size,))
            if not np.isin(wanted, (0, size)).all():
                raise PtxError(f"{ins.name} of a part of {size} bytes: not simulated")
            values = np.zeros((size // 4, sel.size), np.uint32)  # what is not read is zero
            reads = np.flatnonzero(wanted)
            if reads.size:
                word = np.dtype(np.uint32)
                values[:, reads] = self.outer.load(source(sel)[reads], word, size // 4, sel.threads[reads])
            places = self.shared.begin_copy(to(sel), list(values), sel.threads)
            self.under_way.append((sel.threads, self.committed[sel.threads], places))

        return execute

    def _commit(self, sel: Selection) -> None:
        self.committed[sel.index] += 1

    def _wait_for_all(self, sel: Selection) -> None:
        self._commit(sel)
        self._wait(sel, 0)

    def _wait(self, sel: Selection, youngest: int) -> None:
        """Finish what these threads committed, but for the ``youngest`` groups of each."""
        limit = np.zeros(self.committed.size, np.int64)
        limit[sel.index] = self.committed[sel.index] - youngest
        left = []
        for threads, group, places in self.under_way:
            done = group < limit[threads]
            if done.any():
                self.shared.end_copy(places[done], threads[done])
            if not done.all():
                left.append((threads[~done], group[~done], places[~done]))
        self.under_way = left
