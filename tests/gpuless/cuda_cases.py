"""Runs the CUDA kernels' source on this machine's CPU: builds it with ``cuda_on_cpu.h``, passes cases, reads results."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ensemble_decode.ops import EnsembleSample
from tests.ops.sampling_cases import Case

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
SHIM = Path(__file__).parent / "cuda"
COMPILER = shutil.which("g++")
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def compile_for_cpu(source: Path, program: Path, *options: str, sources: Path = SOURCES) -> None:
    """Compiles C++ that includes the kernels of ``sources``, with the shim before it."""
    command = [
        str(COMPILER), "-std=c++17", "-O1", "-g1", "-ffp-contract=off", "-pthread", "-Wall", "-Werror",
        "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{sources / 'cuda'}", "-include", "cuda_on_cpu.h",
        *options, str(source), "-o", str(program),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


def build(program: Path, sanitizers: str = "", threads: int = 512, sources: Path = SOURCES, defines: str = "") -> Path:
    """The program that runs cases, optionally under sanitizers and with smaller blocks."""
    options = [f"-DED_CUDA_THREADS={threads}"]
    if defines:
        options.append(f"-D{defines}")
    if sanitizers:
        options += [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    compile_for_cpu(SHIM / "ensemble_sample_on_cpu.cc", program, *options, sources=sources)
    return program


def _bytes(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def _storage(x: Tensor | None) -> tuple[int, bytes]:
    """The memory from a tensor's first to its last element: (elements, bytes)."""
    if x is None:
        return 0, b""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return elements, _bytes(x.as_strided((elements,), (1,)))


def pack(case: Case, two_launches: bool = False, misaligned: int = 0) -> bytes:
    """A case as ensemble_sample_on_cpu.cc reads it; the target begins ``misaligned`` bytes behind a multiple of 16."""
    rows, vocab = case.target.shape
    expert, anti = case.expert, case.anti_expert
    target_elements, target = _storage(case.target)
    expert_elements, expert_bytes = _storage(expert)
    header = struct.pack(
        "16q",
        _DTYPES.index(case.target.dtype),
        rows,
        vocab,
        0 if expert is None else expert.shape[0],
        anti is not None,
        case.nucleus == "target",
        case.target_is_combined,
        two_launches,
        case.target.stride(0),
        *((0, 0) if expert is None else expert.stride()[:2]),
        *((0, 0) if anti is None else anti.stride()[:2]),
        target_elements,
        expert_elements,
        misaligned,
    )
    parameters = (case.alpha, case.temperature, case.top_k, case.top_p, case.min_p, case.seed, case.position)
    return b"".join(
        [header, target, expert_bytes, _storage(anti)[1], *(b"" if x is None else _bytes(x) for x in parameters)]
    )


def launch(program: Path, packed: Sequence[bytes], seed: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs the program over packed cases; the results lie beside it."""
    program.with_suffix(".cases").write_bytes(b"".join(packed))
    environment = {
        **os.environ,
        "ON_CPU_SEED": str(seed),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "halt_on_error=1:report_signal_unsafe=0",
    }
    arguments = [str(program), str(program.with_suffix(".cases")), str(program.with_suffix(".results"))]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)


def run(program: Path, cases: Sequence[Case], seed: int = 0, **options: int) -> list[EnsembleSample]:
    """What the kernels make of the cases."""
    done = launch(program, [pack(case, **options) for case in cases], seed)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr[-4000:]
    data = program.with_suffix(".results").read_bytes()
    samples = []
    for case in cases:
        rows = case.batch
        part, data = data[: 16 * rows], data[16 * rows :]
        floats = torch.frombuffer(bytearray(part[8 * rows :]), dtype=torch.float32)
        samples.append(
            EnsembleSample(torch.frombuffer(bytearray(part[: 8 * rows]), dtype=torch.int64), *floats.view(2, rows))
        )
    assert not data
    return samples
