"""The register file: every register an array over all threads, operands decoded once into functions."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.gpuless.ptxsim import memory
from tests.gpuless.ptxsim.parser import Kernel
from tests.gpuless.ptxsim.values import NUMPY, SIGNED, UNSIGNED, Array, PtxError, as_type, immediate

_LITERAL = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
_ADDRESS = re.compile(r"\[\s*([%\w$@.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@dataclass(slots=True)
class Selection:
    """The threads that execute an instruction: indices, the cheapest way to index with them, and how many warps."""

    threads: Array
    index: slice | Array
    warps: int = 0

    @property
    def size(self) -> int:
        """How many threads."""
        return self.threads.size


Reader = Callable[[Selection], Array]
Writer = Callable[[Selection, Array], None]


class Registers:
    """Registers and special registers of all threads of a launch.

    Reading gives an array over the selected threads, or of one element where the operand is a literal; so results
    broadcast. A read of a register that was never set is an error.
    """

    def __init__(self, kernel: Kernel, special: dict[str, Array], threads: int) -> None:
        self.kernel, self.special, self.threads = kernel, special, threads
        self.values = {r: np.zeros(threads, NUMPY[k]) for r, k in kernel.registers.items()}
        self.unset = {r: np.ones(threads, bool) for r in kernel.registers}
        written = {
            name.strip()
            for ins in kernel.code
            if ins.operands and ins.base not in ("st", "red", "bra", "bar", "barrier")
            for name in re.split(r"[,|]", ins.operands[0].strip("{} "))
        }
        self.never_written = kernel.registers.keys() - written
        symbols = {name: memory.SHARED | offset for name, offset in kernel.shared.items()}
        symbols |= {name: memory.LOCAL | offset for name, offset in kernel.local.items()}
        symbols |= {p.name: memory.PARAMETER | p.offset for p in kernel.parameters}
        place = 0
        for name, data in kernel.constants.items():
            symbols[name] = memory.CONSTANT | place
            place = -(-(place + data.size) // 16) * 16
        self.symbols = symbols
        self.touch: dict[str, Callable[[Selection], None]] = {}  # called before each access but those of wgmma

    def reader(self, token: str, kind: str) -> Reader:
        """A function from a selection to the operand's values as the PTX type ``kind``."""
        read, touch = self.quiet_reader(token, kind), self.touch.get(token)
        if touch is None:
            return read

        def touching(sel: Selection) -> Array:
            touch(sel)
            return read(sel)

        return touching

    def quiet_reader(self, token: str, kind: str) -> Reader:
        """The same for an access that ``touch`` does not hear of."""
        if token in self.values:
            values, unset = self.values[token], self.unset

            def read(sel: Selection) -> Array:
                gaps = unset.get(token)
                if gaps is not None and gaps[sel.index].any():
                    raise PtxError(f"read of register {token.split('@')[0]}, which is not set")
                return as_type(values[sel.index], kind)

            return read
        if token in self.special:
            special = self.special[token]
            return lambda sel: as_type(special[sel.index], kind)
        if token in self.symbols:
            number = self.symbols[token]
            number = number if number & memory.CONSTANT else number & memory.WINDOW
            fixed = as_type(np.array([number], np.uint64), kind)
            return lambda sel: fixed
        if token == "WARP_SZ":
            token = "32"
        if _LITERAL.fullmatch(token) is None:
            raise PtxError(f"operand not understood: {token}")
        literal = immediate(token, kind)
        return lambda sel: literal

    def part(self, token: str, kind: str) -> Reader:
        """An operand of a pack or permutation: the compiler may leave a half undefined that nobody looks at; here it is all ones."""
        if token not in self.never_written:
            return self.reader(token, kind)
        undefined = ~np.zeros(1, NUMPY[kind])
        return lambda sel: undefined

    def predicate(self, token: str) -> Reader:
        """A predicate operand, ``!`` in front of it negates."""
        read = self.reader(token.lstrip("!"), "pred")
        return (lambda sel: ~read(sel)) if token.startswith("!") else read

    def writer(self, token: str) -> Writer:
        """A function that sets the register for a selection of threads."""
        write, touch = self.quiet_writer(token), self.touch.get(token)
        if touch is None:
            return write

        def touching(sel: Selection, value: Array) -> None:
            touch(sel)
            write(sel, value)

        return touching

    def quiet_writer(self, token: str) -> Writer:
        """The same for an access that ``touch`` does not hear of."""
        if token == "_":
            return lambda sel, value: None
        if token not in self.values:
            raise PtxError(f"destination not understood: {token}")
        values, unset, every = self.values[token], self.unset, self.threads
        dtype = values.dtype
        width = dtype.itemsize

        def write(sel: Selection, value: Array) -> None:
            if value.dtype != dtype:
                if dtype == np.bool_ or value.dtype == np.bool_:
                    value = value.astype(dtype)
                elif value.dtype.itemsize == width:
                    value = np.ascontiguousarray(value).view(dtype)
                else:
                    family = SIGNED if value.dtype.kind == "i" else UNSIGNED
                    narrow = np.ascontiguousarray(value).view(family[value.dtype.itemsize])
                    value = narrow.astype(family[width]).view(dtype)
            values[sel.index] = value
            gaps = unset.get(token)
            if gaps is not None:
                if sel.size == every:
                    del unset[token]
                else:
                    gaps[sel.index] = False

        return write

    def destinations(self, token: str) -> list[Writer]:
        """Writers of ``d``, ``{d, e, …}`` or ``d|p``."""
        names = re.split(r"[,|]", token.strip("{} "))
        return [self.writer(name.strip()) for name in names]

    def address(self, token: str) -> Reader:
        """``[register+offset]``, ``[symbol+offset]`` or ``[number]`` as uint64, one for each selected thread."""
        found = _ADDRESS.fullmatch(token.strip())
        if found is None:
            raise PtxError(f"address not understood: {token}")
        base, offset = found[1], int(found[2] or "0", 0)
        narrow = base in self.values and self.values[base].dtype.itemsize == 4
        read = self.reader(base, "u32" if narrow else "u64")
        step = np.uint64(offset & (2**64 - 1))
        limit = np.uint64(2**32 - 1 if narrow else 2**64 - 1)

        def resolve(sel: Selection) -> Array:
            with np.errstate(over="ignore"):
                value = (read(sel).astype(np.uint64) + step) & limit
            return np.broadcast_to(value, (sel.size,))

        return resolve
