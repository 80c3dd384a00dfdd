"""Instructions in which the lanes of a warp exchange values: shfl, redux, vote, match, elect, activemask."""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError

_BITS = np.arange(32, dtype=np.uint32)
_REDUCE = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


class Warps:
    """The lanes of the warps that execute one instruction, as tables [warps, 32].

    Raises
    ------
    PtxError
        If a lane that the member mask names does not execute the instruction (on a GPU: undefined or a hang), or an
        executing lane is missing from its own mask.
    """

    def __init__(self, warp: Array, lane: Array, sel: Selection, mask: Array, name: str) -> None:
        self.row = np.unique(warp[sel.threads], return_inverse=True)[1]
        self.lane = lane[sel.threads]
        self.here = np.zeros((int(self.row.max()) + 1, 32), bool)
        self.here[self.row, self.lane] = True
        named = ((np.broadcast_to(mask, self.lane.shape)[:, None] >> _BITS) & np.uint32(1)).astype(bool)
        if (named & ~self.here[self.row]).any():
            raise PtxError(f"{name}: a lane that the member mask names does not execute it (diverged or exited)")
        if not named[np.arange(self.lane.size), self.lane].all():
            raise PtxError(f"{name}: a lane executes it that its member mask does not name")

    def table(self, value: Array) -> Array:
        """[warps, 32] of the lanes' values; absent lanes hold 0."""
        result = np.zeros(self.here.shape, value.dtype)
        result[self.row, self.lane] = np.broadcast_to(value, self.lane.shape)
        return result

    def ballot(self, flags: Array) -> Array:
        """A uint32 per executing lane: the bits of its warp's flags."""
        return (flags.astype(np.uint32) << _BITS).sum(1, dtype=np.uint32)[self.row]


def by_warps(name: str, action: Execute) -> Execute:
    """``action``, refused where a part of a warp executes it."""

    def execute(sel: Selection) -> None:
        if sel.size != 32 * sel.warps:
            raise PtxError(f"{name}: {sel.size} threads of {sel.warps} warps execute it, it needs whole warps")
        action(sel)

    return execute


class WarpInstructions:
    """Decodes warp instructions for one launch; ``warp`` and ``lane`` are numbers of each thread."""

    def __init__(self, registers: Registers, warp: Array, lane: Array) -> None:
        self.registers, self.warp, self.lane = registers, warp, lane.astype(np.int64)

    def _warps(self, sel: Selection, mask: Array, name: str) -> Warps:
        return Warps(self.warp, self.lane, sel, mask, name)

    def shuffle(self, ins: Instruction) -> Execute:
        """shfl.sync.{up, down, bfly, idx}."""
        mode, read = ins.parts[2], self.registers.reader
        value, by, clamp, mask = (read(t, "u32") for t in ins.operands[1:5])
        writes = self.registers.destinations(ins.operands[0])

        def execute(sel: Selection) -> None:
            warps = self._warps(sel, mask(sel), ins.name)
            lane, step, control = warps.lane, by(sel).astype(np.int64), clamp(sel).astype(np.int64)
            segment, limit = (control >> 8) & 31, control & 31
            first = lane & segment
            last = first | (limit & ~segment)
            if mode == "up":
                source = lane - step
                valid = source >= (first | (limit & ~segment))
            else:
                source = {"bfly": lane ^ step, "down": lane + step}.get(mode, first | (step & ~segment))
                valid = source <= last
            source = np.where(valid, source, lane)
            if not warps.here[warps.row, source].all():
                raise PtxError(f"{ins.name}: the source lane is not active, the value is undefined")
            writes[0](sel, warps.table(value(sel))[warps.row, source])
            if len(writes) > 1:
                writes[1](sel, valid)

        return execute

    def reduce(self, ins: Instruction) -> Execute:
        """redux.sync of integers, and of float32 minima and maxima."""
        kind, name = ins.kind, next(p for p in ins.parts if p in _REDUCE)
        function = {"min": np.fmin, "max": np.fmax}[name] if kind == "f32" and "NaN" not in ins.parts else _REDUCE[name]
        value, mask = self.registers.reader(ins.operands[1], kind), self.registers.reader(ins.operands[2], "u32")
        write = self.registers.writer(ins.operands[0])

        def execute(sel: Selection) -> None:
            warps = self._warps(sel, mask(sel), ins.name)
            lanes = np.abs(value(sel)) if "abs" in ins.parts else value(sel)
            table = warps.table(lanes)
            if not warps.here.all():  # absent lanes repeat one that is there (and add nothing)
                some = np.take_along_axis(table, warps.here.argmax(1)[:, None], 1)
                table = np.where(warps.here, table, 0 if name in ("add", "xor") else some).astype(table.dtype)
            write(sel, function.reduce(table, axis=1, dtype=table.dtype)[warps.row])

        return execute

    def vote(self, ins: Instruction) -> Execute:
        """vote.sync.{all, any, uni, ballot}."""
        flag, mask = self.registers.predicate(ins.operands[1]), self.registers.reader(ins.operands[2], "u32")
        write, parts = self.registers.writer(ins.operands[0]), ins.parts

        def execute(sel: Selection) -> None:
            warps = self._warps(sel, mask(sel), ins.name)
            flags = warps.table(flag(sel))
            every: Array = np.all(flags | ~warps.here, axis=1)
            some: Array = np.any(flags, axis=1)
            if "ballot" in parts:
                return write(sel, warps.ballot(flags))
            outcome: Array = every if "all" in parts else some if "any" in parts else every | ~some
            return write(sel, outcome[warps.row])

        return execute

    def match(self, ins: Instruction) -> Execute:
        """match.sync.{any, all}: which lanes hold the same value."""
        value, mask = self.registers.reader(ins.operands[1], ins.kind), self.registers.reader(ins.operands[2], "u32")
        writes = self.registers.destinations(ins.operands[0])

        def execute(sel: Selection) -> None:
            warps = self._warps(sel, mask(sel), ins.name)
            table = warps.table(value(sel))[warps.row]
            equal = (table == table[np.arange(sel.size), warps.lane][:, None]) & warps.here[warps.row]
            bits = (equal.astype(np.uint32) << _BITS).sum(1, dtype=np.uint32)
            if "all" in ins.parts:
                same = equal.sum(1) == warps.here[warps.row].sum(1)
                bits = np.where(same, bits, np.uint32(0))
                if len(writes) > 1:
                    writes[1](sel, same)
            writes[0](sel, bits)

        return execute

    def active(self, ins: Instruction) -> Execute:
        """activemask, and elect.sync (the lowest lane is elected)."""
        writes, elect = self.registers.destinations(ins.operands[0]), ins.base == "elect"
        mask = self.registers.reader(ins.operands[1], "u32") if elect else None

        def execute(sel: Selection) -> None:
            own = np.uint32(1) << self.lane[sel.threads].astype(np.uint32)
            warps = self._warps(sel, own if mask is None else mask(sel), ins.name)
            if mask is None:
                return writes[0](sel, warps.ballot(warps.here))
            leader = warps.here.argmax(1)[warps.row]
            writes[0](sel, leader.astype(np.uint32))
            return writes[1](sel, leader == warps.lane)

        return execute

    def synchronise(self, ins: Instruction) -> Execute:
        """bar.warp.sync: only the mask can be wrong."""
        mask = self.registers.reader(ins.operands[0], "u32")

        def execute(sel: Selection) -> None:
            self._warps(sel, mask(sel), ins.name)

        return execute
