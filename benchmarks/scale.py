"""Memory and step time against batch and context, as a Markdown table.

    python benchmarks/scale.py --json scale.json

A step is one token for every row, at the given context. Its time doesn't depend on what the KV cache holds, so the
prompts are not computed: their blocks are filled with random numbers. Memory is the bytes of the KV blocks in use, and what
the process holds beside its KV cache (which is as large as the largest setting needs) at that point. What needs more than ``--kv-gib`` of cache is left out, with the bytes that it needs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.benchmarking import prompts
from ensemble_decode.engine.batch import Batch, StepOutput
from ensemble_decode.models.smollm2 import smollm2_path
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

PAIR = Path(__file__).parent.parent / "ensemble_decode" / "data" / "pairs" / "gender"


class Filler:
    """Stands for the runner while prompts are read: fills their blocks with random numbers, and samples any token."""

    def __init__(self, llm: LLM) -> None:
        self.ensemble, self.timings = llm.ensemble, llm.runner.timings

    def execute(self, batch: Batch) -> StepOutput:
        for number, pool in enumerate(self.ensemble.pools):
            group = self.ensemble.groups[pool.group]
            blocks = {block for span in batch.spans if number in span.pools for block in span.block_table}
            ids = torch.tensor(sorted(blocks), dtype=torch.int64) + pool.index * group.blocks_per_pool
            for cache in (*group.k_cache, *group.v_cache):
                cache[ids] = torch.randn(cache.shape[1:]).to(cache.dtype)
        return StepOutput([0] * len(batch.samples), [None] * len(batch.samples))


def tokens_needed(batch: int, context: int, steps: int) -> int:
    """Tokens of KV cache, at most."""
    return batch * (-(-(context + steps + 3) // BLOCK_SIZE) + 1) * BLOCK_SIZE


def step_times(llm: LLM, batch: int, context: int, alpha: float, steps: int) -> tuple[list[float], int]:
    """Seconds of ``steps`` decode steps at ``context`` tokens of context, and the KV blocks in use."""
    params = SamplingParams(alpha=alpha, top_p=0.9, seed=1, max_tokens=steps + 3, ignore_eos=True)
    requests = [llm.engine.add_request(p, params) for p in prompts(batch, context - 2, 49000)]
    llm.engine.runner = Filler(llm)
    llm.engine.step(stream=False)
    assert all(request.sequences[0].output for request in requests), "the prompts did not fit into one step"
    llm.engine.runner = llm.runner
    llm.engine.step(stream=False)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        llm.engine.step(stream=False)
        times.append(time.perf_counter() - start)
    used = llm.runner.num_blocks - llm.engine.blocks.num_free
    assert len(llm.engine.requests) == batch
    assert not any(request.metrics.preemptions for request in requests)
    for request in requests:
        llm.engine.abort(request.request_id)
    return times, used


@dataclass
class Cell:
    """What was measured of one batch and context, with a pair or without."""

    kv_mb: float
    step_ms: float | None = None  # None: the cache would be too large
    other_mb: float | None = None  # resident, beside the cache

    @property
    def step(self) -> str:
        return "–" if self.step_ms is None else f"{self.step_ms:.1f}"


def measure(settings: list[tuple[int, int]], steered: bool, args: argparse.Namespace) -> list[Cell]:
    """The cells of one column of the table, in a cache as large as the largest of them."""
    pairs = {"gender": ExpertPair(PAIR / "expert", PAIR / "anti_expert")} if steered else {}
    # All prompts of a cell are read in one step, so that no row decodes before the others are there.
    prompts_at_once = 3 * max(args.batch) * max(args.context)
    options: dict[str, Any] = {"dtype": args.dtype, "max_model_len": 8192, "max_num_seqs": max(args.batch)}
    options["max_num_batched_tokens"] = prompts_at_once
    per_token = (
        LLM(str(smollm2_path()), pairs, kv_cache_bytes=1 << 24, **options).ensemble.bytes_per_block // BLOCK_SIZE
    )
    sizes = [tokens_needed(batch, context, args.steps) * per_token for batch, context in settings]
    largest = max((size for size in sizes if size <= args.kv_gib * 2**30), default=0)
    if not largest:
        raise SystemExit(f"--kv-gib is {args.kv_gib}, allowed is {min(sizes) / 2**30:.3f} or more")
    llm = LLM(str(smollm2_path()), pairs, kv_cache_bytes=largest, enable_prefix_caching=False, **options)
    cells = []
    for (batch, context), size in zip(settings, sizes, strict=True):
        if size > largest:
            cells.append(Cell(size / 1e6))
            continue
        times, used = step_times(llm, batch, context, float(steered), args.steps)
        cache = (llm.runner.num_blocks + 1) * llm.ensemble.bytes_per_block
        other = (psutil.Process().memory_info().rss - cache) / 1e6
        cells.append(Cell(used * llm.ensemble.bytes_per_block / 1e6, statistics.median(times) * 1e3, other))
        print(f"{'steered' if steered else 'target'} {batch} × {context}: {cells[-1].step} ms", file=sys.stderr)
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--kv-gib", type=float, default=6.5, help="largest KV cache to allocate (default 6.5)")
    parser.add_argument("--json")
    args = parser.parse_args()
    settings = [(batch, context) for batch in args.batch for context in args.context]
    target, steered = measure(settings, False, args), measure(settings, True, args)
    print(f"{args.dtype}, medians of {args.steps} steps\n")
    print(
        "| batch | context | target alone, ms | steered, ms | ratio | KV, MB: target | steered | beside it, MB: target | steered |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (batch, context), a, b in zip(settings, target, steered, strict=True):
        ratio = f"{b.step_ms / a.step_ms:.2f}" if a.step_ms and b.step_ms else "–"
        other = [f"{cell.other_mb:.0f}" if cell.other_mb else "–" for cell in (a, b)]
        print(
            f"| {batch} | {context} | {a.step} | {b.step} | {ratio} | {a.kv_mb:.0f} | {b.kv_mb:.0f} | {' | '.join(other)} |"
        )
    if args.json:
        rows = [
            {"batch": batch, "context": context, "target": asdict(a), "steered": asdict(b)}
            for (batch, context), a, b in zip(settings, target, steered, strict=True)
        ]
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
