"""The CUDA kernels compiled for GPUs that are not here: registers, spills, shared memory, wide loads, no fp64, occupancy.

None of this is a measurement: it is what the compiler says of sm_80, sm_90 and sm_100.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs the tools that Triton carries")

from triton import knobs

from ensemble_decode.ops import library

from .sass import Figures, blocks_per_multiprocessor, figures

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "ensemble_sample.cu"
NVCC = shutil.which("nvcc")
ARCHITECTURES = (80, 90, 100)
THREADS = 512
#: Two blocks of 512 threads share the 65,536 registers of a multiprocessor.
REGISTERS = 64
#: Histogram (and queues, in its place), exchange slots, pairs.
STATIC_SHARED = 10_352
TYPES = {"f": "float32", "NS_8bfloat16E": "bfloat16", "NS_7float16E": "float16"}
pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc")


def compiled(folder: Path, arch: int, source: Path = SOURCE) -> dict[str, Figures]:
    """Every kernel of a source for one architecture, by name and element type: ``cluster float32``."""
    cubin = folder / f"{source.stem}-{arch}.cubin"
    command = [str(NVCC), "-O3", "-std=c++17", "--fmad=false", f"-arch=sm_{arch}", "-cubin", str(source)]
    subprocess.run([*command, "-o", str(cubin)], check=True, capture_output=True)
    kernels = {}
    for mangled, kernel in figures(cubin.read_bytes()).items():
        name = re.search(r"ensemble_sample_(\w+?)I(f|NS_8bfloat16E|NS_7float16E)E", mangled)
        assert name, mangled
        kernels[f"{name[1]} {TYPES[name[2]]}"] = kernel
    return kernels


@pytest.fixture(scope="module")
def kernels_of(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Figures]]:
    folder = tmp_path_factory.mktemp("compiled")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(ARCHITECTURES, pool.map(lambda arch: compiled(folder, arch), ARCHITECTURES), strict=True))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_the_compiler_says(
    arch: int, kernels_of: dict[int, dict[str, Figures]], capsys: pytest.CaptureFixture
) -> None:
    kernels = kernels_of[arch]
    assert len(kernels) == 9
    for name, kernel in kernels.items():
        assert kernel.local == 0, f"{name} on sm_{arch}: {kernel}"
        assert kernel.registers <= REGISTERS, f"{name} on sm_{arch}: {kernel.registers} registers"
        assert kernel.shared <= STATIC_SHARED, f"{name} on sm_{arch}: {kernel.shared} bytes of shared memory"
        assert not kernel.fp64, f"{name} on sm_{arch}: {kernel}"
        # Of z, z⁺ and z⁻, once for rows on 16 bytes and twice for others: whatever the vocabulary.
        reads = "visit" in name or ("cluster" in name and arch >= 90)
        assert kernel.wide_loads >= (9 if reads else 0), f"{name} on sm_{arch}: {kernel.wide_loads} loads of 16 bytes"
        if "cluster" in name and arch < 90:
            continue  # empty there
        assert any(".128" in load for load in kernel.loads_in_loops), f"{name} on sm_{arch}: {kernel.loads_in_loops}"
        line = f"sm_{arch} {name}: {kernel.registers} registers, {kernel.shared} bytes static shared"
        # A row's scores over eight blocks, and as much again where the nucleus is the target's.
        for vocab, copies in ((50257, 1), (128256, 1), (128256, 2)) if "cluster" in name else ((0, 0),):
            dynamic = 4 * copies * (-(-vocab // 8 // 8) * 8)
            blocks = blocks_per_multiprocessor(arch, kernel.registers, THREADS, kernel.shared, dynamic)
            assert blocks >= (1 if copies == 2 else 2), f"{name} on sm_{arch}: {blocks} blocks, {dynamic} bytes shared"
            line += f", {blocks} blocks" + (f" at {dynamic} bytes dynamic" if dynamic else "")
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
            "return power_of_two(__fmul_rn(d, 1.44269504088896341f));",
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
    source = folder / "cuda" / "ensemble_sample.cu"
    source.write_text(re.sub(r"\n    case DType::b?float16:.*", "", source.read_text()))  # one type will do
    planted = compiled(tmp_path, 90, source)
    assert len(planted) == 3
    assert any(kernel.local for kernel in planted.values())
    assert all(kernel.fp64 for kernel in planted.values())
    assert not any(kernel.wide_loads for name, kernel in planted.items() if "visit" in name)


#: A CUDA runtime whose device has 1,000 bytes of shared memory for a block's asking, and a caller of two sizes.
HOST = """
#include "ensemble_sample.h"
#include <cstdio>
extern "C" {
cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1000, cudaSuccess; }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* own, const void*) { return own->sharedSizeBytes = 100, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) { return std::printf("%d\\n", value), cudaSuccess; }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void*, void**) {
  return std::printf("launch %zu\\n", config->dynamicSmemBytes), cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
}
int main() {
  ensemble_decode::SampleArgs args = {};
  args.rows = 1;
  for (size_t bytes = 400; bytes <= 800; bytes += 400)
    ensemble_decode::cuda::ensemble_sample(args, {true, 8, 8, bytes, 0}, nullptr, nullptr);
}
"""
#: What nvcc's code calls besides: registration, which nothing needs here.
INSIDE = ["GetKernel", "InitModule", "LaunchKernel", "PopCallConfiguration", "PushCallConfiguration"]
INSIDE += ["RegisterFatBinary", "RegisterFatBinaryEnd", "RegisterFunction", "UnregisterFatBinary"]


def test_a_launch_leaves_another_threads_its_shared_memory(tmp_path: Path) -> None:
    """The limit belongs to the kernel: set to a launch's own size, it would fail a larger one between the two calls."""
    (tmp_path / "host.cc").write_text(HOST)
    (tmp_path / "inside.c").write_text("".join(f"void* __cuda{name}() {{ return 0; }}\n" for name in INSIDE))
    command = [
        str(NVCC),
        "-std=c++17",
        "-arch=sm_90",
        "-cudart=none",
        f"-I{SOURCE.parent}",
        "-o",
        str(tmp_path / "host"),
    ]
    subprocess.run([*command, str(SOURCE), "host.cc", "inside.c"], check=True, capture_output=True, cwd=tmp_path)
    said = subprocess.run([tmp_path / "host"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["900", "launch 400", "900", "launch 800"]


@pytest.mark.skipif(not library.available, reason="the compiled operators are not built")
def test_the_library_needs_no_cuda_to_load() -> None:
    """Where it was built with CUDA: the operator is there, for all three architectures, with no library of NVIDIA's."""
    path = ROOT / "ensemble_decode" / "_C.abi3.so"
    if b"ensemble_sample_cuda" not in path.read_bytes():
        pytest.skip("built without CUDA")
    cuobjdump = str(knobs.nvidia.cuobjdump.path)
    elves = subprocess.run([cuobjdump, "--list-elf", "--list-ptx", str(path)], capture_output=True, text=True).stdout
    assert [arch for arch in ("sm_80.cubin", "sm_90.cubin", "sm_100.cubin", "sm_100.ptx") if arch not in elves] == []
    needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True).stdout
    assert "libcuda" not in needed
