"""tcgen05: products of matrices in shared and tensor memory, which one thread begins and an mbarrier tells the end of.

The tensor cores of a CTA count as one more warp of it, which does products in their order, knowing what the thread knew
that began them; who has waited for the mbarrier knows that they are done.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute, Perturb
from tests.gpuless.ptxsim.descriptor import chunks, of_tcgen05
from tests.gpuless.ptxsim.matrix import ELEMENTS, product
from tests.gpuless.ptxsim.mbarrier import MBarriers
from tests.gpuless.ptxsim.memory import SharedMemory
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.tensor_memory import TensorMemory
from tests.gpuless.ptxsim.values import Array, PtxError
from tests.gpuless.ptxsim.warp import by_warps

_MOVE = re.compile(r"tcgen05\.(ld|st)\.sync\.aligned\.(16x32bx2|32x32b)\.x(\d+)\.b32")
_COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"


class Tcgen05:
    """Decodes tcgen05 for one launch.

    Parameters
    ----------
    registers, shared, mbarriers
    thread : of each thread, its number in its CTA
    perturb : adds a random error to sums of products, or None
    """

    def __init__(
        self, registers: Registers, shared: SharedMemory, mbarriers: MBarriers, thread: Array, perturb: Perturb | None
    ) -> None:
        self.registers, self.shared, self.mbarriers = registers, shared, mbarriers
        self.thread, self.perturb, self.clocks = thread, perturb, shared.races.clocks
        ctas = shared.exited.size
        self.memory = TensorMemory(ctas, self.clocks)
        self.core = (np.arange(ctas) + 1) * self.clocks.per_cta - 1
        self.issuer = np.full(ctas, -1)
        self.under_way: dict[bool, list[tuple[Array, Array]]] = {True: [], False: []}  # loads, stores: warps, cells

    def decode(self, ins: Instruction) -> Execute:
        """All of it that is executed; the fences order nothing that barriers do not order here."""
        if ins.name in ("tcgen05.fence::before_thread_sync", "tcgen05.fence::after_thread_sync"):
            return lambda sel: None
        if ins.name == "tcgen05.mma.cta_group::1.kind::f16" and len(ins.operands) == 5:
            return self._multiply(ins)
        if ins.name == _COMMIT and len(ins.operands) == 1:
            return self._commit(ins)
        actions = {
            "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32": self._allocate,
            "tcgen05.dealloc.cta_group::1.sync.aligned.b32": self._free,
            "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned": self._relinquish,
            "tcgen05.wait::ld.sync.aligned": self._wait,
            "tcgen05.wait::st.sync.aligned": self._wait,
        }
        if _MOVE.fullmatch(ins.name):
            action = self._move(ins)
        elif ins.name in actions:
            action = actions[ins.name](ins)
        else:
            raise PtxError(f"{ins.name}: not simulated")

        return by_warps(ins.name, action)

    def _uniform(self, token: str, name: str) -> Callable[[Selection], Array]:
        """A function that gives an operand [warps] that must be the same in all lanes of a warp."""
        read = self.registers.address(token) if token.startswith("[") else self.registers.reader(token, "u32")

        def values(sel: Selection) -> Array:
            table = np.broadcast_to(read(sel), (sel.size,)).reshape(-1, 32)
            if (table != table[:, :1]).any():
                raise PtxError(f"{name}: the lanes of a warp have different operands")
            return table[:, 0].astype(np.int64)

        return values

    def _allocate(self, ins: Instruction) -> Callable[[Selection], None]:
        to, columns = self.registers.address(ins.operands[0]), self._uniform(ins.operands[1], ins.name)

        def execute(sel: Selection) -> None:
            first = sel.threads[::32]
            counts = zip(self.shared.cta[first].tolist(), columns(sel).tolist(), strict=True)
            bases = np.array([self.memory.allocate(cta, count) for cta, count in counts], np.uint32)
            self.shared.store(to(sel)[::32], [bases], first, cluster=False)

        return execute

    def _free(self, ins: Instruction) -> Callable[[Selection], None]:
        base, columns = (self._uniform(token, ins.name) for token in ins.operands)

        def execute(sel: Selection) -> None:
            first = sel.threads[::32]
            for thread, address, count in zip(first, base(sel), columns(sel), strict=True):
                self.memory.free(int(self.shared.cta[thread]), int(address), int(count), int(self.shared.warp[thread]))

        return execute

    def _relinquish(self, ins: Instruction) -> Callable[[Selection], None]:
        def execute(sel: Selection) -> None:
            self.memory.closed[self.shared.cta[sel.threads]] = True

        return execute

    def _move(self, ins: Instruction) -> Callable[[Selection], None]:
        """tcgen05.ld, st: a warp has 32 lanes of tensor memory within reach; shape 16x32bx2 is two halves of 16 lanes.

        The registers that ld fills are set at once: compilers move their uses in front of wait::ld, and ptxas keeps the order.
        """
        load, halves, count = ins.parts[1] == "ld", "16x32bx2" in ins.parts, int(ins.parts[-2][1:])
        operands = list(ins.operands)
        registers = operands.pop(0 if load else -1)
        address = self._uniform(operands[0], ins.name)
        split = int(operands[1], 0) if halves else 0
        names = [name.strip() for name in registers.strip("{} ").split(",")]
        if len(names) != count or len(operands) != 1 + halves:
            raise PtxError(f"{ins.name} of {len(names)} registers: not simulated")
        writes = [self.registers.writer(name) for name in names] if load else []
        reads = [] if load else [self.registers.reader(name, "u32") for name in names]
        down = np.arange(32)[:, None] % (16 if halves else 32)
        right = np.arange(count) + np.arange(32)[:, None] // 16 * split

        def execute(sel: Selection) -> None:
            first, at = sel.threads[::32], address(sel)
            lane, column = at >> 16, at & 0xFFFF
            if (lane // 32 != self.thread[first] // 32 % 4).any() or (lane % (16 if halves else 32)).any():
                raise PtxError(f"{ins.name}: lane {int(lane[0])} is out of the warp's reach or misaligned")
            cells = self.memory.cells(
                self.shared.cta[first][:, None, None], lane[:, None, None] + down, column[:, None, None] + right
            )
            cells, warps = cells.reshape(len(first), -1), self.shared.warp[first]
            every = np.repeat(warps, cells.shape[1])
            if load:
                words = self.memory.load(cells.ravel(), every).reshape(-1, count)
                for write, value in zip(writes, words.T, strict=True):
                    write(sel, value)
            else:
                words = np.stack([np.broadcast_to(read(sel), (sel.size,)) for read in reads], 1)
                self.memory.store(cells.ravel(), words.ravel(), every)
            (self.memory.loading if load else self.memory.storing)[cells] = True
            self.under_way[load].append((warps, cells))

        return execute

    def _wait(self, ins: Instruction) -> Callable[[Selection], None]:
        """tcgen05.wait: all loads, or stores, of these warps are over."""
        load = "wait::ld" in ins.parts

        def execute(sel: Selection) -> None:
            waiting, left = self.shared.warp[sel.threads[::32]], []
            for warps, cells in self.under_way[load]:
                done = np.isin(warps, waiting)
                if done.any():
                    self.memory.wait(cells[done].ravel(), np.repeat(warps[done], cells.shape[1]), load)
                if not done.all():
                    left.append((warps[~done], cells[~done]))
            self.under_way[load] = left

        return execute

    def _one_thread(self, sel: Selection, name: str) -> Array:
        """The CTA of each thread, which must be the only one of it that begins products and commits them."""
        cta = self.shared.cta[sel.threads]
        if np.unique(cta).size < cta.size:
            raise PtxError(f"{name}: {cta.size} threads of {np.unique(cta).size} CTAs execute it, each of them once")
        if ((self.issuer[cta] >= 0) & (self.issuer[cta] != sel.threads)).any():
            raise PtxError(f"{name} by two threads of a CTA: not simulated")
        self.issuer[cta] = sel.threads
        return cta

    def _commit(self, ins: Instruction) -> Execute:
        """An arrival on an mbarrier once all products that the thread has begun are done."""
        address = self.registers.address(ins.operands[0])

        def execute(sel: Selection) -> None:
            core = self.core[self._one_thread(sel, ins.name)]
            self.clocks.follow(core, self.shared.warp[sel.threads])
            self.mbarriers.arrive(address(sel), sel.threads, core)

        return execute

    def _in_memory(self, token: str) -> Callable[[Selection, Array, int, bool, str], Array]:
        """A function that gives a matrix [CTAs, rows, 16] from shared memory."""
        read = self.registers.reader(token, "u64")

        def matrix(sel: Selection, cta: Array, rows: int, transposed: bool, kind: str) -> Array:
            where = chunks(*of_tcgen05(np.broadcast_to(read(sel), (sel.size,))), rows, transposed)
            core = self.core[cta]
            words, places = self.shared.read_asynchronously(where, cta, core[:, None])
            self.shared.races.load(places.ravel(), np.repeat(core, places.shape[1]))
            values = ELEMENTS[kind](words)
            return values.swapaxes(1, 2) if transposed else values

        return matrix

    def _cells(self, cta: Array, address: Array, rows: int, columns: int) -> Array:
        """[CTAs, rows, columns]; 64 rows are in the lower or upper 16 lanes of each 32."""
        lane, row = (address >> 16)[:, None, None], np.arange(rows)[:, None]
        if (lane % 128 != 0).any() if rows == 128 else (~np.isin(lane, (0, 16))).any():
            raise PtxError(f"{rows} rows of tensor memory at lane {int(lane.max())}: misaligned")
        lane = lane + (row if rows == 128 else row // 16 * 32 + row % 16)
        return self.memory.cells(cta[:, None, None], lane, (address & 0xFFFF)[:, None, None] + np.arange(columns))

    def _in_tensor_memory(self, token: str) -> Callable[[Selection, Array, int, bool, str], Array]:
        """The same from tensor memory, two elements a word."""
        address = self.registers.address(token)

        def matrix(sel: Selection, cta: Array, rows: int, transposed: bool, kind: str) -> Array:
            if transposed:
                raise PtxError("tcgen05.mma: A in tensor memory cannot be transposed")
            cells = self._cells(cta, address(sel).astype(np.int64), rows, 8)
            words = self.memory.load(cells.ravel(), np.repeat(self.core[cta], cells[0].size))
            return ELEMENTS[kind](words.reshape(cells.shape))

        return matrix

    def _multiply(self, ins: Instruction) -> Execute:
        """tcgen05.mma of bf16 or f16 on float32: 64 or 128 rows, 16 products a sum."""
        address = self.registers.address(ins.operands[0])
        a_in = self._in_tensor_memory if ins.operands[1].startswith("[") else self._in_memory
        read_a, read_b = a_in(ins.operands[1].strip()), self._in_memory(ins.operands[2])
        shape, accumulates = self.registers.reader(ins.operands[3], "u32"), self.registers.predicate(ins.operands[4])

        def execute(sel: Selection) -> None:
            cta = self._one_thread(sel, ins.name)
            core = self.core[cta]
            self.clocks.follow(core, self.shared.warp[sel.threads])
            rows, columns, kind, flags = self._shape(np.unique(shape(sel)))
            cells = self._cells(cta, address(sel).astype(np.int64), rows, columns)
            a, b = read_a(sel, cta, rows, flags[2], kind), read_b(sel, cta, columns, flags[3], kind)
            c = np.zeros(cells.shape, np.float32)
            added = np.broadcast_to(accumulates(sel), (sel.size,))
            if added.any():
                words = self.memory.load(cells[added].ravel(), np.repeat(core[added], cells[0].size))
                c[added] = words.view(np.float32).reshape(-1, rows, columns)
            sign_a, sign_b = (1 - 2 * flag for flag in flags[:2])
            total = product(sign_a * a, sign_b * b.swapaxes(1, 2), c, self.perturb)
            self.memory.store(cells.ravel(), total.view(np.uint32).ravel(), np.repeat(core, cells[0].size))

        return execute

    @staticmethod
    def _shape(descriptor: Array) -> tuple[int, int, str, list[bool]]:
        """Rows, columns, format, and whether A and B are negated, and A and B transposed, from an instruction descriptor."""
        bits = int(descriptor[0])
        kind = {0: "f16", 0b1001: "bf16"}.get(bits >> 7 & 63)
        columns, rows = (bits >> 17 & 63) * 8, (bits >> 24 & 31) * 16
        known = 1 << 4 | 0x3F << 7 | 0xF << 13 | 0x3F << 17 | 0x1F << 24
        fits = rows in (64, 128) and 0 < columns <= 256 and columns % (8 if rows == 64 else 16) == 0
        if descriptor.size > 1 or kind is None or not fits or bits & ~known or not bits >> 4 & 1:
            raise PtxError(f"tcgen05.mma with the instruction descriptor {bits:#x}: not simulated")
        return rows, columns, kind, [bool(bits >> n & 1) for n in (13, 14, 15, 16)]
