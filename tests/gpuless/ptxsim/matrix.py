"""Matrices that the lanes of a warp hold together: ldmatrix, stmatrix, mma.sync.

A register of a warp holds a piece of 8 rows of 128 bits: lane t has, of row t / 4, the word t % 4. All operands of these
instructions are made of such pieces, but for float32 results, whose two neighbouring columns are two registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.gpuless.ptxsim.arithmetic import Execute, Perturb
from tests.gpuless.ptxsim.memory import SharedMemory
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Reader, Registers, Selection
from tests.gpuless.ptxsim.values import Array, PtxError, bf16_to_f32

_MOVE = re.compile(r"(?:ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16")
_MULTIPLY = re.compile(r"mma\.sync\.aligned\.m16n8k(\d+)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32")


ELEMENTS: dict[str, Callable[[Array], Array]] = {
    "bf16": lambda words: bf16_to_f32(words.view(np.uint16)),
    "f16": lambda words: words.view(np.float16),
    # PTX leaves open what becomes of bits that no cvt has rounded away, and Triton's tf32x3 passes such: they are cut off.
    "tf32": lambda words: (words & np.uint32(0xFFFFE000)).view(np.float32),
}


def product(a: Array, b: Array, c: Array, perturb: Perturb | None) -> Array:
    """a @ b + c [matrices, rows, columns] in float64, rounded once.

    In which order and with how many bits a GPU adds is not specified; ``perturb`` adds an error by chance.
    """
    a, b, c = (x.astype(np.float64) for x in (a, b, c))
    total = a @ b + c
    if perturb is not None:
        largest = np.abs(a) @ np.abs(b) + np.abs(c)
        total += perturb(largest, "mma") - largest
    return total.astype(np.float32)


class Matrices:
    """Decodes matrix instructions for one launch.

    Parameters
    ----------
    registers, shared
    lane : of each thread, its number in its warp
    perturb : adds a random error to sums of products, or None
    """

    def __init__(self, registers: Registers, shared: SharedMemory, lane: Array, perturb: Perturb | None) -> None:
        self.registers, self.shared, self.lane, self.perturb = registers, shared, lane, perturb

    @staticmethod
    def _whole_warps(sel: Selection, name: str) -> None:
        if sel.size != 32 * sel.warps:
            raise PtxError(f"{name}: {sel.size} threads of {sel.warps} warps execute it, it needs all lanes of a warp")

    def _rows(self, sel: Selection, pieces: int) -> Selection:
        """The lanes whose address says where a row lies: 8 for each piece. Those of the others are not looked at."""
        threads = sel.threads[self.lane[sel.threads] < 8 * pieces]
        return Selection(threads, threads)

    @staticmethod
    def _move(ins: Instruction, registers: int) -> tuple[int, bool]:
        """(pieces, is each of them transposed)."""
        found = _MOVE.fullmatch(ins.name)
        if found is None or int(found[1]) != registers:
            raise PtxError(f"{ins.name} of {registers} registers: not simulated")
        return registers, bool(found[2])

    def load(self, ins: Instruction) -> Execute:
        """ldmatrix: pieces of 8 × 8 elements of 16 bits from shared memory."""
        writes = self.registers.destinations(ins.operands[0])
        pieces, transposed = self._move(ins, len(writes))
        address = self.registers.address(ins.operands[1])

        def execute(sel: Selection) -> None:
            self._whole_warps(sel, ins.name)
            rows = self._rows(sel, pieces)
            halves = self.shared.load(address(rows), np.dtype(np.uint64), 2, rows.threads, cluster=False)
            table = np.stack(halves, 1).view(np.uint16).reshape(-1, pieces, 8, 8)
            table = np.ascontiguousarray(table.swapaxes(2, 3)) if transposed else table
            words = table.view(np.uint32).reshape(-1, pieces, 32)
            for i, write in enumerate(writes):
                write(sel, words[:, i].ravel())

        return execute

    def store(self, ins: Instruction) -> Execute:
        """stmatrix: the way back."""
        reads = self._readers(ins.operands[1], "u32")
        pieces, transposed = self._move(ins, len(reads))
        address = self.registers.address(ins.operands[0])

        def execute(sel: Selection) -> None:
            self._whole_warps(sel, ins.name)
            rows = self._rows(sel, pieces)
            words = self._pieces(reads, sel).swapaxes(0, 1)
            table = np.ascontiguousarray(words).view(np.uint16)
            table = np.ascontiguousarray(table.swapaxes(2, 3)) if transposed else table
            halves = table.view(np.uint64).reshape(-1, 2)
            self.shared.store(address(rows), [halves[:, 0], halves[:, 1]], rows.threads, cluster=False)

        return execute

    def _readers(self, operand: str, kind: str) -> list[Reader]:
        return [self.registers.reader(token.strip(), kind) for token in operand.strip("{} ").split(",")]

    @staticmethod
    def _pieces(reads: list[Reader], sel: Selection) -> Array:
        """[registers, warps, 8 rows, 4 words]."""
        return np.stack([np.broadcast_to(read(sel), (sel.size,)) for read in reads]).reshape(len(reads), -1, 8, 4)

    def multiply(self, ins: Instruction) -> Execute:
        """mma.sync: 16 × 8 sums of k products of bf16, f16 or tf32 each, on float32."""
        found = _MULTIPLY.fullmatch(ins.name)
        writes = self.registers.destinations(ins.operands[0])
        left, right = (self._readers(operand, "u32") for operand in ins.operands[1:3])
        addend = self._readers(ins.operands[3], "f32")
        counts = [len(x) for x in (left, right, addend, writes)]
        if found is None or counts != [2 * len(right), int(found[1]) // (4 if found[2] == "tf32" else 8), 4, 4]:
            raise PtxError(f"{ins.name}: not simulated")
        elements = ELEMENTS[found[2]]

        def execute(sel: Selection) -> None:
            self._whole_warps(sel, ins.name)
            a, b = (elements(self._pieces(reads, sel)) for reads in (left, right))
            warps, steps, width = a.shape[1], len(right), a.shape[3]
            # A's pieces go down first, then right. B's are its transpose's, from left to right.
            a = a.reshape(steps, 2, warps, 8, width).transpose(2, 1, 3, 0, 4).reshape(warps, 16, -1)
            b = b.transpose(1, 0, 3, 2).reshape(warps, -1, 8)
            c = self._pieces(addend, sel).reshape(2, 2, warps, 8, 4).transpose(2, 0, 3, 4, 1).reshape(warps, 16, 8)
            result = product(a, b, c, self.perturb).reshape(warps, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3)
            for write, value in zip(writes, result.reshape(4, -1), strict=True):
                write(sel, value)

        return execute
