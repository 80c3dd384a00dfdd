"""Loads, stores and atomics: which memory an instruction means, and what passes between it and the registers."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.gpuless.ptxsim import memory
from tests.gpuless.ptxsim.arithmetic import Execute
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import NUMPY, UNSIGNED, Array, PtxError

_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, top: np.where(old >= top, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - old.dtype.type(1)),
}


class Accesses:
    """Decodes memory instructions for one launch."""

    def __init__(
        self,
        registers: Registers,
        outer: memory.GlobalMemory,
        shared: memory.SharedMemory,
        parameters: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        self.registers, self.outer, self.shared, self.rng = registers, outer, shared, rng
        kernel = registers.kernel
        pieces = [np.concatenate([d, np.zeros(-d.size % 16, np.uint8)]) for d in kernel.constants.values()]
        self.tables = {
            memory.CONSTANT: np.concatenate(pieces) if pieces else np.zeros(0, np.uint8),
            memory.PARAMETER: parameters,
        }
        self.local = np.zeros((registers.threads, kernel.local_bytes), np.uint8)
        self.local_written = np.zeros(self.local.shape, bool)

    def _space(self, ins: Instruction) -> tuple[str, bool]:
        """(state space or "generic", may it be another CTA's)."""
        for part in ins.parts[1:]:
            name, _, scope = part.partition("::")
            if name in ("global", "shared", "local", "param", "const"):
                return name, scope == "cluster"
        return "generic", True

    def _resolve(self, address: Array, space: str) -> tuple[str, Array]:
        """The memory that generic addresses lie in: one for all threads of an instruction."""
        if space == "generic":
            high = address >> np.uint64(56)
            window = int(high[0])
            if (high != window).any():
                raise PtxError("generic access to several state spaces in one instruction: not simulated")
            space = {0: "global", 1: "shared", 2: "local", 4: "const", 8: "param"}.get(window, "")
            if not space:
                raise PtxError(f"generic access to address {int(address[0]):#x}")
        elif space == "global" and address.size and int(address[0]) >> 58:
            space = "const"
        return space, address & np.uint64(memory.WINDOW)

    def _table(self, space: str, address: Array, dtype: np.dtype, count: int) -> list[Array]:
        table = self.tables[memory.CONSTANT if space == "const" else memory.PARAMETER]
        place = address.astype(np.int64)[:, None] + np.arange(count * dtype.itemsize)
        if place.size and place.max() >= table.size:
            raise PtxError(f"load from {space} memory out of bounds: byte {int(place.max())} of {table.size}")
        values = np.ascontiguousarray(table[place]).view(dtype)
        return [values[:, j] for j in range(count)]

    def _local(self, address: Array, size: int, sel: Selection) -> tuple[Array, Array]:
        place = address.astype(np.int64)[:, None] + np.arange(size)
        if place.max() >= self.local.shape[1] or (place[:, 0] % size).any():
            raise PtxError(
                f"local access of {size} bytes at {int(place[0, 0])} of {self.local.shape[1]}: outside or misaligned"
            )
        return sel.threads[:, None], place

    def load(self, ins: Instruction) -> Execute:
        """ld, ldu: scalars and vectors from any space."""
        space, cluster = self._space(ins)
        dtype = np.dtype(NUMPY[ins.kind])
        writes = self.registers.destinations(ins.operands[0])
        address, count = self.registers.address(ins.operands[1]), len(writes)

        def execute(sel: Selection) -> None:
            where, place = self._resolve(address(sel), space)
            if where == "global":
                values = self.outer.load(place, dtype, count, sel.threads)
            elif where == "shared":
                values = self.shared.load(place, dtype, count, sel.threads, cluster)
            elif where == "local":
                index = self._local(place, dtype.itemsize * count, sel)
                if not self.local_written[index].all():
                    raise PtxError("load of local memory that nothing was stored to")
                both = np.ascontiguousarray(self.local[index]).view(dtype)
                values = [both[:, j] for j in range(count)]
            else:
                values = self._table(where, place, dtype, count)
            for write, value in zip(writes, values, strict=True):
                write(sel, value)

        return execute

    def store(self, ins: Instruction) -> Execute:
        """st: scalars and vectors to global, shared and local memory."""
        space, cluster = self._space(ins)
        if "async" in ins.parts or space == "param":
            raise PtxError(f"{ins.name}: not simulated")
        kind = ins.kind
        reads = [self.registers.reader(t.strip(), kind) for t in ins.operands[1].strip("{} ").split(",")]
        address = self.registers.address(ins.operands[0])

        def execute(sel: Selection) -> None:
            where, place = self._resolve(address(sel), space)
            values = [np.ascontiguousarray(np.broadcast_to(read(sel), (sel.size,))) for read in reads]
            if where == "global":
                self.outer.store(place, values, sel.threads)
            elif where == "shared":
                self.shared.store(place, values, sel.threads, cluster)
            elif where == "local":
                index = self._local(place, values[0].dtype.itemsize * len(values), sel)
                self.local[index] = np.stack(values, 1).view(np.uint8)
                self.local_written[index] = True
            else:
                raise PtxError(f"store to {where} memory")

        return execute

    def atomic(self, ins: Instruction) -> Execute:
        """atom and red on global and shared memory; threads take their turns in random order."""
        space, cluster = self._space(ins)
        kind = {"b32": "u32", "b64": "u64"}.get(ins.kind, ins.kind)
        if kind not in ("u32", "s32", "u64", "s64", "f32", "f64") or re.search(r"\.v\d", ins.name):
            raise PtxError(f"{ins.name}: not simulated")
        wanted = ins.operands[1:] if ins.base == "atom" else ins.operands
        write = self.registers.writer(ins.operands[0]) if ins.base == "atom" else None
        address = self.registers.address(wanted[0])
        reads = [self.registers.reader(t, kind) for t in wanted[1:]]
        name = next(p for p in ins.parts if p in _ATOMIC or p == "cas")
        dtype = np.dtype(NUMPY[kind])

        def execute(sel: Selection) -> None:
            where, place = self._resolve(address(sel), space)
            values = [np.broadcast_to(read(sel), (sel.size,)) for read in reads]
            old = np.empty(sel.size, dtype)
            if where == "shared":
                table, index = self.shared.atomic(place, dtype.itemsize, sel.threads, cluster)
                self._apply(table.view(dtype), index, values, name, old)
            else:
                which = self.outer.locate(place, dtype.itemsize, "atomic")
                for i in np.unique(which):
                    segment, own = self.outer.segments[i], which == i
                    index = (place[own] - np.uint64(segment.base)).astype(np.int64) // dtype.itemsize
                    part = np.empty(index.size, dtype)
                    table = segment.data[: segment.data.size // dtype.itemsize * dtype.itemsize].view(dtype)
                    self._apply(table, index, [v[own] for v in values], name, part)
                    old[own] = part
            if write is not None:
                write(sel, old)

        return execute

    def _apply(self, table: Array, index: Array, values: list[Array], name: str, old: Array) -> None:
        """Apply one operation per thread, the threads that meet at one place one after another."""
        left = self.rng.permutation(index.size)
        while left.size:
            first = left[np.unique(index[left], return_index=True)[1]]
            before = table[index[first]]
            old[first] = before
            if name == "cas":
                table[index[first]] = np.where(before == values[0][first], values[1][first], before)
            else:
                table[index[first]] = _ATOMIC[name](before, values[0][first])
            left = left[~np.isin(left, first)]


def parameter_block(kernel_parameters: list, arguments: list) -> np.ndarray:
    """The bytes of the kernel's arguments: tensors by address, numbers by the declared type, structures as bytes."""
    end = max((p.offset + p.size for p in kernel_parameters), default=0)
    block = np.zeros(end, np.uint8)
    for parameter, value in zip(kernel_parameters, arguments, strict=True):
        if hasattr(value, "data_ptr"):
            value = value.data_ptr()
        elif isinstance(value, np.ndarray):
            value = value.ctypes.data
        if not isinstance(value, (int, float, np.generic)):
            raw = np.frombuffer(bytes(value), np.uint8)
            if raw.size != parameter.size:
                raise PtxError(f"argument {parameter.name} has {raw.size} bytes, the kernel declares {parameter.size}")
        elif isinstance(value, float) or parameter.kind.startswith("f"):
            raw = np.array([value], {4: np.float32, 8: np.float64, 2: np.float16}[parameter.size]).view(np.uint8)
        else:
            bits = int(value) & ((1 << 8 * parameter.size) - 1)
            raw = np.array([bits], UNSIGNED[parameter.size]).view(np.uint8)
        block[parameter.offset : parameter.offset + parameter.size] = raw
    return block
