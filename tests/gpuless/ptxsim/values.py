"""Number formats: PTX types as NumPy types, bfloat16, rounding, fused multiply-add."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class PtxError(Exception):
    """What a GPU would fault on, hang on, or leave undefined; or an instruction that the simulator refuses."""


NUMPY: dict[str, Any] = {
    **dict.fromkeys(("b8", "u8"), np.uint8),
    **dict.fromkeys(("b16", "u16", "bf16"), np.uint16),
    **dict.fromkeys(("b32", "u32", "f16x2", "bf16x2"), np.uint32),
    **dict.fromkeys(("b64", "u64", "f32x2"), np.uint64),
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
    "pred": np.bool_,
}
UNSIGNED: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS = frozenset(("f16", "bf16", "f32", "f64", "f16x2", "bf16x2", "f32x2"))


def size_of(kind: str) -> int:
    """Bytes of a PTX type."""
    return np.dtype(NUMPY[kind]).itemsize


def as_type(value: Array, kind: str) -> Array:
    """The low bits of ``value`` read as the PTX type ``kind``; a narrower value is extended by its own sign."""
    dtype = np.dtype(NUMPY[kind])
    if value.dtype == dtype:
        return value
    if value.dtype == np.bool_ or dtype == np.bool_:
        return value.astype(dtype)
    if value.dtype.itemsize != dtype.itemsize:
        family = SIGNED if value.dtype.kind == "i" else UNSIGNED
        value = value.view(family[value.dtype.itemsize]).astype(family[dtype.itemsize])
    return value.view(dtype)


def immediate(token: str, kind: str) -> Array:
    """A literal as an array of one element: ``0f3F800000``, ``0d...``, decimal, hexadecimal, a trailing ``U``."""
    if token[:2] in ("0f", "0F"):
        return np.array([int(token[2:], 16)], np.uint32).view(np.float32)
    if token[:2] in ("0d", "0D"):
        value = np.array([int(token[2:], 16)], np.uint64).view(np.float64)
        return value.astype(np.float32) if kind == "f32" else value
    width = size_of(kind) if kind != "pred" else 4
    bits = int(token.rstrip("U"), 0) & ((1 << 8 * width) - 1)
    return as_type(np.array([bits], UNSIGNED[width]), kind)


def bf16_to_f32(bits: Array) -> Array:
    """float32 from the 16 bits of a bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(value: Array, rounding: str = "rn") -> Array:
    """The 16 bits of the bfloat16 nearest to a float32 (ties to even; ``rz``: towards zero); NaN becomes 0x7fff."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    up = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)) if rounding == "rn" else np.uint32(0)
    return np.where(np.isnan(value), np.uint16(0x7FFF), ((bits + up) >> np.uint32(16)).astype(np.uint16))


def f32_to_tf32(value: Array) -> Array:
    """The bits of the nearest float32 with 10 bits behind the point (ties away from zero), as the matrix units take it."""
    bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isnan(value), np.uint32(0x7FFFE000), rounded)


def to_float(value: Array, kind: str) -> Array:
    """A value of a 16-bit or wider float type as float32 (float64 stays)."""
    if kind == "bf16":
        return bf16_to_f32(value)
    return value.astype(np.float32) if kind == "f16" else value


def from_float(value: Array, kind: str, rounding: str = "rn") -> Array:
    """A float32 or float64 value rounded to the PTX type ``kind``."""
    if kind == "bf16":
        return f32_to_bf16(value.astype(np.float32), rounding)
    if rounding == "rz" and kind in ("f16", "f32") and value.dtype != NUMPY[kind]:
        rounded = value.astype(NUMPY[kind])
        return np.where(np.abs(rounded) > np.abs(value), np.nextafter(rounded, rounded.dtype.type(0)), rounded)
    return value.astype(NUMPY[kind])


def flush(value: Array) -> Array:
    """``.ftz``: subnormal float32 becomes zero of its sign."""
    small = np.abs(value) < np.float32(1.1754944e-38)
    return np.where(small, np.copysign(np.float32(0), value), value) if small.any() else value


def _round_to_odd(a: Array, b: Array) -> Array:
    """a + b in float64, rounded to odd (Boldo and Melquiond 2008): rounding it once more gives the one right rounding."""
    total = a + b
    back = total - a
    error = (a - (total - back)) + (b - back)
    inexact = np.isfinite(total) & (error != 0) & ((total.view(np.uint64) & np.uint64(1)) == 0)
    if inexact.any():
        outward = (error > 0) == (total > 0)
        bits = total.view(np.int64) + np.where(inexact, np.where(outward, 1, -1), 0)
        total = np.where(inexact, bits.view(np.float64), total)
    return total


def fma(a: Array, b: Array, c: Array) -> Array:
    """a·b + c in float32, rounded once: the product is exact in float64."""
    return _round_to_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)).astype(np.float32)


def exactly(operation: str, a: Array, b: Array) -> Array:
    """add, sub or mul of float32 in float64, such that any rounding to float32 afterwards is right."""
    x, y = np.broadcast_arrays(a.astype(np.float64), b.astype(np.float64))
    return x * y if operation == "mul" else _round_to_odd(x, y if operation == "add" else -y)
