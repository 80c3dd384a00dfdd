"""What reads compiled kernels sees spills, doubles and occupancy."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.gpuless import sample_kernels as kernels
from tests.gpuless.aot import compile_for
from tests.gpuless.sass import blocks_per_multiprocessor, figures

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
SPILLS = r"""
extern "C" __global__ void __launch_bounds__(1024, 2) spills(const double* x, double* y, int n) {
  double held[40];
#pragma unroll
  for (int i = 0; i < 40; i++) held[i] = x[i * n + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 40; i++) y[i * n + threadIdx.x] = held[i] * held[39 - i];
}
"""


def test_spills_and_fp64_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    cubin = tmp_path / "spills.cubin"
    subprocess.run(["nvcc", "-arch=sm_90", "-cubin", str(source), "-o", str(cubin)], check=True)
    (kernel,) = figures(cubin.read_bytes()).values()
    assert kernel.local > 0
    assert kernel.fp64
    assert kernel.shared == 0  # the driver's kilobyte is not the kernel's


@pytest.mark.parametrize("arch", [80, 90])
def test_both_formats_of_cubins_are_read(arch: int) -> None:
    """Triton's assembler writes the older one for the older architectures."""
    built = compile_for(kernels.doubles, arch, {"x": "*fp32", "out": "*fp32"}, {"BLOCK": 64})
    (kernel,) = figures(built.asm["cubin"]).values()
    assert kernel.fp64
    assert kernel.registers > 0


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(32, 1024, 0, 2), (64, 512, 0, 2), (65, 512, 0, 1), (32, 256, 0, 8), (32, 128, 100_000, 2), (32, 128, 120_000, 1)],
)
def test_occupancy_of_an_h100(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(90, registers, threads, 0, shared) == blocks
