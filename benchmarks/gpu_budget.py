"""A byte and instruction budget of the sampling kernels, computed from their compiled code. Nothing here is measured.

    python benchmarks/gpu_budget.py                      # V = 50257, bf16
    python benchmarks/gpu_budget.py --vocab 50257 128256 --dtype bfloat16 float32 --json budget.json

Each kernel is compiled (Triton; CUDA C++ where nvcc is found) and its PTX executed on the CPU for one row like a language
model's, with one pair and top-p 0.9 (--top-p). Bytes: whole 32-byte sectors that warps ask of global memory. Instructions: what warps
execute in PTX, times the ratio of the kernel's machine instructions to its PTX instructions. Times per row assume a full
chip: bytes at 3.35 TB/s, instructions at 132 multiprocessors × 4 schedulers × 1.7 GHz, one each; the larger of the two is
a lower bound of what a row costs in a large batch. Latencies, caches, barriers and half-empty chips are in none of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
BYTES_A_SECOND = 3.35e12
ISSUES_A_SECOND = 132 * 4 * 1.7e9


def _case(vocab: int, dtype: torch.dtype, top_p: float) -> Any:
    """One row of Zipf-like logits (the second shape of the tests' rows) with one pair that is on."""
    from tests.ops.sampling_cases import make_case

    row = (top_p, 0, 0.0, 1.0)  # no top-k, no min-p, temperature 1
    case = make_case(vocab, [row] * 2, pairs=1, dtype=dtype, padding=-vocab % 16, seed=1).rows(torch.tensor([1]))
    case.alpha = torch.ones(1, 1)
    # Indexing dropped the rows' padding; put it back, as models' own vocabularies are padded.
    for name in ("target", "expert", "anti_expert"):
        tensor = getattr(case, name)
        wide = torch.zeros(*tensor.shape[:-1], vocab + -vocab % 16, dtype=dtype)
        wide[..., :vocab] = tensor
        setattr(case, name, wide[..., :vocab])
    return case


def _row(name: str, machine: Any, figures: Any, arch: int, threads: int, dynamic: int, case: Any) -> dict[str, Any]:
    """One kernel's line."""
    from tests.gpuless.sass import blocks_per_multiprocessor

    logits = 3 * case.target.element_size() * case.target.shape[1]
    executed = sum(machine.instructions.values()) * figures.instructions / len(machine.kernel.code)
    sectors = sum(machine.memory.sectors.values()) + sum(machine.memory.stored.values())
    blocks = blocks_per_multiprocessor(arch, figures.registers, threads, figures.shared, dynamic)
    return {
        "kernel": name,
        "arch": f"sm_{arch}",
        "vocab": case.target.shape[1],
        "dtype": str(case.target.dtype).removeprefix("torch."),
        "registers": figures.registers,
        "spilled_bytes": figures.local,
        "shared_bytes": figures.shared + dynamic,
        "threads": threads,
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": blocks * threads // 32,
        "fp64": figures.fp64,
        "wide_loads": figures.wide_loads,
        "kib": sectors / 1024,
        "reads_of_the_logits": sum(machine.memory.loaded[n] for n in ("target", "expert", "anti")) / logits,
        "thousand_warp_instructions": executed / 1000,
        "ns_of_bytes": 1e9 * sectors / BYTES_A_SECOND,
        "ns_of_instructions": 1e9 * executed / ISSUES_A_SECOND,
    }


def triton_rows(case: Any, arch: int, one_launch: bool) -> list[dict[str, Any]]:
    """The Triton kernels' lines."""
    from tests.gpuless import triton_launch
    from tests.gpuless.aot import compile_call
    from tests.gpuless.sass import figures
    from tests.gpuless.triton_sample import launches

    _, machines = triton_launch.run(case, arch, "cluster" if one_launch else "two launches")
    planned, _ = launches(case, one_launch=one_launch, capability=divmod(arch, 10))
    result = []
    for call, machine in zip(planned, machines, strict=True):
        built = compile_call(call.kernel, arch, call.arguments, **call.options)
        (found,) = figures(built.asm["cubin"]).values()
        name = f"Triton {call.kernel.__name__}"
        result.append(_row(name, machine, found, arch, machine.block[0], built.metadata.shared, case))
    return result


def cuda_rows(case: Any, arch: int, form: str) -> list[dict[str, Any]]:
    """The CUDA kernels' lines."""
    from tests.gpuless import cuda_sample
    from tests.gpuless.sass import figures

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        command = ["nvcc", "-std=c++17", f"-arch=sm_{arch}", "-cubin", str(cuda_sample.SOURCE), "-o", file.name]
        subprocess.run(command, check=True, capture_output=True)
        found = figures(Path(file.name).read_bytes())
    _, machines = cuda_sample.run(case, arch, form)
    result = []
    for name, machine in zip(("cluster",) if form == "cluster" else ("visit", "finish"), machines, strict=True):
        dynamic = machine.shared.size - machine.kernel.static_shared
        own = found[machine.kernel.name]
        result.append(_row(f"CUDA ensemble_sample_{name}", machine, own, arch, machine.block[0], dynamic, case))
    return result


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[50257])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        import triton  # noqa: F401
    except ImportError:
        sys.exit("gpu_budget: needs triton (it also brings the disassembler)")
    from tests.gpuless import cuda_sample

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    what = f"one row, one pair, top-p {options.top_p}, against an H100's roofline"
    print(f"Computed from compiled code, not measured: {what}.\n")
    print(
        "| kernel | | V, dtype | registers, spills | shared KB | warps/SM | KiB | reads of logits | 10³ warp instr. | ns of bytes | ns of instr. |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for vocab in options.vocab:
        for dtype in options.dtype:
            case = _case(vocab, getattr(torch, dtype), options.top_p)
            jobs: list[Any] = [(triton_rows, 90, True), (triton_rows, 90, False), (triton_rows, 80, False)]
            if cuda_sample.has_nvcc():
                jobs += [(cuda_rows, 90, "cluster"), (cuda_rows, 80, "two launches")]
            for job, arch, form in jobs:
                for row in job(case, arch, form):
                    rows.append(row)
                    print(
                        f"| {row['kernel']} | {row['arch']} | {vocab} {dtype} | {row['registers']}, {row['spilled_bytes']} | "
                        f"{row['shared_bytes'] / 1024:.1f} | {row['warps_per_multiprocessor']} | {row['kib']:.0f} | "
                        f"{row['reads_of_the_logits']:.2f} | {row['thousand_warp_instructions']:.0f} | "
                        f"{row['ns_of_bytes']:.0f} | {row['ns_of_instructions']:.0f} |",
                        flush=True,
                    )
    if options.json:
        options.json.write_text(json.dumps({"computed_not_measured": True, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
