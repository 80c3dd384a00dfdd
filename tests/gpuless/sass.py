"""Figures of compiled kernels from their cubins: registers, spills, shared memory, instructions, occupancy."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from tests.gpuless.aot import loops, opcodes, uses_fp64

#: What the driver keeps of a block's shared memory from sm_90 on: cuobjdump counts it, and the occupancy header adds it.
_RESERVED = 1024
_INCLUDE = Path(knobs.nvidia.ptxas.path).parents[1] / "include"


@dataclass(frozen=True)
class Figures:
    """What the assembler made of one kernel. ``shared`` is the static part in bytes, without what the driver keeps for
    itself; ``local`` bytes are spills and stack.

    ``wide_loads`` are instructions that load 16 bytes from global memory, ``instructions`` all but NOP.
    """

    registers: int
    shared: int
    local: int
    instructions: int
    wide_loads: int
    loads_in_loops: tuple[str, ...]
    fp64: bool


def _tool(name: str, *arguments: str) -> str:
    path = str(getattr(knobs.nvidia, name).path)
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def figures(cubin: bytes) -> dict[str, Figures]:
    """Each kernel of a cubin by its (mangled) name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        text = _tool("nvdisasm", "-c", "-ndf", file.name)
    target = re.search(r"(?:\.target\s+sm_|EF_CUDA_SM)(\d+)", text)  # two formats of ELF header
    assert target is not None
    reserved = _RESERVED if int(target[1]) >= 90 else 0
    bodies = dict(re.findall(r"(?ms)^\s*\.section\s+\.text\.([\w$]+)(.*?)(?=^\s*\.section\s|\Z)", text))
    result = {}
    for name, numbers in re.findall(r"Function ([\w$]+):\s*\n(.*)", usage):
        found = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", numbers)}
        ops = opcodes(bodies[name])
        inside = {re.sub(r"^@!?U?P\w+\s+", "", i).split()[0] for loop in loops(bodies[name]) for i in loop}
        result[name] = Figures(
            found["REG"],
            max(0, found.get("SHARED", 0) - reserved),
            found.get("LOCAL", 0) + found.get("STACK", 0),
            sum(n for op, n in ops.items() if op != "NOP"),
            sum(n for op, n in ops.items() if re.match(r"LDG\.E(\.\w+)*\.128", op)),
            tuple(sorted(op for op in inside if op.startswith("LDG"))),
            uses_fp64(bodies[name]),
        )
    return result


@functools.cache
def _calculator() -> Path:
    program = Path(tempfile.mkdtemp()) / "occupancy"
    source = Path(__file__).with_name("occupancy.cc")
    subprocess.run(["g++", "-std=c++17", f"-I{_INCLUDE}", str(source), "-o", str(program)], check=True)
    return program


def blocks_per_multiprocessor(arch: int, registers: int, threads: int, shared: int, dynamic: int = 0) -> int:
    """Blocks that one multiprocessor holds at once, as NVIDIA's cuda_occupancy.h computes it."""
    numbers = map(str, (arch, registers, threads, shared, dynamic))
    return int(subprocess.run([str(_calculator()), *numbers], capture_output=True, text=True, check=True).stdout)
