"""Arithmetic, logic, comparison and bit-field instructions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.gpuless.ptxsim.parser import Instruction
from tests.gpuless.ptxsim.registers import Reader, Registers, Selection
from tests.gpuless.ptxsim.values import (
    FLOATS,
    NUMPY,
    UNSIGNED,
    Array,
    PtxError,
    exactly,
    flush,
    fma,
    from_float,
    size_of,
    to_float,
)

Execute = Callable[[Selection], None]
Perturb = Callable[[Array, str], Array]

_BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
}
_APPROXIMATE: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
_INTEGER = {*_BINARY, "mad", "mul24", "div", "rem", "abs", "neg", "not", "cnot", "shl", "shr", "shf", "prmt"} | {
    *("lop3", "bfe", "bfi", "popc", "clz", "bfind", "brev")
}
_COMPARE = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}


def _sources(registers: Registers, instruction: Instruction, kind: str) -> list[Reader]:
    return [registers.reader(token, kind) for token in instruction.operands[1:]]


def _float_operation(name: str, parts: list[str], kind: str, perturb: Perturb) -> Callable[..., Array]:
    """An operation on float32 or float64 arrays (16-bit types are computed in float32 and rounded once more)."""

    def extremum(*values: Array) -> Array:
        ordered = {"min": np.fmin, "max": np.fmax} if "NaN" not in parts else {"min": np.minimum, "max": np.maximum}
        function = ordered[name]
        values = tuple(np.abs(v) for v in values) if "abs" in parts else values
        result = function(values[0], values[1])
        return function(result, values[2]) if len(values) == 3 else result

    def divide(a: Array, b: Array) -> Array:
        quotient = (a.astype(np.float64) / b).astype(a.dtype)
        return quotient if "rn" in parts else perturb(quotient, "div")

    def multiply_add(a: Array, b: Array, c: Array) -> Array:
        if kind == "f64":
            raise PtxError("fma.f64: not simulated")
        a, b, c = np.broadcast_arrays(a, b, c)
        return fma(a, b, c)

    simple: dict[str, Callable[..., Array]] = {
        "neg": np.negative,
        "abs": np.abs,
        "min": extremum,
        "max": extremum,
        "div": divide,
        "fma": multiply_add,
        "mad": multiply_add,
        "copysign": lambda a, b: np.copysign(b, a),
    }
    return simple.get(name) or _BINARY[name]


def float_arithmetic(registers: Registers, ins: Instruction, perturb: Perturb) -> Execute:
    """add, sub, mul, div, fma, min, max, neg, abs on f16, bf16, f32, f64 and the packed pairs of them."""
    kind, parts = ins.kind, ins.parts
    if parts[-2] == "f32" and kind in ("f16", "bf16"):
        return _mixed(registers, ins)
    half = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}.get(kind)
    towards_zero = "rz" in parts and ins.base in ("add", "sub", "mul") and kind == "f32"
    operation = _float_operation(ins.base, parts, half or kind, perturb)
    if any(p in parts for p in ("rz", "rm", "rp")) and not towards_zero:
        raise PtxError(f"rounding of {ins.name} is not simulated")
    reads = _sources(registers, ins, kind)
    write = registers.writer(ins.operands[0])
    narrow = half or kind

    def compute(values: list[Array]) -> Array:
        if towards_zero:
            return from_float(exactly(ins.base, *values), "f32", "rz")
        wide = [to_float(v, narrow) for v in values]
        if "ftz" in parts:
            wide = [flush(v) for v in wide]
        result = operation(*wide)
        result = flush(result) if "ftz" in parts and narrow == "f32" else result
        if "relu" in parts or "sat" in parts:
            result = np.fmin(np.fmax(result, 0), 1).astype(result.dtype) if "sat" in parts else np.fmax(result, 0)
        return from_float(result, narrow)

    def packed(values: list[Array]) -> Array:
        whole = UNSIGNED[size_of(kind)]
        width = size_of(narrow)
        result = np.zeros(1, whole)
        for part in (0, 1):
            shift = whole(8 * width * part)
            piece = compute([(v >> shift).astype(UNSIGNED[width]).view(NUMPY[narrow]) for v in values])
            result = result | (piece.view(UNSIGNED[width]).astype(whole) << shift)
        return result

    combine = packed if half else compute
    return lambda sel: write(sel, combine([read(sel) for read in reads]))


def _mixed(registers: Registers, ins: Instruction) -> Execute:
    """add, sub and fma of sm_100 whose last operand and result are float32 and whose others are 16 bits wide."""
    if set(ins.parts[1:]) - {"rn", "f32", ins.kind} or ins.base not in ("add", "sub", "fma"):
        raise PtxError(f"{ins.name}: not simulated")
    narrow = [registers.reader(t, ins.kind) for t in ins.operands[1:-1]]
    last, write = registers.reader(ins.operands[-1], "f32"), registers.writer(ins.operands[0])

    def execute(sel: Selection) -> None:
        values = [*(to_float(read(sel), ins.kind) for read in narrow), last(sel)]
        write(sel, fma(*np.broadcast_arrays(*values)) if ins.base == "fma" else _BINARY[ins.base](*values))

    return execute


def transcendental(registers: Registers, ins: Instruction, perturb: Perturb) -> Execute:
    """ex2, lg2, rcp, sqrt, rsqrt, sin, cos, tanh: rounded from float64."""
    kind, parts = ins.kind, ins.parts
    if kind not in ("f32", "f16", "f64"):
        raise PtxError(f"{ins.name}: not simulated")
    read, write, function = (
        registers.reader(ins.operands[1], kind),
        registers.writer(ins.operands[0]),
        _APPROXIMATE[ins.base],
    )

    def execute(sel: Selection) -> None:
        value = to_float(read(sel), kind)
        value = flush(value) if "ftz" in parts else value
        result = function(value.astype(np.float64)).astype(value.dtype)
        if "approx" in parts:
            result = perturb(result, ins.base)
        write(sel, from_float(flush(result) if "ftz" in parts else result, kind))

    return execute


def _multiply(registers: Registers, ins: Instruction) -> Execute:
    """mul and mad of integers: .lo, .hi, .wide; mul24."""
    kind, parts, write = ins.kind, ins.parts, registers.writer(ins.operands[0])
    signed = kind[0] == "s"
    double = {2: "s32" if signed else "u32", 4: "s64" if signed else "u64"}.get(size_of(kind))
    reads = _sources(registers, ins, kind)
    if "wide" in parts:
        if double is None:
            raise PtxError(f"{ins.name}: no such instruction")
        wide = NUMPY[double]
        addend = registers.reader(ins.operands[3], double) if ins.base == "mad" else None

        def widening(sel: Selection) -> None:
            product = reads[0](sel).astype(wide) * reads[1](sel).astype(wide)
            write(sel, product if addend is None else product + addend(sel))

        return widening

    def high(a: Array, b: Array) -> Array:
        if double is not None:
            wide, shift = NUMPY[double], 8 * size_of(kind)
            return ((a.astype(wide) * b.astype(wide)) >> wide(shift)).astype(NUMPY[kind])
        low_a, low_b = a & np.uint64(0xFFFFFFFF), b & np.uint64(0xFFFFFFFF)
        high_a, high_b = a >> np.uint64(32), b >> np.uint64(32)
        if signed:
            raise PtxError("mul.hi.s64: not simulated")
        middle = high_a * low_b + ((low_a * low_b) >> np.uint64(32))
        other = low_a * high_b + (middle & np.uint64(0xFFFFFFFF))
        return high_a * high_b + (middle >> np.uint64(32)) + (other >> np.uint64(32))

    def execute(sel: Selection) -> None:
        values = [read(sel) for read in reads]
        product = high(values[0], values[1]) if "hi" in parts else values[0] * values[1]
        write(sel, product + values[2] if ins.base == "mad" else product)

    return execute


def _divide(a: Array, b: Array) -> tuple[Array, Array]:
    safe = np.where(b == 0, b.dtype.type(1), b)
    rest = np.fmod(a, safe)
    return np.where(b == 0, ~np.zeros_like(b), (a - rest) // safe), np.where(b == 0, a, rest)


def _bit_count(a: Array) -> Array:
    return np.bitwise_count(a).astype(np.uint32)


def _leading_zeros(a: Array) -> Array:
    width = a.dtype.itemsize * 8
    for shift in (1, 2, 4, 8, 16, 32):
        a = a | (a >> a.dtype.type(shift)) if shift < width else a
    return np.uint32(width) - _bit_count(a)


def _reverse(a: Array) -> Array:
    octets = np.ascontiguousarray(a).view(np.uint8).reshape(a.size, -1)
    return np.packbits(np.unpackbits(octets, axis=1)[:, ::-1], axis=1).reshape(-1).view(a.dtype)


def integer_arithmetic(registers: Registers, ins: Instruction) -> Execute:
    """Everything on integers and bits but comparison, conversion and moves."""
    base, kind = ins.base, ins.kind
    if base not in _INTEGER or any(p in ins.parts for p in ("cc", "sat")):
        raise PtxError(f"{ins.name}: not simulated")
    if base in ("mul", "mad", "mul24"):
        return _multiply(registers, ins)
    write = registers.writer(ins.operands[0])
    unsigned = {"s32": "u32", "s64": "u64", "s16": "u16"}.get(kind, kind) if base in ("popc", "clz", "brev") else kind
    reads = _sources(registers, ins, unsigned)
    unary: dict[str, Callable[[Array], Array]] = {
        "neg": np.negative,
        "abs": np.abs,
        "not": lambda a: ~a,
        "popc": _bit_count,
        "clz": _leading_zeros,
        "brev": _reverse,
        "cnot": lambda a: (a == 0).astype(a.dtype),
    }
    if base in unary:
        return lambda sel: write(sel, unary[base](reads[0](sel)))
    if base in ("div", "rem"):
        return lambda sel: write(sel, _divide(*np.broadcast_arrays(reads[0](sel), reads[1](sel)))[base == "rem"])
    if base in _BINARY:
        function = _BINARY[base]
        return lambda sel: write(sel, function(reads[0](sel), reads[1](sel)))
    if base == "bfind":
        if kind[0] == "s":
            raise PtxError(f"{ins.name}: not simulated")
        top, shift = np.uint32(8 * size_of(kind) - 1), "shiftamt" in ins.parts

        def find(sel: Selection) -> None:
            value = reads[0](sel)
            zeros = _leading_zeros(value)
            write(sel, np.where(value == 0, ~np.uint32(0), zeros if shift else top - zeros))

        return find
    return _shifts(registers, ins)


def _shifts(registers: Registers, ins: Instruction) -> Execute:
    base, kind, parts = ins.base, ins.kind, ins.parts
    write = registers.writer(ins.operands[0])
    if base in ("shl", "shr"):
        read, amount = registers.reader(ins.operands[1], kind), registers.reader(ins.operands[2], "u32")
        bits = 8 * size_of(kind)

        def shift(sel: Selection) -> None:
            value, by = read(sel), amount(sel)
            near = np.minimum(by, bits - 1).astype(value.dtype)
            moved = value << near if base == "shl" else value >> near
            lost = (by >= bits) & (base == "shl" or value.dtype.kind != "i")
            write(sel, np.where(lost, value.dtype.type(0), moved) if lost.any() else moved)

        return shift
    if base == "shf":
        low, high, amount = (registers.reader(t, "u32") for t in ins.operands[1:])

        def funnel(sel: Selection) -> None:
            by = amount(sel)
            by = (by & np.uint32(31) if "wrap" in parts else np.minimum(by, np.uint32(32))).astype(np.uint64)
            value = (high(sel).astype(np.uint64) << np.uint64(32)) | low(sel)
            moved = value >> by if "r" in parts else (value << by) >> np.uint64(32)
            write(sel, moved.astype(np.uint32))

        return funnel
    return _bit_fields(registers, ins)


def _bit_fields(registers: Registers, ins: Instruction) -> Execute:
    base, kind = ins.base, ins.kind
    write = registers.writer(ins.operands[0])
    if base == "prmt":
        if kind != "b32":
            raise PtxError(f"{ins.name}: not simulated")
        a, b = (registers.part(t, "u32") for t in ins.operands[1:3])
        selector = registers.reader(ins.operands[3], "u32")

        def permute(sel: Selection) -> None:
            pool = a(sel).astype(np.uint64) | (b(sel).astype(np.uint64) << np.uint64(32))
            pick, result = selector(sel), np.zeros(1, np.uint32)
            for i in range(4):
                which = (pick >> np.uint32(4 * i)) & np.uint32(15)
                octet = ((pool >> ((which & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)).astype(
                    np.uint32
                )
                sign = np.where(octet & np.uint32(128), np.uint32(255), np.uint32(0))
                result = result | (np.where(which & np.uint32(8), sign, octet) << np.uint32(8 * i))
            write(sel, result)

        return permute
    if base == "lop3":
        a, b, c = (registers.reader(t, "u32") for t in ins.operands[1:4])
        table = int(ins.operands[4], 0)

        def logic(sel: Selection) -> None:
            x, y, z = a(sel), b(sel), c(sel)
            result = np.zeros(1, np.uint32)
            for i in range(8):
                if table >> i & 1:
                    result = result | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
            write(sel, result)

        return logic
    if base in ("bfe", "bfi"):
        return _bit_extract(registers, ins)
    raise PtxError(f"{ins.name}: not simulated")


def _bit_extract(registers: Registers, ins: Instruction) -> Execute:
    kind, write = ins.kind, registers.writer(ins.operands[0])
    unsigned, bits = {"s32": "u32", "s64": "u64"}.get(kind, kind), 8 * size_of(kind)
    insert = ins.base == "bfi"
    values = [registers.reader(t, unsigned) for t in ins.operands[1 : 2 + insert]]
    start, length = (registers.reader(t, "u32") for t in ins.operands[2 + insert : 4 + insert])

    def field(sel: Selection) -> None:
        at, count = (np.minimum(r(sel) & np.uint32(255), bits).astype(np.uint64) for r in (start, length))
        word = values[0](sel).astype(np.uint64)
        one, zero = np.uint64(1), np.uint64(0)
        mask = np.where(count >= 64, ~zero, (one << np.minimum(count, 63).astype(np.uint64)) - one)
        near = np.minimum(at, 63).astype(np.uint64)
        if insert:
            result = (values[1](sel).astype(np.uint64) & ~(mask << near)) | ((word & mask) << near)
        else:
            result = np.where(at >= bits, zero, word >> near) & mask
            if kind[0] == "s":
                sign_at = np.minimum(at + np.maximum(count, one) - one, np.uint64(bits - 1))
                sign = (word >> sign_at) & one
                result = np.where(
                    (sign == 1) & (count > 0),
                    result | ~(mask >> np.where(at + count > bits, at + count - np.uint64(bits), zero)),
                    result,
                )
        write(sel, result.astype(NUMPY[unsigned]))

    return field


def _compare(name: str, x: Array, y: Array, floating: bool) -> Array:
    """eq, lt, …, and for floats the unordered forms equ, ltu, …, and num and nan."""
    if name in ("nan", "num"):
        return (np.isnan(x) | np.isnan(y)) ^ (name == "num")
    if name in _COMPARE:
        result = _COMPARE[name](x, y)
        return result & ~(np.isnan(x) | np.isnan(y)) if name == "ne" and floating else result
    return _COMPARE[name[:2]](x, y) | np.isnan(x) | np.isnan(y)


def comparison(registers: Registers, ins: Instruction) -> Execute:
    """setp with a second predicate combined in, of packed pairs as well (one predicate for each half)."""
    compare, kind = ins.parts[1], ins.kind
    if ins.base != "setp":
        raise PtxError(f"{ins.name}: not simulated")
    a, b = (registers.reader(t, kind) for t in ins.operands[1:3])
    third = registers.predicate(ins.operands[3]) if len(ins.operands) > 3 else None
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(ins.parts[2])
    writes = registers.destinations(ins.operands[0])
    half = {"f16x2": "f16", "bf16x2": "bf16"}.get(kind)
    floating = kind in FLOATS

    def halves(value: Array) -> list[Array]:
        if half is None:
            return [to_float(value, kind)]
        words = (value.astype(np.uint16), (value >> np.uint32(16)).astype(np.uint16))
        return [to_float(word.view(NUMPY[half]), half) for word in words]

    def execute(sel: Selection) -> None:
        pairs = list(zip(halves(a(sel)), halves(b(sel)), strict=True))
        if "ftz" in ins.parts:
            pairs = [(flush(x), flush(y)) for x, y in pairs]
        results = [_compare(compare, x, y, floating) for x, y in pairs]
        if not half:
            results.append(~results[0])
        for write, value in zip(writes, results, strict=False):
            write(sel, value if combine is None or third is None else combine(value, third(sel)))

    return execute
