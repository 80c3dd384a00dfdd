"""How far is a decode step from what this machine could do? Its bytes and operations against two measured ceilings.

    python benchmarks/floor.py --dtype bfloat16 --json floor-bf16.json
    python benchmarks/floor.py --dtype float32 --json floor-fp32.json
    python benchmarks/floor.py --dtype float32 --quantization int8 --json floor-int8.json

A step reads the weights once (head included), the adapters once, the KV cache once, and the logits once; it does two
operations a weight and row, and four a cached key element and query head. The floor is the larger of bytes over read
bandwidth and operations over the peak of a square matmul of the same dtype, or of float32 where that is faster: both with all threads, the best of many
tries, measured in the same run; so the best step is what to compare them with (two virtual cores that come to share a
real one take nearly twice as long), and the median is what one gets. The step is the runner's: forward, combination and sampling (top-p 0.9), without the
scheduler. Caches hold random numbers, so no prompt has to be computed. Steered is a LoRA pair over the target.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from throughput import IDLE, PAIR, busy_elsewhere, processor
from tqdm import tqdm

from ensemble_decode import LLM, ExpertPair
from ensemble_decode.engine.batch import Batch, SampleRow, Span, Steering
from ensemble_decode.models.loading import Quantization
from ensemble_decode.models.smollm2 import smollm2_path
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LOGIT_BYTES = 4


def best(function: Callable[[], object], tries: int) -> float:
    """Fewest seconds."""
    found = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        function()
        found = min(found, time.perf_counter() - start)
    return found


def ceilings(dtype: torch.dtype, tries: int) -> dict[str, float]:
    """Bytes read and operations done a second, with all of torch's threads."""
    probe = torch.ones(64 << 20)
    # A CPU without arithmetic of this dtype widens it: there torch's product is far slower than the machine's best.
    kind = max((dtype, torch.float32), key=lambda kind: _ops_per_s(kind, 256, 3))
    return {"bytes_per_s": probe.nbytes / best(probe.sum, tries), "ops_per_s": _ops_per_s(kind, 2048, tries)}


def _ops_per_s(dtype: torch.dtype, size: int, tries: int) -> float:
    square = torch.randn(size, size).to(dtype)
    return 2 * size**3 / best(lambda: square @ square, tries)


def adapter_elements() -> int:
    """Numbers in the two adapters of the pair."""
    total = 0
    for side in ("expert", "anti_expert"):
        with safe_open(PAIR / side / "adapter_model.safetensors", "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
        total += sum(torch.Size(shape).numel() for shape in shapes)
    return total


def count(
    config: Any, dtype: torch.dtype, batch: int, context: int, steered: bool, quantization: str | None = None
) -> dict[str, float]:
    """Bytes that a step must read and operations that it must do."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layers, head = config.num_hidden_layers * layer, config.hidden_size * config.vocab_size
    members, adapters = (3, adapter_elements()) if steered else (1, 0)
    cached = config.num_hidden_layers * members * batch * context
    # int8's scales, four bytes for each output, are some 0.5 % more.
    weights = (layers + head) * (1 if quantization else dtype.itemsize) + adapters * dtype.itemsize
    kv = cached * 2 * keys * dtype.itemsize
    # Hidden states are combined before the head: one row of it for each sequence. A row meets one adapter.
    operations = 2 * batch * (members * layers + head + adapters) + 4 * cached * queries
    logits = batch * config.vocab_size * LOGIT_BYTES
    return {"weights": weights, "kv": kv, "logits": logits, "bytes": weights + kv + logits, "operations": operations}


def step_seconds(llm: LLM, batch: int, context: int, steered: bool, steps: int) -> list[float]:
    """Seconds of decode steps, each row at ``context`` tokens, its own included."""
    blocks = -(-context // BLOCK_SIZE)
    order = torch.randperm(batch * blocks).tolist()  # as scattered as the pool of a long-running engine
    pools = tuple(range(llm.ensemble.layout.num_pools)) if steered else (llm.ensemble.layout.target_pool,)
    spans, samples = [], []
    for row in range(batch):
        spans.append(Span([row + 1], context - 1, order[row * blocks : (row + 1) * blocks], pools, 1))
        steering = (Steering(0, 1.0, row, row),) if steered else ()
        samples.append(SampleRow(row, steering, 1.0, 0, 0.9, 0.0, "combined", row, context))
    times = []
    for number in range(steps + 2):
        start = time.perf_counter()
        output = llm.runner.execute(Batch(spans, samples))
        if number >= 2:  # warm-up
            times.append(time.perf_counter() - start)
        if min(output.tokens) < 0:
            raise RuntimeError(f"batch {batch}, context {context}: a row had no valid sample")
    return times


def load(dtype: str, kv_cache_bytes: int, steered: bool, quantization: Quantization | None = None) -> LLM:
    pairs = {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")} if steered else None
    options: dict[str, Any] = {
        "dtype": dtype,
        "quantization": quantization,
        "max_model_len": 8192,
        "enable_prefix_caching": False,
    }
    llm = LLM(str(smollm2_path()), pairs, kv_cache_bytes=kv_cache_bytes, **options)
    for group in llm.ensemble.groups:
        for cache in (*group.k_cache, *group.v_cache):
            cache.normal_()  # fresh zeros would all be one page, and in cache
    return llm


def table(data: dict[str, Any]) -> str:
    top = data["ceilings"]
    lines = [
        f"{data['processor']}, {' '.join(filter(None, (data['settings']['dtype'], data['settings']['quantization'])))}, {top['bytes_per_s'] / 1e9:.1f} GB/s read, "
        f"{top['ops_per_s'] / 1e9:.0f} Gop/s.",
        "",
        "| | batch | context | MB | of it KV | Gop | floor, ms | bound by | step, ms | best | step / floor | best / floor | × target alone |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    alone: dict[tuple[int, int], float] = {}
    for row in data["rows"]:
        key = (row["batch"], row["context"])
        name = "steered" if row["steered"] else "target"
        if row["step_s"] is None:
            lines.append(f"| {name} | {key[0]} | {key[1]} |" + " – |" * 10)
            continue
        if not row["steered"]:
            alone[key] = row["best_s"]
        memory, arithmetic = row["bytes"] / top["bytes_per_s"], row["operations"] / top["ops_per_s"]
        floor, bound = max((memory, "memory"), (arithmetic, "arithmetic"))
        ratio = f"{row['best_s'] / alone[key]:.2f}" if key in alone else "–"
        lines.append(
            f"| {name} | {key[0]} | {key[1]} | {row['bytes'] / 1e6:.0f} | {row['kv'] / 1e6:.0f} | {row['operations'] / 1e9:.1f} "
            f"| {floor * 1e3:.1f} | {bound} "
            f"| {row['step_s'] * 1e3:.1f} | {row['best_s'] * 1e3:.1f} | {row['step_s'] / floor:.2f} | {row['best_s'] / floor:.2f} | {ratio} |"
        )
    if data["busy_elsewhere"] > IDLE:
        lines += ["", f"**Not idle**: other processes took {data['busy_elsewhere']:.2f} cores; don't publish this."]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--quantization", choices=["int8"], help="keep the weights as int8")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--most-gb", type=float, default=8, help="skip settings whose KV cache is larger (default 8)")
    parser.add_argument("--json", help="file for the results")
    args = parser.parse_args()
    dtype = DTYPES[args.dtype]
    data: dict[str, Any] = {"settings": vars(args), "processor": processor(), "rows": []}
    busy, start = busy_elsewhere(), time.perf_counter()
    data["ceilings"] = ceilings(dtype, 20)
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(smollm2_path())
    settings = [(batch, context) for batch in args.batch for context in args.context]
    try:
        for steered in (False, True):
            counts = {s: count(config, dtype, *s, steered, args.quantization) for s in settings}
            fits = [s for s in settings if counts[s]["kv"] <= args.most_gb * 1e9]
            if not fits:
                parser.error(f"--most-gb is {args.most_gb}, no setting fits")
            blocks = max(batch * -(-context // BLOCK_SIZE) for batch, context in fits)
            bytes_per_block = count(config, dtype, 1, BLOCK_SIZE, steered)["kv"]
            llm = load(args.dtype, round(blocks * bytes_per_block), steered, args.quantization)
            for batch, context in tqdm(
                settings, desc="steered" if steered else "target", disable=not sys.stderr.isatty()
            ):
                step = best = None
                if (batch, context) in fits:
                    times = step_seconds(llm, batch, context, steered, args.steps)
                    step, best = statistics.median(times), min(times)
                    again = ceilings(dtype, 3)  # the machine's best, whenever it had it
                    data["ceilings"] = {key: max(value, again[key]) for key, value in data["ceilings"].items()}
                row: dict[str, Any] = {
                    "steered": steered,
                    "batch": batch,
                    "context": context,
                    "step_s": step,
                    "best_s": best,
                }
                data["rows"].append(row | counts[batch, context])
            llm.runner.close()
            del llm
            gc.collect()
    except KeyboardInterrupt:
        print("\nstopped: the table is of the settings that were finished", file=sys.stderr)
    data["busy_elsewhere"] = (busy_elsewhere() - busy) / (time.perf_counter() - start)
    if args.json:
        Path(args.json).write_text(json.dumps(data, indent=1))
    print(table(data))


if __name__ == "__main__":
    main()
