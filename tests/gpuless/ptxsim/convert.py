"""Moves, selections and conversions between types."""

from __future__ import annotations

import numpy as np

from tests.gpuless.ptxsim import memory
from tests.gpuless.ptxsim.arithmetic import Execute
from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Registers, Selection
from tests.gpuless.ptxsim.values import (
    FLOATS,
    NUMPY,
    UNSIGNED,
    Array,
    PtxError,
    f32_to_tf32,
    flush,
    from_float,
    size_of,
    to_float,
)

_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_WINDOWS = {"shared": memory.SHARED, "local": memory.LOCAL, "const": memory.CONSTANT, "param": memory.PARAMETER}


def move(registers: Registers, ins: Instruction) -> Execute:
    """mov between registers, from symbols, and packing and unpacking ``{a, b}``."""
    kind, (to, source) = ins.kind, ins.operands
    if source.startswith("{"):
        names = [n.strip() for n in source.strip("{} ").split(",")]
        width = size_of(kind) // len(names)
        parts = [registers.part(n, f"u{8 * width}") for n in names]
        write, whole = registers.writer(to), UNSIGNED[size_of(kind)]

        def pack(sel: Selection) -> None:
            value = np.zeros(1, whole)
            for i, part in enumerate(parts):
                value = value | (part(sel).astype(whole) << whole(8 * width * i))
            write(sel, value)

        return pack
    read = registers.reader(source, kind)
    if to.startswith("{"):
        writes = registers.destinations(to)
        bits = 8 * size_of(kind) // len(writes)

        def unpack(sel: Selection) -> None:
            value = read(sel)
            value = value.view(UNSIGNED[value.dtype.itemsize])
            pieces = [(value >> value.dtype.type(i * bits)).astype(UNSIGNED[bits // 8]) for i in range(len(writes))]
            for write, piece in zip(writes, pieces, strict=True):
                write(sel, piece)

        return unpack
    write = registers.writer(to)
    return lambda sel: write(sel, read(sel))


def select(registers: Registers, ins: Instruction) -> Execute:
    """selp: a where the predicate holds, else b."""
    a, b = (registers.reader(t, ins.kind) for t in ins.operands[1:3])
    predicate, write = registers.predicate(ins.operands[3]), registers.writer(ins.operands[0])
    return lambda sel: write(sel, np.where(predicate(sel), a(sel), b(sel)))


def convert(registers: Registers, ins: Instruction) -> Execute:
    """cvt between integers and floats, the packed bfloat16 and float16 pairs included."""
    target, source, parts = ins.parts[-2], ins.parts[-1], ins.parts
    write = registers.writer(ins.operands[0])
    if ins.name == "cvt.rna.tf32.f32":
        value = registers.reader(ins.operands[1], "f32")
        return lambda sel: write(sel, f32_to_tf32(value(sel)))
    rounding = next((p for p in parts if p in ("rn", "rz")), "rn")
    if any(p in parts for p in ("rm", "rp", "rna", "tf32", "rs", "relu", "satfinite")):
        raise PtxError(f"{ins.name}: not simulated")
    if target in ("bf16x2", "f16x2") and source == "f32":
        high, low = (registers.reader(t, "f32") for t in ins.operands[1:3])
        half = target[:-2]

        def pack(sel: Selection) -> None:
            upper, lower = (from_float(r(sel), half, rounding).view(np.uint16).astype(np.uint32) for r in (high, low))
            write(sel, (upper << np.uint32(16)) | lower)

        return pack
    read = registers.reader(ins.operands[1], source)
    whole = next((_ROUND[p] for p in parts if p in _ROUND), None)

    def execute(sel: Selection) -> None:
        value = read(sel)
        if source in FLOATS:
            value = to_float(value, source)
            value = flush(value) if "ftz" in parts else value
            value = whole(value) if whole is not None else value
            if target in FLOATS:
                value = (
                    np.clip(np.where(np.isnan(value), 0, value), 0, 1).astype(value.dtype) if "sat" in parts else value
                )
                return write(sel, from_float(value, target, rounding))
            return write(sel, _saturate(value, target))
        if target in FLOATS:
            wide = value.astype(NUMPY[target]) if target in ("f32", "f64") else value.astype(np.float64)
            return write(sel, from_float(wide, target))
        if "sat" in parts:
            return write(sel, np.clip(value, *_limits(target)).astype(NUMPY[target]))
        return write(sel, value.astype(NUMPY[target]))

    return execute


def _limits(kind: str) -> tuple[int, int]:
    info = np.iinfo(NUMPY[kind])  # type: ignore[type-var]
    return int(info.min), int(info.max)


def _saturate(value: Array, kind: str) -> Array:
    """Float to integer as the hardware does: clamped, NaN becomes 0."""
    low, high = _limits(kind)
    wide = np.where(np.isnan(value), 0, value.astype(np.float64))
    inside = (wide > low) & (wide < high)
    result = np.where(inside, wide, 0).astype(NUMPY[kind])
    result[wide >= high] = high
    result[wide <= low] = low
    return result


def change_space(registers: Registers, ins: Instruction) -> Execute:
    """cvta: between a window's addresses and generic ones."""
    kind = ins.kind
    window = next((_WINDOWS[p.split("::")[0]] for p in ins.parts if p.split("::")[0] in _WINDOWS), 0)
    read, write = registers.reader(ins.operands[1], kind), registers.writer(ins.operands[0])
    if "to" in ins.parts:
        return lambda sel: write(sel, read(sel) & np.uint64(memory.WINDOW) if window else read(sel))
    return lambda sel: write(sel, read(sel) | np.uint64(window))


def map_shared(registers: Registers, ins: Instruction, per_cluster: int) -> Execute:
    """mapa: the address of the same variable in the CTA of another rank."""
    kind, write = ins.kind, registers.writer(ins.operands[0])
    clear = np.uint64(~(0xFF << memory.RANK_SHIFT) & (2**64 - 1))
    read, read_rank = registers.reader(ins.operands[1], kind), registers.reader(ins.operands[2], "u32")

    def execute(sel: Selection) -> None:
        rank = read_rank(sel).astype(np.uint64)
        if (rank >= per_cluster).any():
            raise PtxError(f"mapa to CTA rank {int(rank.max())} in a cluster of {per_cluster}")
        address = read(sel).astype(np.uint64)
        mapped = (address & clear) | ((rank + np.uint64(1)) << np.uint64(memory.RANK_SHIFT))
        write(sel, mapped.astype(NUMPY[kind]))

    return execute
