"""The CUDA kernels compiled for GPUs that are not here: registers, spills, shared memory, wide loads, no fp64, occupancy.

None of this is a measurement: it is what the compiler says of sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from ensemble_decode.ops import library

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "ensemble_sample.cu"
NVCC = shutil.which("nvcc")
THREADS = 512
#: Two blocks of 512 threads share the 65,536 registers of a multiprocessor.
REGISTERS = 64
#: Histogram, exchange slots, pairs.
STATIC_SHARED = 10_496


def _nvidia(tool: str) -> str | None:
    try:
        from triton import knobs

        return str(getattr(knobs.nvidia, tool).path)
    except ImportError:
        return shutil.which(tool)


CUOBJDUMP = _nvidia("cuobjdump")
pytestmark = pytest.mark.skipif(
    NVCC is None or CUOBJDUMP is None, reason="needs nvcc, and Triton's or its own cuobjdump"
)


@dataclass
class Kernel:
    """What the compiler made of one kernel."""

    registers: int
    shared: int
    stack: int
    spilled: int
    opcodes: Counter[str]

    @property
    def wide_loads(self) -> int:
        return sum(n for name, n in self.opcodes.items() if re.match(r"LDG\.E(\.\w+)*\.128", name))

    @property
    def fp64(self) -> list[str]:
        return [
            name for name in self.opcodes if re.match(r"(DADD|DMUL|DFMA|DSETP|MUFU\.\w*64H|F2F\.F64|I2F\.F64)", name)
        ]


def compiled(folder: Path, arch: int, source: Path = SOURCE) -> dict[str, Kernel]:
    """Every kernel of a source for one architecture, by name and element type: ``cluster<float>``."""
    cubin = folder / f"{source.stem}-{arch}.cubin"
    command = [str(NVCC), "-O3", "-std=c++17", "--fmad=false", f"-arch=sm_{arch}", "-Xptxas=-v", "-cubin"]
    report = subprocess.run(
        [*command, str(source), "-o", str(cubin)], check=True, capture_output=True, text=True
    ).stderr
    sass = subprocess.run([str(CUOBJDUMP), "-sass", str(cubin)], check=True, capture_output=True, text=True).stdout
    opcodes = {}
    for part in sass.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", body, re.MULTILINE)
        opcodes[name.strip()] = Counter(found)
    kernels = {}
    for part in report.split("Compiling entry function '")[1:]:
        mangled = part.partition("'")[0]
        name = re.search(r"ensemble_sample_(\w+?)I(f|NS_8bfloat16E|NS_7float16E)E", mangled)
        assert name, mangled
        kind = {"f": "float32", "NS_8bfloat16E": "bfloat16", "NS_7float16E": "float16"}[name[2]]

        def number(pattern: str, text: str = part) -> int:
            found = re.search(pattern, text)
            return int(found[1]) if found else 0

        kernels[f"{name[1]} {kind}"] = Kernel(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes smem"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
            opcodes[mangled],
        )
    return kernels


@pytest.fixture(scope="module")
def occupancy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("occupancy") / "occupancy"
    nvcc = subprocess.run([str(NVCC), "--dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    include = Path(re.findall(r" TOP=(.*)", nvcc)[0].strip()) / "include"
    source = Path(__file__).parent / "occupancy.cc"
    subprocess.run(["g++", "-std=c++17", f"-I{include}", str(source), "-o", str(program)], check=True)
    return program


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_the_compiler_says(arch: int, tmp_path: Path, occupancy: Path, capsys: pytest.CaptureFixture) -> None:
    kernels = compiled(tmp_path, arch)
    assert len(kernels) == 9
    for name, kernel in kernels.items():
        assert kernel.stack == kernel.spilled == 0, f"{name} on sm_{arch}: {kernel}"
        assert kernel.registers <= REGISTERS, f"{name} on sm_{arch}: {kernel.registers} registers"
        assert kernel.shared <= STATIC_SHARED, f"{name} on sm_{arch}: {kernel.shared} bytes of shared memory"
        assert not kernel.fp64, f"{name} on sm_{arch}: {kernel.fp64}"
        # Of z, z⁺ and z⁻, once for rows on 16 bytes and twice for others: whatever the vocabulary.
        reads = "visit" in name or ("cluster" in name and arch >= 90)
        assert kernel.wide_loads >= (9 if reads else 0), f"{name} on sm_{arch}: {kernel.wide_loads} loads of 16 bytes"
        if "cluster" in name and arch < 90:
            continue
        line = f"sm_{arch} {name}: {kernel.registers} registers, {kernel.shared} bytes static shared"
        for vocab in (50257, 128256) if "cluster" in name else (0,):
            slice_bytes = 4 * (-(-vocab // 8 // 8) * 8)
            words = [occupancy, arch, kernel.registers, kernel.shared + slice_bytes, THREADS]
            blocks = int(subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True).stdout)
            assert blocks >= 2, f"{name} on sm_{arch}: {blocks} blocks at a vocabulary of {vocab}"
            line += f", {blocks} blocks" + (f" at V = {vocab}" if vocab else "")
        with capsys.disabled():
            print(f"\n{line}", end="")


def test_the_checks_notice_what_they_look_for(tmp_path: Path) -> None:
    """The negative control: too few registers, arithmetic in doubles, loads of one element."""
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    row = folder / "cuda" / "row.cuh"
    text = row.read_text()
    for right, wrong in (
        (
            "return exp2f(__fmul_rn(d, 1.44269504088896341f));",
            "return static_cast<float>(exp2(d * 1.44269504088896341));",
        ),
        ("if (past == 0 && at + n <= vocab)", "if (false)"),
        ("if (past != 0 && at >= shift", "if (false && at >= shift"),
    ):
        assert right in text
        text = text.replace(right, wrong)
    row.write_text(text)
    sample = folder / "cuda" / "ensemble_sample.cuh"
    sample.write_text(sample.read_text().replace("__launch_bounds__(kThreads, 2)", "__launch_bounds__(kThreads, 4)"))
    planted = compiled(tmp_path, 90, folder / "cuda" / "ensemble_sample.cu")
    assert any(kernel.spilled and kernel.stack for kernel in planted.values())
    assert all(kernel.fp64 for kernel in planted.values())
    assert not any(kernel.wide_loads for name, kernel in planted.items() if "visit" in name)


@pytest.mark.skipif(not library.available, reason="the compiled operators are not built")
def test_the_library_needs_no_cuda_to_load() -> None:
    """Where it was built with CUDA: the operator is there, for all three architectures, with no library of NVIDIA's."""
    path = ROOT / "ensemble_decode" / "_C.abi3.so"
    if b"ensemble_sample_cuda" not in path.read_bytes():
        pytest.skip("built without CUDA")
    elves = subprocess.run(
        [str(CUOBJDUMP), "--list-elf", "--list-ptx", str(path)], capture_output=True, text=True
    ).stdout
    assert [arch for arch in ("sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_100.ptx") if arch not in elves] == []
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
    assert "libcuda" not in needed
