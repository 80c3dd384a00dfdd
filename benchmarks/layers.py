"""How close do the layer operators come to what the machine can do?

Two tables, at the shapes of SmolLM2-135M (30 layers, E = 576, 9 heads and 3 kv heads of 64, I = 1536, V = 49152):

* the four linears of 30 layers, against ``F.linear`` and oneDNN's packed linear, the fastest peer in PyTorch;
* a whole decode step (30 decoder layers, the head), plain and with two of three rows on LoRA adapters, against the
  floor: its weights and KV cache read at the speed at which this machine, in this run, reads a large tensor.

Every round times each candidate once, so that a busy neighbour hits all alike; the tables show medians.

    python benchmarks/layers.py --threads 2 --json out/layers.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ensemble_decode import ops
from ensemble_decode.ops.linear import cpu_variant

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, RANK = 30, 576, 9, 3, 64, 1536, 49152, 16
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
SHAPES = ((QKV, WIDTH), (WIDTH, HEADS * HEAD_DIM), (2 * INTERMEDIATE, WIDTH), (WIDTH, INTERMEDIATE))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def medians(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each candidate, timed in turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, run in candidates.items():
            time.sleep(0.05)  # an OpenMP worker of the one before spins for a while, on a core that this one needs
            start = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype)


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def linears(dtype: torch.dtype, rows: int, rounds: int) -> dict[str, float]:
    weights = [random(n, k, dtype=dtype) for _ in range(LAYERS) for n, k in SHAPES]
    packed = [ops.pack_weight(w) for w in weights]
    inputs = {k: random(rows, k, dtype=dtype) for _, k in SHAPES}

    def ours() -> None:
        for w, p in zip(weights, packed, strict=True):
            ops.linear(inputs[w.shape[1]], p, None, w.shape[0])

    def plain() -> None:
        for w in weights:
            F.linear(inputs[w.shape[1]], w)

    candidates: dict[str, Callable[[], object]] = {"ours": ours, "F.linear": plain}
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        reordered = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]

        def onednn() -> None:
            for w, r in zip(weights, reordered, strict=True):
                torch.ops.mkldnn._linear_pointwise(inputs[w.shape[1]], r, None, "none", [], "")

        candidates["oneDNN packed"] = onednn
    return medians(candidates, rounds)


class Step:
    """Weights, caches and inputs of one decode step of ``rows`` sequences at ``context`` tokens."""

    def __init__(self, dtype: torch.dtype, rows: int, context: int) -> None:
        blocks = -(-context // 16)
        layers = [self._layer(dtype) for _ in range(LAYERS)]
        caches = [ops.new_caches(rows * blocks, KV_HEADS, HEAD_DIM, dtype) for _ in range(LAYERS)]
        self.head = ops.pack_weight(random(VOCABULARY, WIDTH, dtype=dtype))
        self.hidden = random(rows, WIDTH, dtype=dtype)
        self.cos, self.sin = torch.ones(rows, HEAD_DIM).to(dtype), torch.zeros(rows, HEAD_DIM).to(dtype)
        self.query_start = torch.arange(rows + 1, dtype=torch.int32)
        self.context_len = torch.full((rows,), context, dtype=torch.int32)
        self.block_table = torch.randperm(rows * blocks).int().view(rows, blocks)
        self.adapter = (torch.arange(rows) * 3 // rows - 1).int()  # target, expert, anti-expert
        self.weights = [list(part) for part in zip(*(weights for weights, _ in layers), strict=True)]
        self.lora = [factor for _, factors in layers for factor in factors]
        self.kv = [list(side) for side in zip(*caches, strict=True)]
        self.read = [self.head, *(t for part in (*self.weights, *self.kv) for t in part)]

    @staticmethod
    def _layer(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        norms = [random(WIDTH, dtype=dtype) for _ in range(2)]
        qkv, o, gate_up, down = (random(n, k, dtype=dtype) for n, k in SHAPES)
        packed = [ops.pack_weight(qkv), ops.pack_weight(o), ops.pack_gate_up(gate_up), ops.pack_weight(down)]
        lora: list[Tensor] = []
        for (n, k), segments in zip(SHAPES, (3, 1, 2, 1), strict=True):
            lora += ops.pack_lora(random(2, segments * RANK, k, dtype=dtype), random(2, n, RANK, dtype=dtype))
        return [*norms, *packed], lora

    def run(self, with_lora: bool) -> Tensor:
        norm1, norm2, qkv, o, gate_up, down = self.weights
        hidden = ops.decoder_layers(
            self.hidden, self.cos, self.sin, norm1, norm2, qkv, [], o, [], gate_up, down, [], [],
            self.lora if with_lora else [], self.adapter if with_lora else None, self.kv[0], self.kv[1], self.query_start, self.context_len, self.block_table,
            HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, 1e-5, 0.0, HEAD_DIM**-0.5, 0,
        )  # fmt: skip
        return ops.linear(hidden, self.head, None, VOCABULARY, True)


def decode_step(dtype: torch.dtype, rows: int, context: int, rounds: int) -> dict[str, float]:
    step = Step(dtype, rows, context)
    probe = torch.ones(64 * 2**20)
    result = medians({"plain": lambda: step.run(False), "lora": lambda: step.run(True), "read": probe.sum}, rounds)
    speed = bytes_of([probe]) / result.pop("read")
    result["floor"] = bytes_of(step.read) / speed
    result["GB/s"] = speed / 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=ops.num_threads(), help="threads for every candidate")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 24, 32, 96], help="rows of a step")
    parser.add_argument("--context", type=int, default=128, help="tokens in each sequence's cache")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds; the median counts")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    ops.set_num_threads(arguments.threads)

    rows_of_table: list[dict[str, object]] = []
    cases = [(dtype, rows) for dtype in arguments.dtypes for rows in arguments.rows]
    for dtype, rows in tqdm(cases, desc="layers", leave=False):
        rows_of_table.append({
            "dtype": dtype,
            "rows": rows,
            "linears": linears(DTYPES[dtype], rows, arguments.rounds),
            "step": decode_step(DTYPES[dtype], rows, arguments.context, arguments.rounds),
        })  # fmt: skip

    print(
        f"{arguments.threads} threads, {cpu_variant()}, context {arguments.context}, ms (median of {arguments.rounds})"
    )
    print("| dtype | rows | linears: ours | F.linear | oneDNN packed | step | floor | step/floor | step with LoRA |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows_of_table:
        linear, step = row["linears"], row["step"]
        assert isinstance(linear, dict)
        assert isinstance(step, dict)
        onednn = f"{linear['oneDNN packed']:.1f}" if "oneDNN packed" in linear else "–"  # bf16 wants AVX-512
        print(
            f"| {row['dtype']} | {row['rows']} | {linear['ours']:.1f} | {linear['F.linear']:.1f} | "
            f"{onednn} | {step['plain']:.1f} | {step['floor']:.1f} | "
            f"{step['plain'] / step['floor']:.2f} | {step['lora']:.1f} |"
        )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        about = {
            "threads": arguments.threads,
            "context": arguments.context,
            "variant": cpu_variant(),
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "load": os.getloadavg(),
        }
        arguments.json.write_text(json.dumps({**about, "milliseconds": rows_of_table}, indent=1))


if __name__ == "__main__":
    main()
