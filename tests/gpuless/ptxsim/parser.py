"""PTX text to a list of instructions: one entry function, its parameters, registers, shared and constant variables."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from tests.gpuless.ptxsim.flow import ranks
from tests.gpuless.ptxsim.values import PtxError, size_of

_SHARED = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*$")
_LOCAL = re.compile(r"\.local\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*$")
_TABLE = re.compile(
    r"(?m)^(?:\.visible\s+|\.weak\s+)?\.(?:global|const)\s+(?:\.attribute\S*\s+)?(?:\.align\s+\d+\s+)?\.(\w+)\s+([\w$]+)"
    r"(?:\[(\d*)\])?\s*(?:=\s*(\{[^}]*\}|[^;]+))?;"
)


@dataclass(slots=True)
class Instruction:
    """One instruction: ``name`` split at its points, operands as text, and the guard predicate."""

    name: str
    operands: list[str]
    guard: str | None
    negated: bool
    text: str
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = self.name.split(".")

    @property
    def base(self) -> str:
        """The operation without its modifiers."""
        return self.parts[0]

    @property
    def kind(self) -> str:
        """The last modifier, in most instructions the type."""
        return self.parts[-1]


@dataclass(slots=True)
class Parameter:
    """A kernel parameter and its place in the parameter block."""

    name: str
    kind: str
    offset: int
    size: int


def split_operands(text: str) -> list[str]:
    """Split at the commas that are outside braces, brackets and parentheses."""
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def _statements(body: str) -> list[str]:
    """Cut a function's body into statements, ``label:``, and ``{`` and ``}`` of scopes (not of vector operands)."""
    result, current = [], ""
    for char in body:
        if char == ";" or (char in "{}" and not current.strip()):
            if current.strip():
                result.append(" ".join(current.split()))
            if char != ";":
                result.append(char)
            current = ""
            continue
        current += char
        if char == ":" and re.fullmatch(r"\s*[$%\w]+:", current):
            result.append(current.strip())
            current = ""
    if current.strip():
        raise PtxError(f"unfinished statement at the end of the kernel: {current.strip()[:60]!r}")
    return result


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    raise PtxError("the kernel's body has no closing brace")


class Kernel:
    """The entry function of a PTX module.

    Parameters
    ----------
    ptx : str
        A module as Triton (``compiled.asm["ptx"]``) or ``nvcc -ptx`` writes it.
    name : str, optional
        Which entry; the first one if not given.

    Attributes
    ----------
    code : list of Instruction
    labels : dict, label to index in ``code``
    registers : dict, name to PTX type
    shared : dict, name to offset; the dynamic array begins at ``static_shared``
    cluster : (x, y, z) of ``.reqnctapercluster``, or None
    rank : dict, first instruction of a block to its turn
    granule : the narrowest access to shared memory in bytes (1, 2 or 4)
    """

    def __init__(self, ptx: str, name: str | None = None) -> None:
        text = re.sub(r"//[^\n]*|(?m:^\s*\.(?:loc|file)\b[^\n]*$)", "", ptx)
        wanted = name or r"[\w$]+"
        entry = re.search(rf"\.entry\s+({wanted})\s*\((.*?)\)([^{{;]*)\{{", text, re.S)
        if entry is None:
            raise PtxError(f"no entry {name or ''} in the PTX")
        self.name, parameters, attributes = entry.groups()
        end = _closing(text, entry.end() - 1)
        body = text[entry.end() : end]
        self.version = self._word(text, "version")
        self.target = self._word(text, "target")
        self.parameters = self._parameters(parameters)
        self.threads = self._triple(attributes, "reqntid") or self._triple(attributes, "maxntid")
        self.cluster = self._triple(attributes, "reqnctapercluster")
        self.registers: dict[str, str] = {}
        self.shared: dict[str, int] = {}
        self.local: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.static_shared = 0
        self.local_bytes = 0
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        outside = text[: entry.start()] + text[end + 1 :]
        outside = re.sub(r"\.section\b[^{]*\{[^{}]*\}", "", outside)
        self.constants = {m[2]: self._constant(*m.groups()) for m in _TABLE.finditer(outside)}
        dynamic = []
        for statement in re.findall(r"(?m)^(?:\.\w+\s+)*?\.shared\b[^;{}]*", outside):
            dynamic += self._declare_shared(statement.strip())
        dynamic += self._read_body(body)
        if dynamic:
            self.static_shared = -(-self.static_shared // 16) * 16
            self.shared |= dict.fromkeys(dynamic, self.static_shared)
        self.block_end = self._blocks()
        self.rank = ranks(0, {start: self._successors(start) for start in self.block_end})
        sizes = [size_of(i.kind) for i in self.code if self._touches_shared(i)]
        self.granule = min([4, *sizes])

    @staticmethod
    def _touches_shared(instruction: Instruction) -> bool:
        generic = not {"global", "param", "local", "const"} & set(instruction.parts)
        return instruction.base in ("ld", "st", "atom", "red") and generic and instruction.kind != "b128"

    @staticmethod
    def _word(text: str, directive: str) -> str:
        found = re.search(rf"\.{directive}\s+(\S+)", text)
        return found[1].rstrip(",") if found else ""

    @staticmethod
    def _triple(attributes: str, directive: str) -> tuple[int, int, int] | None:
        found = re.search(rf"\.{directive}\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", attributes)
        return (int(found[1]), int(found[2] or 1), int(found[3] or 1)) if found else None

    @staticmethod
    def _parameters(text: str) -> list[Parameter]:
        result, offset = [], 0
        for one in filter(None, (p.strip() for p in text.split(","))):
            found = re.match(
                r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b.*\s)?([\w$]+)(?:\[(\d+)\])?$", one, re.S
            )
            if found is None:
                raise PtxError(f"parameter not understood: {one!r}")
            align, kind, name, count = found.groups()
            size = size_of(kind) * int(count or 1)
            offset = -(-offset // int(align or size_of(kind))) * int(align or size_of(kind))
            result.append(Parameter(name, kind, offset, size))
            offset += size
        return result

    @staticmethod
    def _constant(kind: str, name: str, count: str | None, values: str | None) -> np.ndarray:
        width = size_of(kind)
        words = re.findall(r"-?(?:0[xXfFdD][0-9a-fA-F]+|\d+)U?", values or "")
        numbers = [int(re.sub("^0[fFdD]", "0x", w).rstrip("U"), 0) & ((1 << 8 * width) - 1) for w in words]
        numbers += [0] * (int(count or 1) - len(numbers))
        return np.array(numbers, np.dtype(f"u{width}")).view(np.uint8)

    def _declare_shared(self, statement: str) -> list[str]:
        """Place a shared variable; a dynamic one (no size) is returned by name and placed behind all others."""
        found = _SHARED.search(statement)
        if found is None:
            raise PtxError(f"shared variable not understood: {statement!r}")
        align, kind, name, count = found.groups()
        if count == "":
            return [name]
        step = int(align or size_of(kind))
        self.shared[name] = -(-self.static_shared // step) * step
        self.static_shared = self.shared[name] + size_of(kind) * int(count or 1)
        return []

    def _declare(self, statement: str, suffix: str, scope: dict[str, str]) -> list[str]:
        """A directive inside the body."""
        if statement.startswith(".reg"):
            kind = statement.split()[1].lstrip(".")
            for item in statement.split(None, 2)[2].split(","):
                many = re.fullmatch(r"\s*([%\w$]+)<(\d+)>\s*", item)
                names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [item.strip()]
                for name in names:
                    scope[name] = name + suffix
                    self.registers[name + suffix] = kind
        elif ".shared" in statement:
            return self._declare_shared(statement)
        elif statement.startswith(".local"):
            found = _LOCAL.search(statement)
            if found is None:
                raise PtxError(f"local variable not understood: {statement!r}")
            step = int(found[1] or size_of(found[2]))
            self.local[found[3]] = -(-self.local_bytes // step) * step
            self.local_bytes = self.local[found[3]] + size_of(found[2]) * int(found[4] or 1)
        return []

    def _read_body(self, body: str) -> list[str]:
        dynamic: list[str] = []
        scopes: list[dict[str, str]] = [{}]
        opened, inside = 0, [""]  # suffixes of what the enclosing scopes declare
        branches: list[tuple[Instruction, list[str]]] = []
        pending = ""
        for statement in _statements(body):
            if statement == "{":
                opened += 1
                inside = [*inside, f"@{opened}"]
                scopes.append(dict(scopes[-1]))
            elif statement == "}":
                scopes.pop()
                inside = inside[:-1]
            elif re.fullmatch(r"[$%\w]+:", statement):
                pending = statement[:-1] + inside[-1]
                self.labels[pending] = len(self.code)
            elif statement.startswith(".branchtargets"):
                self.tables[pending] = split_operands(statement.split(None, 1)[1])
            elif statement.startswith("."):
                dynamic += self._declare(statement, inside[-1], scopes[-1])
            else:
                self._append(statement, scopes[-1] if len(scopes) > 1 else {})
                branches += [(self.code[-1], inside)] if self.code[-1].base == "bra" else []
        for branch, suffixes in branches:  # to the innermost label of that name, which may come later
            names = (branch.operands[0] + suffix for suffix in reversed(suffixes))
            branch.operands[0] = next((name for name in names if name in self.labels), branch.operands[0])
        return dynamic

    def _append(self, statement: str, scope: dict[str, str]) -> None:
        found = re.match(r"@(!?)([%\w$]+)\s+(.*)", statement)
        negated, guard, rest = (bool(found[1]), found[2], found[3]) if found else (False, None, statement)
        name, _, operands = rest.partition(" ")
        if scope:
            operands = re.sub(r"[%\w$]+", lambda m: scope.get(m[0], m[0]), operands)
            guard = scope.get(guard, guard) if guard else None
        self.code.append(Instruction(name, split_operands(operands), guard, negated, statement))

    def _blocks(self) -> dict[int, int]:
        """First instruction of each basic block to one past its last."""
        starts = {0} | set(self.labels.values())
        for i, instruction in enumerate(self.code):
            if instruction.base in ("bra", "brx", "ret", "exit", "trap"):
                starts.add(i + 1)
            elif instruction.base in ("bar", "barrier"):
                starts |= {i, i + 1}
        ordered = sorted(s for s in starts if s < len(self.code))
        return dict(zip(ordered, [*ordered[1:], len(self.code)], strict=True))

    def _successors(self, start: int) -> list[int]:
        """First instructions of the blocks that may follow a block."""
        end = self.block_end[start]
        last = self.code[end - 1]
        targets = {"bra": last.operands[:1], "brx": self.tables.get(last.operands[-1], []) if last.operands else []}
        following = [self.labels[t] for t in targets.get(last.base, [])]
        if last.guard is not None or last.base not in ("bra", "brx", "ret", "exit", "trap"):
            following.append(end)
        return [f for f in following if f in self.block_end]
