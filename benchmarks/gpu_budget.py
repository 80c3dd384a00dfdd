"""A byte and instruction budget of the sampler's and attention's kernels, computed from their compiled code.

    python benchmarks/gpu_budget.py                      # V = 50257, bf16; a decode step over 4,096 positions
    python benchmarks/gpu_budget.py --vocab 50257 128256 --dtype bfloat16 float32 --json budget.json
    python benchmarks/gpu_budget.py --vocab --context 1024 --heads 9 3 64

Nothing here is measured. Each kernel is compiled (Triton; CUDA C++ where nvcc is found) and its PTX executed on the CPU: for
one row like a language model's, with one pair and top-p 0.9 (--top-p), and for one new token of one sequence. Bytes: whole
32-byte sectors that warps ask of global memory. Instructions: what warps execute in PTX, times the ratio of the kernel's machine
instructions to its PTX instructions. Times per row or token assume a full chip: bytes at 3.35 TB/s, instructions at 132
multiprocessors × 4 schedulers × 1.7 GHz, one each; the larger of the two is a lower bound of what a row costs in a large batch.
Latencies, caches, barriers and half-empty chips are in none of it, nor that a matrix product keeps its unit busy for longer.
"""

from __future__ import annotations

import argparse
import itertools
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


def _of_row(case: Any) -> dict[str, Any]:
    """What a kernel of the sampler works on."""
    return {"vocab": case.target.shape[1], "dtype": str(case.target.dtype).removeprefix("torch.")}


def _row(name: str, machine: Any, figures: Any, arch: int, dynamic: int, of: dict[str, Any]) -> dict[str, Any]:
    """One kernel's line; ``of`` says what it works on."""
    from tests.gpuless.sass import blocks_per_multiprocessor

    threads = machine.block[0]
    executed = sum(machine.instructions.values()) * figures.instructions / len(machine.kernel.code)
    sectors = sum(machine.memory.sectors.values()) + sum(machine.memory.stored.values())
    blocks = blocks_per_multiprocessor(arch, figures.registers, threads, figures.shared, dynamic)
    return {
        "kernel": name,
        "arch": f"sm_{arch}",
        **of,
        "registers": figures.registers,
        "spilled_bytes": figures.local,
        "shared_bytes": figures.shared + dynamic,
        "threads": threads,
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": blocks * threads // 32,
        "fp64": figures.fp64,
        "wide_loads": figures.wide_loads,
        "kib": sectors / 1024,
        "reads": _reads(machine, of),
        "thousand_warp_instructions": executed / 1000,
        "ns_of_bytes": 1e9 * sectors / BYTES_A_SECOND,
        "ns_of_instructions": 1e9 * executed / ISSUES_A_SECOND,
    }


def _reads(machine: Any, of: dict[str, Any]) -> float:
    """Bytes loaded of the logits, or of the keys and values that the token attends to, relative to their size."""
    loaded, size = machine.memory.loaded, getattr(torch, of["dtype"]).itemsize
    if "vocab" in of:
        return sum(loaded[n] for n in ("target", "expert", "anti")) / (3 * of["vocab"] * size)
    _, kv_heads, dim = of["heads"]
    return (loaded["k_cache"] + loaded["v_cache"]) / (2 * of["context"] * kv_heads * dim * size)


def _triton_lines(planned: Any, machines: list[Any], arch: int, of: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each launch of a Triton kernel."""
    from tests.gpuless.aot import compile_call
    from tests.gpuless.sass import figures

    result = []
    for call, machine in zip(planned, machines, strict=True):
        built = compile_call(call.kernel, arch, call.arguments, **call.options)
        (found,) = figures(built.asm["cubin"]).values()
        result.append(_row(f"Triton {call.kernel.__name__}", machine, found, arch, built.metadata.shared, of))
    return result


def triton_rows(case: Any, arch: int, one_launch: bool) -> list[dict[str, Any]]:
    """The Triton kernels' lines."""
    from tests.gpuless import triton_launch
    from tests.gpuless.triton_sample import launches

    _, machines = triton_launch.run(case, arch, "cluster" if one_launch else "two launches")
    planned, _ = launches(case, one_launch=one_launch, capability=divmod(arch, 10))
    return _triton_lines(planned, machines, arch, _of_row(case))


def combine_rows(case: Any, arch: int, _: str) -> list[dict[str, Any]]:
    """The line of ``combine``, which writes the combined logits for samplers of one's own."""
    from ensemble_decode.kernels import combine
    from tests.gpuless import triton_launch

    target, expert, anti_expert = case.logits
    planned = combine.plan(target, expert, anti_expert, case.alpha, torch.empty(target.shape))
    machines = triton_launch.run_all(planned, arch, ["out"])
    return _triton_lines(planned, machines, arch, _of_row(case))


def attention_rows(heads: tuple[int, int, int], dtype: torch.dtype, context: int, arch: int) -> list[dict[str, Any]]:
    """The lines of one layer's attention for one new token, the last of ``context``; ``heads`` are H, Hkv and D."""
    from ensemble_decode.kernels import paged_attention as kernels
    from ensemble_decode.ops import new_caches
    from tests.gpuless import triton_launch
    from tests.gpuless.standin import planned

    torch.manual_seed(0)
    dim, blocks = heads[2], -(-context // kernels.BLOCK_SIZE.value)
    k_cache, v_cache = (cache.normal_() for cache in new_caches(blocks, heads[1], dim, dtype))
    q, k, v = (torch.randn(1, n, dim, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
    query_start, context_len = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [context]))
    table = torch.randperm(blocks, dtype=torch.int32)[None]
    with planned() as found:
        kernels.paged_attention(q, k, v, k_cache, v_cache, query_start, context_len, table, dim**-0.5)
    of = {"heads": heads, "context": context, "dtype": str(dtype).removeprefix("torch.")}
    machines = triton_launch.run_all(found, arch, ["out", "sums", "state"])
    lines = zip(found, _triton_lines(found, machines, arch, of), strict=True)
    return [line for launch, line in lines if launch.name != "write_cache"]


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
        result.append(_row(f"CUDA ensemble_sample_{name}", machine, own, arch, dynamic, _of_row(case)))
    return result


def _print(row: dict[str, Any]) -> None:
    """One line of a table."""
    heads = "×".join(map(str, row.get("heads", ())))
    of = row["vocab"] if "vocab" in row else f"{row['context']} of {heads}"
    print(
        f"| {row['kernel']} | {row['arch']} | {of} {row['dtype']} | {row['registers']}, {row['spilled_bytes']} | "
        f"{row['shared_bytes'] / 1024:.1f} | {row['warps_per_multiprocessor']} | {row['kib']:.0f} | "
        f"{row['reads']:.2f} | {row['thousand_warp_instructions']:.0f} | "
        f"{row['ns_of_bytes']:.0f} | {row['ns_of_instructions']:.0f} |",
        flush=True,
    )


def _print_head(of: str, reads: str) -> None:
    """The head of a table."""
    print(
        f"\n| kernel | | {of} | registers, spills | shared KB | warps/SM | KiB | reads of {reads} | 10³ warp instr. | "
        "ns of bytes | ns of instr. |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="*", default=[50257])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--context", type=int, nargs="*", default=[4096])
    parser.add_argument("--heads", type=int, nargs=3, default=(32, 8, 128), metavar=("H", "HKV", "D"))
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
    print("Computed from compiled code, not measured: against an H100's roofline.")
    if options.vocab:
        print(f"\nOne row, one pair, top-p {options.top_p}.")
        _print_head("V, dtype", "the logits")
    for vocab, dtype in itertools.product(options.vocab, options.dtype):
        case = _case(vocab, getattr(torch, dtype), options.top_p)
        jobs: list[Any] = [(triton_rows, 90, True), (triton_rows, 90, False), (triton_rows, 80, False)]
        if cuda_sample.has_nvcc():
            jobs += [(cuda_rows, 90, "cluster"), (cuda_rows, 80, "two launches")]
        jobs += [(combine_rows, 90, ""), (combine_rows, 80, "")]
        for job, arch, form in jobs:
            for row in job(case, arch, form):
                rows.append(row)
                _print(row)
    if options.context:
        print("\nOne new token of one sequence, one layer.")
        _print_head("positions of H×Hkv×D", "the cache")
    for context, dtype, arch in itertools.product(options.context, options.dtype, (90, 80)):
        for row in attention_rows(tuple(options.heads), getattr(torch, dtype), context, arch):
            rows.append(row)
            _print(row)
    if options.json:
        options.json.write_text(json.dumps({"computed_not_measured": True, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
