"""Twenty thousand requests of every kind through one engine: memory and blocks must not grow. Exit status 1 if they do.

    python benchmarks/soak.py --requests 20000 --json soak.json

A random Llama of two layers with a LoRA-free full pair does the work, so that the engine and not the model is what runs. A
tenth of the requests are aborted in the middle; parameters, lengths and α are mixed; the cache is small enough to preempt.
With ``--speculate`` the expert (or an n-gram) drafts for every second thousand of them, wrong or not.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ensemble_decode import LLM, ExpertPair, SamplingParams, Speculation

VOCAB = 512
#: Growth of the resident set, after the first fifth of the requests, that is still called none.
TOLERANCE_MB = 24.0


def small_model(folder: Path, seed: int) -> str:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    path = folder / str(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    return str(path)


def random_request(chance: random.Random) -> tuple[list[int], SamplingParams]:
    common = list(range(3, 3 + chance.choice([0, 16, 40])))
    prompt = common + [chance.randrange(3, VOCAB) for _ in range(chance.randrange(1, 60))]
    params = SamplingParams(
        alpha=chance.choice([0.0, 0.5, 1.0]),
        temperature=chance.choice([0.0, 0.7, 1.0]),
        top_p=chance.choice([0.5, 0.9, 1.0]),
        top_k=chance.choice([0, 0, 20]),
        max_tokens=chance.randrange(1, 24),
        n=chance.choice([1, 1, 1, 3]),
        repetition_penalty=chance.choice([1.0, 1.0, 1.2]),
        logprobs=chance.choice([None, None, 2]),
        seed=chance.choice([None, chance.randrange(1 << 40)]),
    )
    return prompt, params


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--speculate", metavar="expert|ngram|MODEL", help="draft for every second thousand requests")
    parser.add_argument("--json")
    args = parser.parse_args()
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        target, expert, anti = (small_model(Path(folder), seed) for seed in range(3))
        draft = Speculation(args.speculate, adaptive=False) if args.speculate else None
        options: dict[str, Any] = {"dtype": "float32", "max_num_seqs": 32, "kv_cache_bytes": 1 << 20}
        llm = LLM(target, {"a": ExpertPair(expert, anti)}, speculation=draft, **options)
    engine, process = llm.engine, psutil.Process()
    speculator = engine.speculator
    added = done = aborted = preempted = 0
    series, start = [], time.perf_counter()
    mark = max(1, args.requests // 20)
    while done < args.requests:
        while added < args.requests and len(engine.requests) < 64:
            prompt, params = random_request(chance)
            engine.speculator = speculator if added // 1000 % 2 == 0 else None
            engine.add_request(prompt, params, f"r{added}")
            added += 1
        before = done
        for output in engine.step():
            done += output.finished
            preempted += output.metrics.preemptions if output.finished else 0
        if chance.random() < 0.05 and engine.requests:
            done += engine.abort(chance.choice(list(engine.requests))) is not None
            aborted += 1
        if done // mark > before // mark:
            gc.collect()
            series.append(
                {"requests": done, "rss_mb": process.memory_info().rss / 1e6, "free_blocks": engine.blocks.num_free}
            )
            print(f"{done:6} requests  {series[-1]['rss_mb']:8.1f} MB resident", flush=True)
    seconds = time.perf_counter() - start
    leaked = llm.runner.num_blocks - engine.blocks.num_free
    settled = [entry["rss_mb"] for entry in series[len(series) // 5 :]]
    growth = settled[-1] - settled[0]
    drafted = int(speculator.stats["drafted"]) if speculator else 0
    print(
        f"\n{done} requests in {seconds:.0f} s, {aborted} aborted, {preempted} preemptions, {drafted} tokens drafted; after the first fifth the resident set "
        f"grew by {growth:.1f} MB; {leaked} blocks leaked, {len(engine.requests)} requests left"
    )
    if args.json:
        data = {
            "requests": done,
            "seconds": seconds,
            "aborted": aborted,
            "preemptions": preempted,
            "drafted": drafted,
            "growth_mb": growth,
        }
        Path(args.json).write_text(json.dumps({**data, "leaked_blocks": leaked, "series": series}, indent=1))
    return int(leaked != 0 or bool(engine.requests) or growth > TOLERANCE_MB)


if __name__ == "__main__":
    sys.exit(main())
