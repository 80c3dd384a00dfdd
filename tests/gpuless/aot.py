"""Compiles a ``@triton.jit`` kernel for a GPU that isn't there, and reads what came out."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: What a test may compile for, by the number of an NVIDIA architecture or the name of an AMD one.
TARGETS: dict[int | str, GPUTarget] = {
    **{sm: GPUTarget("cuda", sm, 32) for sm in (80, 86, 89, 90, 100, 120)},
    **{gfx: GPUTarget("hip", gfx, 64) for gfx in ("gfx90a", "gfx942", "gfx950")},
}
_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


def compile_for(
    kernel: Any,
    arch: int | str,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    divisible_by_16: tuple[str, ...] = (),
    **options: Any,
) -> Any:
    """The compiled kernel for a signature written by hand, as ``{"x_ptr": "*fp32", "n": "i32"}``."""
    given = (signature, constexprs, options)
    return _compiled(kernel, arch, divisible_by_16, *(tuple(sorted(x.items())) for x in given))


@functools.lru_cache(maxsize=512)
def _compiled(kernel: Any, arch: int | str, divisible: tuple[str, ...], *given: tuple[tuple[str, Any], ...]) -> Any:
    """Once for each way to compile a kernel: it takes a second or more, and most calls differ in their values alone."""
    signature, constexprs, options = map(dict, given)
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    return triton.compile(ASTSource(kernel, types, constexprs, hints), target=TARGETS[arch], options=options)


def is_compiled_in(parameter: Any, value: Any) -> bool:
    """Whether a parameter is no argument of the compiled kernel, because Triton's launcher makes its value a constant."""
    one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
    return parameter.is_constexpr or value is None or one


def compile_call(kernel: Any, arch: int | str, arguments: dict[str, Any], **options: Any) -> Any:
    """The compiled kernel for the arguments of a call, specialised on them as Triton's launcher does."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        if is_compiled_in(parameter, value):
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if value.device.type == "meta" or value.data_ptr() % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    return compile_for(kernel, arch, signature, constexprs, tuple(divisible), **options)


@dataclass(frozen=True)
class Resources:
    """What the assembler says a kernel needs, per thread; shared memory in bytes per block."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


def resources(compiled: Any) -> Resources:
    """Registers, spills and stack from ptxas (NVIDIA) or from the kernel descriptor (AMD)."""
    if "amdgcn" in compiled.asm:
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", compiled.asm["amdgcn"], re.M)}
        return Resources(
            found["vgpr_count"],
            4 * found["vgpr_spill_count"],  # scalar registers spill to lanes of vector registers, not to memory
            found["private_segment_fixed_size"],
            found["group_segment_fixed_size"],
        )
    arch = compiled.metadata.target.arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        name = f"sm_{arch}" + ("a" if arch >= 90 else "")
        command = [_tool("ptxas" if arch < 90 else "ptxas_blackwell"), "-v", f"--gpu-name={name}", str(source)]
        command += ["-o", str(source.with_suffix(".cubin"))]
        if not compiled.metadata.enable_fp_fusion:
            command.append("--fmad=false")
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def number(pattern: str) -> int:
        match = re.search(pattern, said)
        return int(match[1]) if match else 0

    return Resources(
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        number(r"(\d+) bytes stack frame"),
        compiled.metadata.shared,
    )


def sass(compiled: Any) -> str:
    """The machine code of an NVIDIA target, disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [_tool("nvdisasm"), "-c", "-ndf", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(text: str) -> list[str]:
    """The instructions of a disassembly, in order, predicates kept."""
    return [match[1].strip() for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)]


def opcodes(text: str) -> Counter[str]:
    """How often each machine instruction occurs, modifiers included (``LDG.E.128``)."""
    found: Counter[str] = Counter()
    for instruction in instructions(text):
        match = re.match(r"(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", instruction)
        if match:
            found[match[1]] += 1
    return found


def loops(text: str) -> list[list[str]]:
    """The instructions between the target of each backward branch and the branch."""
    label_at: dict[str, int] = {}
    waiting: list[str] = []
    code: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            waiting.append(label[1])
        if found := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            code.append((int(found[1], 16), found[2]))
            label_at.update(dict.fromkeys(waiting, code[-1][0]))
            waiting.clear()
    bodies = []
    for at, instruction in code:
        target = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if target and label_at.get(target[1], at + 1) < at:
            bodies.append([other for place, other in code if label_at[target[1]] <= place <= at])
    return bodies


def uses_fp64(text: str) -> bool:
    """Whether a disassembly computes in double precision."""
    return any(re.match(r"(DADD|DMUL|DFMA|DSETP|F2F\.F64|F2F\.F32\.F64|I2F\.F64)", name) for name in opcodes(text))


def _tool(name: str) -> str:
    return str(getattr(knobs.nvidia, name).path)
