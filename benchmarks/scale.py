"""Memory and step time against batch and context, as a Markdown table.

    python benchmarks/scale.py --json scale.json

A step is one token for every row, at the given context. Memory is the process's resident set at that point, and the
bytes of the KV blocks in use.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import psutil

from ensemble_decode import LLM, ExpertPair, SamplingParams
from ensemble_decode.benchmarking import prompts
from ensemble_decode.models.smollm2 import smollm2_path

PAIR = Path(__file__).parent.parent / "ensemble_decode" / "data" / "pairs" / "gender"


def prefill_steps(batch: int, context: int) -> int:
    """Steps, at most, between the first row's first token and the last row's."""
    return batch + batch * context // 256


def step_times(llm: LLM, batch: int, context: int, alpha: float, steps: int) -> tuple[list[float], int]:
    """Seconds of ``steps`` decode steps at ``context`` tokens of context, and the KV blocks in use."""
    # The first rows decode while the last are prefilled: none may end before the timed steps.
    params = SamplingParams(
        alpha=alpha, top_p=0.9, seed=1, max_tokens=steps + 3 + prefill_steps(batch, context), ignore_eos=True
    )
    requests = [llm.engine.add_request(p, params) for p in prompts(batch, context - 2, 49000)]
    while any(not request.sequences[0].output for request in requests):
        llm.engine.step(stream=False)
    llm.engine.step(stream=False)
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        llm.engine.step(stream=False)
        times.append(time.perf_counter() - start)
    used = llm.runner.num_blocks - llm.engine.blocks.num_free
    for request in requests:
        llm.engine.abort(request.request_id)
    return times, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument(
        "--most-tokens", type=int, default=65536, help="skip batch × context above this (default 65536)"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    pair = ExpertPair(PAIR / "expert", PAIR / "anti_expert")
    settings = [(b, c) for b in args.batch for c in args.context]
    sizes = [b * (c + args.steps + 16 + prefill_steps(b, c)) for b, c in settings if b * c <= args.most_tokens]
    if not sizes:
        parser.error(f"--most-tokens is {args.most_tokens}, allowed is {min(b * c for b, c in settings)} or more")
    needed = max(sizes)
    llm = LLM(
        str(smollm2_path()),
        {"gender": pair},
        dtype=args.dtype,
        max_model_len=8192,
        kv_cache_bytes=1 << 30,
        max_num_seqs=64,
    )
    per_token = llm.ensemble.bytes_per_block // 16
    blocks = llm.runner.num_blocks
    if needed * per_token > 1 << 30:
        del llm
        llm = LLM(
            str(smollm2_path()),
            {"gender": pair},
            dtype=args.dtype,
            max_model_len=8192,
            kv_cache_bytes=needed * per_token,
            max_num_seqs=64,
            enable_prefix_caching=False,
        )
        blocks = llm.runner.num_blocks
    print(
        f"{args.dtype}, {blocks} blocks of 16 tokens, {per_token / 1024:.0f} KiB of KV a token for all three members\n"
    )
    print("| batch | context | target alone, ms | steered, ms | ratio | KV in use, MB | resident, MB |")
    print("|---|---|---|---|---|---|---|")
    rows = []
    for batch, context in settings:
        if batch * context > args.most_tokens:
            print(f"| {batch} | {context} | – | – | – | – | – |", flush=True)
            continue
        plain, _ = step_times(llm, batch, context, 0.0, args.steps)
        steered, used = step_times(llm, batch, context, 1.0, args.steps)
        kv = used * llm.ensemble.bytes_per_block / 1e6
        rss = psutil.Process().memory_info().rss / 1e6
        a, b = statistics.median(plain) * 1e3, statistics.median(steered) * 1e3
        print(f"| {batch} | {context} | {a:.1f} | {b:.1f} | {b / a:.2f} | {kv:.0f} | {rss:.0f} |", flush=True)
        rows.append({"batch": batch, "context": context, "plain_ms": a, "steered_ms": b, "kv_mb": kv, "rss_mb": rss})
    if args.json:
        Path(args.json).write_text(json.dumps({"settings": vars(args), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
