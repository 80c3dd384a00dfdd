"""wgmma: products that the four warps of a warpgroup begin together and that go on until they wait for them.

A product is computed when it begins. What a GPU may still read or write until it is waited for, nobody may touch or store to.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute, Perturb
from tests.gpuless.ptxsim.descriptor import chunks, of_wgmma
from tests.gpuless.ptxsim.matrix import ELEMENTS, product
from tests.gpuless.ptxsim.memory import SharedMemory
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Reader, Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError
from tests.gpuless.ptxsim.warp import by_warps

_MULTIPLY = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2")
#: The last access to a register: a product's to A, an ordinary one, none since the fence; or the columns of an accumulator.
_AS_A, _ORDINARY, _FENCED = -2, -1, 0


def _names(operand: str) -> list[str]:
    return [token.strip() for token in operand.strip("{} ").split(",")]


class Wgmma:
    """Decodes wgmma for one launch, and keeps what is under way: by warp, in groups, finished in their order.

    Parameters
    ----------
    registers, shared
    thread : of each thread, its number in its CTA
    perturb : adds a random error to sums of products, or None
    """

    def __init__(self, registers: Registers, shared: SharedMemory, thread: Array, perturb: Perturb | None) -> None:
        self.registers, self.shared, self.thread, self.perturb = registers, shared, thread, perturb
        products = [i for i in registers.kernel.code if i.name.startswith("wgmma.mma_async")]
        names = {name for i in products for operand in i.operands[:2] if "{" in operand for name in _names(operand)}
        self.row = {name: row for row, name in enumerate(sorted(names))}
        self.last = np.full((len(names), thread.size), _ORDINARY, np.int16)
        self.due = np.zeros(self.last.shape, np.int32)  # 1 + the group that a register is in use by, or 0
        self.committed = np.zeros(thread.size, np.int32)  # of the warp that a thread is in
        self.under_way: list[tuple[Array, Array, Array]] = []  # first threads of warps, their group, granules it reads
        registers.touch |= {name: functools.partial(self._touch, name) for name in names}

    def _touch(self, name: str, sel: Selection) -> None:
        """An ordinary access to a register."""
        row = self.row[name]
        if self.due[row][sel.index].any():
            raise PtxError(f"access to {name.split('@')[0]}, which a wgmma may still use: no wait_group has covered it")
        self.last[row][sel.index] = _ORDINARY

    def decode(self, ins: Instruction) -> Execute:
        """wgmma.mma_async, its fence, commit_group and wait_group."""
        if ins.name == "wgmma.fence.sync.aligned":
            return by_warps(ins.name, self._fence)
        if ins.name == "wgmma.commit_group.sync.aligned":
            return by_warps(ins.name, self._commit)
        if ins.name == "wgmma.wait_group.sync.aligned":
            return by_warps(ins.name, functools.partial(self._wait, int(ins.operands[0], 0)))
        return self._multiply(ins)

    def _fence(self, sel: Selection) -> None:
        """Orders accesses to registers before later products; what is under way is not an access that is over."""
        idle = self.due[:, sel.index] == 0
        self.last[:, sel.index] = np.where(idle, _FENCED, self.last[:, sel.index])

    def _commit(self, sel: Selection) -> None:
        self.committed[sel.index] += 1

    def _wait(self, youngest: int, sel: Selection) -> None:
        """Finish what these warps committed, but for the ``youngest`` groups of each."""
        limit = np.zeros(self.thread.size, np.int32)
        limit[sel.index] = self.committed[sel.index] - youngest
        self.due[self.due <= limit] = 0
        left = []
        for first, group, places in self.under_way:
            done = group < limit[first]
            if done.any():
                self.shared.end_read(places[done], self.shared.warp[first[done]])
            if not done.all():
                left.append((first[~done], group[~done], places[~done]))
        self.under_way = left

    def _warpgroups(self, sel: Selection, name: str) -> Array:
        """Threads [warpgroups, 128]."""
        table = sel.threads[: sel.size // 128 * 128].reshape(-1, 128)
        places = np.arange(128)
        if sel.size % 128 or (self.thread[table] % 128 != places).any() or (table != table[:, :1] + places).any():
            raise PtxError(f"{name}: {sel.size} threads execute it, it needs all four warps of a warpgroup at once")
        return table

    def _use(self, names: list[str], use: int, sel: Selection) -> None:
        """A product's own access to registers."""
        table = np.array([self.row[name] for name in names])[:, None], sel.threads
        unordered = ((self.last[table] != _FENCED) & (self.last[table] != use)).any(1)
        if unordered.any():
            name = names[int(unordered.argmax())].split("@")[0]
            raise PtxError(f"{name} was used since the last wgmma.fence, or by a wgmma of another shape")
        self.last[table], self.due[table] = use, self.committed[sel.threads] + 1

    def _in_memory(self, operand: str, rows: int, transposed: bool, kind: str) -> Callable[[Selection, Array], Array]:
        """A function that gives a matrix [warpgroups, rows, 16] from shared memory."""
        read = self.registers.reader(operand, "u64")

        def matrix(sel: Selection, threads: Array) -> Array:
            descriptor = np.broadcast_to(read(sel), (sel.size,)).reshape(-1, 128)
            if (descriptor != descriptor[:, :1]).any():
                raise PtxError("the threads of a warpgroup have different matrix descriptors")
            where = chunks(*of_wgmma(descriptor[:, 0]), rows, transposed)
            first = threads[:, ::32]
            data, places = self.shared.read_asynchronously(where, self.shared.cta[first[:, 0]], self.shared.warp[first])
            self.shared.begin_read(places)
            first = first.ravel()
            self.under_way.append((first, self.committed[first], places))
            values = ELEMENTS[kind](data)
            return values.swapaxes(1, 2) if transposed else values

        return matrix

    def _in_registers(self, names: list[str], kind: str) -> Callable[[Selection, Array], Array]:
        """The same of A, four registers a thread: pieces of 8 rows of 16 bytes, first down, then right."""
        reads = [self.registers.quiet_reader(name, "u32") for name in names]

        def matrix(sel: Selection, threads: Array) -> Array:
            self._use(names, _AS_A, sel)
            words = np.stack([np.broadcast_to(read(sel), (sel.size,)) for read in reads]).reshape(2, 2, -1, 4, 8, 4)
            pieces = ELEMENTS[kind](np.ascontiguousarray(words.transpose(2, 3, 1, 4, 0, 5)))
            return pieces.reshape(len(threads), 64, 16)

        return matrix

    def _multiply(self, ins: Instruction) -> Execute:
        """64 × n sums of 16 products on float32."""
        found = _MULTIPLY.fullmatch(ins.name)
        from_registers = len(ins.operands) > 1 and "{" in ins.operands[1]
        results, left = _names(ins.operands[0]), _names(ins.operands[1])
        if found is None or len(results) != int(found[1]) // 2 or len(left) != (4 if from_registers else 1):
            raise PtxError(f"{ins.name}: not simulated")
        columns, kind = int(found[1]), found[2]
        sign_a, sign_b, *transposed = (int(token, 0) for token in ins.operands[4:])
        read_a = (
            self._in_registers(left, kind)
            if from_registers
            else self._in_memory(ins.operands[1], 64, bool(transposed[0]), kind)
        )
        read_b = self._in_memory(ins.operands[2], columns, bool(transposed[-1]), kind)
        accumulates = self.registers.predicate(ins.operands[3])
        addends = [self.registers.quiet_reader(name, "f32") for name in results]
        writes = [self.registers.quiet_writer(name) for name in results]

        def execute(sel: Selection) -> None:
            threads = self._warpgroups(sel, ins.name)
            added = np.broadcast_to(accumulates(sel), (sel.size,)).reshape(-1, 128)
            if (added != added[:, :1]).any():
                raise PtxError(f"{ins.name}: the threads of a warpgroup disagree on whether to add")
            self._use(results, columns, sel)
            c = self._accumulators(addends, threads[added[:, 0]], added[:, 0])
            a, b = sign_a * read_a(sel, threads), sign_b * read_b(sel, threads).swapaxes(1, 2)
            tiles = product(a, b, c, self.perturb).reshape(-1, 4, 2, 8, columns // 8, 4, 2)
            for write, value in zip(writes, tiles.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(writes), -1), strict=True):
                write(sel, value)

        return execute

    @staticmethod
    def _accumulators(addends: list[Reader], threads: Array, added: Array) -> Array:
        """[warpgroups, 64, columns] of those that ``added`` says; 0 for the others, whose registers are not looked at."""
        result = np.zeros((added.size, 64, 2 * len(addends)))
        if threads.size:
            sel = Selection(threads.ravel(), threads.ravel())
            tiles = np.stack([read(sel) for read in addends]).reshape(-1, 2, 2, len(threads), 4, 8, 4)
            result[added] = tiles.transpose(3, 4, 1, 5, 0, 6, 2).reshape(len(threads), 64, -1)
        return result
