"""The sampling operator beside PyTorch's sort-based pipeline, transformers' warpers, and the time to read its bytes.

    python benchmarks/ensemble_sample.py                       # every vocabulary, batch and dtype: some five minutes
    python benchmarks/ensemble_sample.py --vocab 128256 --batch 1 8 --json sampling.json

Every call reads logits that are in no cache: inputs rotate through buffers several times as large as the last-level
cache. "read" is the time to read the same bytes at the bandwidth that the fastest of three reductions of PyTorch
reaches over those buffers, in the same run with the same threads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from ensemble_decode import ops

VOCABULARIES = (32000, 49152, 50257, 128256, 151936)  # Llama 2, SmolLM2, GPT-2, Llama 3, Qwen 2
BATCHES = (1, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOP_P, TEMPERATURE, ALPHA = 0.9, 0.8, 1.0
ROTATION = 192 << 20  # bytes of logits that a round goes through at least


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times are medians in microseconds."""

    vocab: int
    batch: int
    dtype: str
    ours: float
    read: float
    sort: float
    warpers: float

    @property
    def times_sort(self) -> float:
        return self.sort / self.ours

    @property
    def times_read(self) -> float:
        return self.ours / self.read


class Inputs:
    """Sets of (target, expert, anti-expert) logits, [B, V] and [1, B, V], laid one after another in memory."""

    def __init__(self, vocab: int, batch: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)
        rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
        target = -1.1 * torch.log(rank + 2.0) + 0.7 * torch.randn(batch, vocab, generator=generator)
        experts = [0.8 * target + 0.5 * torch.randn(batch, vocab, generator=generator) for _ in range(2)]
        one = torch.stack([target, *experts]).to(dtype)
        self.bytes = one.nbytes
        count = max(2, -(-ROTATION // one.nbytes))
        self.memory = one.unsqueeze(0).repeat(count, 1, 1, 1)

    def forever(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for number in itertools.cycle(range(len(self.memory))):
            target, expert, anti = self.memory[number]
            yield target, expert.unsqueeze(0), anti.unsqueeze(0)

    def bandwidth(self) -> float:
        """Bytes a second: the best of three reductions, of three rounds each, over all of the memory."""
        flat = self.memory.view(-1).view(torch.float32)
        best = float("inf")
        for read, _ in itertools.product((torch.sum, torch.amax, lambda x: torch.dot(x, x)), range(3)):
            start = time.perf_counter()
            read(flat)
            best = min(best, time.perf_counter() - start)
        return flat.nbytes / best


def sort_pipeline(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """What a processor and a sampler do together in most stacks."""
    logits = (target.float() + ALPHA * (expert[0].float() - anti[0].float())) / TEMPERATURE
    ordered, order = logits.softmax(-1).sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered >= TOP_P] = 0.0
    return order.gather(-1, torch.multinomial(ordered, 1)).squeeze(-1)


def warpers(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """transformers' own classes in its own order."""
    logits = target.float() + ALPHA * (expert[0].float() - anti[0].float())
    for warper in (TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)):
        logits = warper(None, logits)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def parameters(batch: int) -> dict[str, Any]:
    return {
        "alpha": torch.full((batch, 1), ALPHA),
        "temperature": torch.full((batch,), TEMPERATURE),
        "top_k": torch.zeros(batch, dtype=torch.int32),
        "top_p": torch.full((batch,), TOP_P),
        "min_p": torch.zeros(batch),
        "seed": torch.arange(batch),
        "position": torch.arange(batch),
    }


def median_time(call: Callable, inputs: Inputs, seconds: float, least: int) -> float:
    """Microseconds a call, over fresh inputs until ``seconds`` are spent, but at least ``least`` calls."""
    sets = inputs.forever()
    times: list[float] = []
    call(*next(sets))
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        arguments = next(sets)
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(vocab: int, batch: int, dtype: str, peers: bool) -> Row:
    inputs = Inputs(vocab, batch, DTYPES[dtype])
    values = parameters(batch)
    ours = median_time(lambda z, e, a: ops.ensemble_sample(z, e, a, **values), inputs, 0.3, 20)
    read = inputs.bytes / inputs.bandwidth() * 1e6
    sort, warped = (median_time(call, inputs, 0.3, 3) if peers else float("nan") for call in (sort_pipeline, warpers))
    return Row(vocab, batch, dtype, ours, read, sort, warped)


def filter_times(vocab: int, batch: int) -> dict[str, float]:
    """Microseconds with other filters than the table's."""
    inputs, times = Inputs(vocab, batch, torch.bfloat16), {}
    settings: dict[str, dict] = {
        "greedy": {"temperature": 0.0},
        "no filter": {},
        "top-p 0.9": {"top_p": 0.9},
        "top-p 0.5": {"top_p": 0.5},
        "top-k 50": {"top_k": 50},
        "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
        "min-p 0.05": {"min_p": 0.05},
        "target nucleus, min-p 0.1": {"min_p": 0.1, "nucleus": "target"},
    }
    for name, options in settings.items():
        values: dict = parameters(batch) | {"temperature": torch.ones(batch), "top_p": torch.ones(batch)}
        for key, value in options.items():
            values[key] = value if key == "nucleus" else torch.full_like(values[key], value)
        times[name] = median_time(
            lambda z, e, a, values=values: ops.ensemble_sample(z, e, a, **values), inputs, 0.3, 20
        )
    return times


def call_overhead() -> dict[str, float]:
    """Microseconds of a call on next to nothing: one row of eight tokens."""
    z, values = torch.zeros(1, 8), parameters(1) | {"alpha": None}
    calls: dict[str, Callable] = {
        "tensors as parameters": lambda: ops.ensemble_sample(z, **values),
        "numbers as parameters": lambda: ops.ensemble_sample(z, temperature=0.8, top_p=0.9, seed=1, position=1),
    }
    times = {}
    for name, call in calls.items():
        samples = []
        for _ in range(3000):
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        times[name] = statistics.median(samples) * 1e6
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--dtype", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--no-peers", action="store_true", help="our operator and the read time only")
    parser.add_argument("--json", type=Path, help="save the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops.set_num_threads(args.threads)

    rows = [
        measure(vocab, batch, dtype, not args.no_peers)
        for vocab, batch, dtype in tqdm(list(itertools.product(args.vocab, args.batch, args.dtype)), leave=False)
    ]
    overhead, filters = call_overhead(), filter_times(max(args.vocab), 8)
    print(
        f"One pair, top-p {TOP_P}, temperature {TEMPERATURE}; median µs; {args.threads} threads, torch {torch.__version__}\n"
    )
    print(
        f"{'V':>7} {'B':>3} {'dtype':9}{'ours':>10}{'read':>10}{'sort':>12}{'warpers':>12}{'× sort':>9}{'× warpers':>11}{'× read':>9}"
    )
    for r in rows:
        print(
            f"{r.vocab:>7} {r.batch:>3} {r.dtype:9}{r.ours:>10.1f}{r.read:>10.1f}{r.sort:>12.0f}{r.warpers:>12.0f}"
            f"{r.times_sort:>9.0f}{r.warpers / r.ours:>11.0f}{r.times_read:>9.2f}"
        )
    print(
        f"\nOther filters, V = {max(args.vocab)}, B = 8, bfloat16, µs: "
        + ", ".join(f"{k} {v:.0f}" for k, v in filters.items())
    )
    print("A call on one row of 8 tokens, µs: " + ", ".join(f"{k} {v:.1f}" for k, v in overhead.items()))
    if args.json:
        table = [asdict(r) | {"times_sort": r.times_sort, "times_read": r.times_read} for r in rows]
        args.json.write_text(
            json.dumps({"threads": args.threads, "rows": table, "filters": filters, "call": overhead}, indent=1)
        )


if __name__ == "__main__":
    main()
