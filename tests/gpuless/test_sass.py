"""Budgets of the compiled sampling kernels: no spills, no fp64, 16-byte loads, registers, shared memory, occupancy."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
from tests.gpuless import cuda_sample
from tests.gpuless.sass import Figures, blocks_per_multiprocessor, figures

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


def compiled(source: Path, arch: int, folder: Path) -> dict[str, Figures]:
    out = folder / "module.cubin"
    subprocess.run(["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(out)], check=True)
    return figures(out.read_bytes())


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cuda_ensemble_sample_keeps_its_budget(arch: int, tmp_path: Path) -> None:
    if not cuda_sample.SOURCE.exists():
        pytest.skip("no CUDA source")
    kernels = compiled(cuda_sample.SOURCE, arch, tmp_path)
    assert len(kernels) == 9  # three kernels of three dtypes
    for name, kernel in kernels.items():
        if "cluster" in name and arch == 80:
            continue  # empty there
        print(f"\nsm_{arch} {name[30:60]} {kernel}")
        assert kernel.instructions > 100
        assert kernel.local == 0
        assert not kernel.fp64
        assert kernel.registers <= 64
        assert any(".128" in load for load in kernel.loads_in_loops)
        # 512 threads; the scores of 128256 tokens in fp32 over eight blocks, twice where the nucleus is the target's.
        for dynamic in (64128, 128256) if "cluster" in name else (0,):
            blocks = blocks_per_multiprocessor(arch, kernel.registers, cuda_sample.THREADS, kernel.shared, dynamic)
            assert blocks >= (1 if dynamic == 128256 else 2), (name, dynamic)


def test_spills_and_fp64_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    (kernel,) = compiled(source, 90, tmp_path).values()
    assert kernel.local > 0
    assert kernel.fp64


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [(32, 1024, 0, 2), (64, 512, 0, 2), (65, 512, 0, 1), (32, 256, 0, 8), (32, 128, 100_000, 2), (32, 128, 120_000, 1)],
)
def test_occupancy_of_an_h100(registers: int, threads: int, shared: int, blocks: int) -> None:
    assert blocks_per_multiprocessor(90, registers, threads, 0, shared) == blocks
