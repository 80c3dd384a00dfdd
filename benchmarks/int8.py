"""What int8 weights gain and cost: megabytes, perplexity and milliseconds a step, beside those of the dtypes alone.

    python benchmarks/int8.py --data DIR --json int8.json

Perplexity is WikiText-2's (raw text, windows of 1,024 tokens without overlap) over the first ``--tokens``. A step is one
token for every row at ``--context``, of the target alone and steered by a LoRA pair, whose weights are int8 as well;
kinds take turns, medians over all steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from floor import DTYPES, count, load, step_seconds
from throughput import processor
from transformers import AutoConfig

from ensemble_decode import LLM, SamplingParams
from ensemble_decode.evaluation.metric import System
from ensemble_decode.evaluation.perplexity import Perplexity
from ensemble_decode.models.fast import PackedLinear, packed_linears
from ensemble_decode.models.loading import Quantization
from ensemble_decode.models.smollm2 import smollm2_path
from ensemble_decode.ops.linear import cpu_variant
from ensemble_decode.ops.paged_attention import BLOCK_SIZE

KINDS: tuple[tuple[str, Quantization | None], ...] = (
    ("float32", None),
    ("bfloat16", None),
    ("float32", "int8"),
    ("bfloat16", "int8"),
)


def weight_megabytes(llm: LLM) -> float:
    """What a step of the target reads of weights: layers and head, with int8's scales."""

    def size(linear: PackedLinear) -> int:
        return sum(t.nbytes for t in (linear.packed, linear.scale) if t is not None)

    group = llm.ensemble.target
    return (sum(size(linear) for linear in packed_linears(group.decoder)) + size(group.head)) / 1e6


def perplexity(llm: LLM, data: Path, tokens: int) -> float:
    metric = Perplexity("huggingface", window=1024, stride=1024, tokens=tokens)
    system = System("int8", llm, SamplingParams(alpha=0.0))
    return metric.summarise(metric.run(system, data))["PPL"].value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with WikiText-2; without it no perplexity is measured")
    parser.add_argument("--tokens", type=int, default=10240, help="of WikiText-2 (default 10240)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="of one round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    blocks = max(1024, max(args.batch) * -(-args.context // BLOCK_SIZE))
    config = AutoConfig.from_pretrained(smollm2_path())
    llms: dict[str, LLM] = {}
    rows: dict[str, dict[str, Any]] = {}
    for dtype, quantization in KINDS:
        name = " + ".join(filter(None, (dtype, quantization)))
        per_block = count(config, DTYPES[dtype], 1, BLOCK_SIZE, True)["kv"]
        llms[name] = load(dtype, round(blocks * per_block), True, quantization)
        rows[name] = {"weights_mb": weight_megabytes(llms[name]), "perplexity": None, "step_ms": {}}
        if args.data is not None:
            rows[name]["perplexity"] = perplexity(llms[name], args.data, args.tokens)
    for batch in args.batch:
        for steered in (False, True):
            times: dict[str, list[float]] = {name: [] for name in llms}
            for _ in range(args.rounds):
                for name, llm in llms.items():
                    times[name] += step_seconds(llm, batch, args.context, steered, args.steps)
            for name in llms:
                rows[name]["step_ms"][f"{'steered' if steered else 'target'}, {batch}"] = (
                    statistics.median(times[name]) * 1e3
                )
    columns = list(next(iter(rows.values()))["step_ms"])
    print(f"{processor()}, {cpu_variant()} kernels, context {args.context}; columns: step in ms, by batch\n")
    print("| weights | MB | perplexity | " + " | ".join(columns) + " |")
    print("|---|---|---|" + "---|" * len(columns))
    for name, row in rows.items():
        quality = "–" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
        steps = " | ".join(f"{row['step_ms'][column]:.1f}" for column in columns)
        print(f"| {name} | {row['weights_mb']:.0f} | {quality} | {steps} |")
    if args.json is not None:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        args.json.write_text(json.dumps({"settings": settings, "processor": processor(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
