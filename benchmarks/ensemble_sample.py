"""The sampling operator beside other ways to do the same on a CPU, and the time to read its bytes.

    python benchmarks/ensemble_sample.py                       # bfloat16, every vocabulary, batch and kind of row: 4 minutes
    python benchmarks/ensemble_sample.py --dtype bfloat16 float32 --seconds 0.5 --json sampling.json
    python benchmarks/ensemble_sample.py --vocab 128256 --batch 1 8 --no-peers

Kinds of rows: "smollm2" are a real model's logits (SmolLM2-135M after three prompts, in its own vocabulary of 49152),
"peaked" fall like Zipf's law, "flat" are normal with a standard deviation of 1: a nucleus of half the vocabulary. The other
vocabularies have made rows only: their models aren't at hand, and real logits repeated or left out to fill another vocabulary
would have ties and a nucleus that no model has.

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
from transformers import AutoModelForCausalLM, AutoTokenizer, TemperatureLogitsWarper, TopPLogitsWarper

from ensemble_decode import ops
from ensemble_decode.models.smollm2 import smollm2_path

SMOLLM2 = 49152
VOCABULARIES = (32000, SMOLLM2, 50257, 128256, 151936)  # Llama 2, SmolLM2, GPT-2, Llama 3, Qwen 2
BATCHES = (1, 8, 64)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOP_P, TEMPERATURE, ALPHA = 0.9, 0.8, 1.0
ROTATION = 192 << 20  # bytes of logits that a round goes through at least


@dataclass(frozen=True, slots=True)
class Case:
    """What is varied."""

    vocab: int
    batch: int
    kind: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times are medians in microseconds, peers by name."""

    case: Case
    bytes: int
    ours: float
    read: float
    peers: dict[str, float]

    @property
    def times_read(self) -> float:
        return self.ours / self.read


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def smollm2_logits(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, V] of one text's positions after three prompts: the model's own next-token distributions."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path())
    model = AutoModelForCausalLM.from_pretrained(smollm2_path(), dtype=torch.float32).eval()
    text = tokenizer(Path(__file__).parents[1].joinpath("README.md").read_text())["input_ids"][: batch + 1]
    found = []
    for prompt in ("A text.", "A clear and friendly text.", "A dull and angry text."):
        start = tokenizer(prompt)["input_ids"]
        with torch.inference_mode():
            found.append(model(torch.tensor([start + text])).logits[0, len(start) : len(start) + batch].clone())
    return found[0], found[1], found[2]


def made_logits(vocab: int, batch: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows [B, V], experts that mostly agree with the target."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(batch, vocab, generator=generator)
    if kind == "peaked":
        rank = torch.stack([torch.randperm(vocab, generator=generator) for _ in range(batch)])
        target = -1.1 * torch.log(rank + 2.0) + 0.7 * noise
    else:
        target = noise
    plus, minus = (0.8 * target + 0.5 * torch.randn(batch, vocab, generator=generator) for _ in range(2))
    return target, plus, minus


class Inputs:
    """Sets of (target, expert, anti-expert) logits, [B, V] and [1, B, V], laid one after another in memory."""

    def __init__(self, logits: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> None:
        one = torch.stack(logits).to(dtype)
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


# ── peers ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def combined(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    return target.float() + ALPHA * (expert[0].float() - anti[0].float())


def draw(weights: Tensor) -> Tensor:
    """A token [B] in proportion to weights [B, V]: the race of exponentials that samplers use in place of multinomial."""
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def sort_pipeline(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """What a processor and a sampler do together in most stacks."""
    ordered, order = (combined(target, expert, anti) / TEMPERATURE).softmax(-1).sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= TOP_P, 0.0)
    return order.gather(-1, draw(ordered).unsqueeze(-1)).squeeze(-1)


def warpers(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """transformers' own classes in its own order."""
    logits = combined(target, expert, anti)
    for warper in (TemperatureLogitsWarper(TEMPERATURE), TopPLogitsWarper(TOP_P)):
        logits = warper(None, logits)
    return torch.multinomial(logits.softmax(-1), 1).squeeze(-1)


def rejection(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """FlashInfer's sampling without a sort (dual pivots), its passes over the vocabulary as PyTorch operations.

    A token is drawn from what lies above ``low``. Less mass than top-p above it: accepted. Otherwise ``low`` rises to it,
    or to the middle between it and the maximum if as much mass lies above that.
    """
    probs = (combined(target, expert, anti) / TEMPERATURE).softmax(-1)
    low, high = torch.zeros(len(probs), 1), probs.amax(-1, keepdim=True)
    token = torch.full((len(probs),), -1)
    while (token < 0).any():
        cumulative = probs.where(probs > low, 0.0).cumsum(-1)
        u = cumulative[:, -1:] * (1 - torch.rand_like(low))
        drawn = torch.searchsorted(cumulative, u).clamp_(max=probs.shape[-1] - 1)
        pivot = probs.gather(-1, drawn)
        middle = (pivot + high) / 2
        above, above_middle = (probs.where(probs > x, 0.0).sum(-1, keepdim=True) for x in (pivot, middle))
        token = torch.where((token < 0) & (above < TOP_P).squeeze(-1), drawn.squeeze(-1), token)
        high = torch.where(above_middle < TOP_P, middle, high)
        low = torch.where(above_middle < TOP_P, pivot, middle)
    return token


def pivot_search(target: Tensor, expert: Tensor, anti: Tensor) -> Tensor:
    """vLLM's search for the threshold without a sort: three pivots a pass cut the range of logits in four.

    Ends where no logit lies between the bounds, or after 12 passes, when they are 2⁻²⁴ of the range apart.
    """
    logits = combined(target, expert, anti) / TEMPERATURE
    weights = (logits - logits.amax(-1, keepdim=True)).exp_()
    needed = TOP_P * weights.sum(-1, keepdim=True)
    low, high = logits.amin(-1, keepdim=True), logits.amax(-1, keepdim=True)
    for _ in range(12):
        new_low, new_high = low, high
        for quarters in (1, 2, 3):
            pivot = low + quarters / 4 * (high - low)
            enough = weights.where(logits >= pivot, 0.0).sum(-1, keepdim=True) >= needed
            new_low, new_high = torch.where(enough, pivot, new_low), new_high.where(enough, new_high.minimum(pivot))
        low, high = new_low, new_high
        if not ((logits > low) & (logits < high)).any():
            break
    return draw(weights.where(logits >= low, 0.0))


PEERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "sort": sort_pipeline,
    "warpers": warpers,
    "compiled": torch.compile(sort_pipeline, dynamic=True),
    "rejection": rejection,
    "pivots": pivot_search,
}


# ── times ───────────────────────────────────────────────────────────────────────────────────────────────────────────
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
    for _ in range(3):  # torch.compile may compile once more when it sees a second batch
        call(*next(sets))
    end = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < end:
        arguments = next(sets)
        start = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def measure(case: Case, logits: tuple[Tensor, Tensor, Tensor], seconds: float, peers: bool) -> Row:
    inputs = Inputs(logits, DTYPES[case.dtype])
    values = parameters(case.batch)
    ours = median_time(lambda z, e, a: ops.ensemble_sample(z, e, a, **values), inputs, seconds, 20)
    read = inputs.bytes / inputs.bandwidth() * 1e6
    others = {name: median_time(call, inputs, seconds, 2) for name, call in PEERS.items()} if peers else {}
    return Row(case, inputs.bytes, ours, read, others)


def cases(vocabularies: list[int], batches: list[int], dtypes: list[str]) -> list[Case]:
    """Real rows in their own vocabulary, and both kinds of random ones in the others."""
    return [
        Case(vocab, batch, kind, dtype)
        for vocab in vocabularies
        for kind in (["smollm2"] if vocab == SMOLLM2 else ["peaked", "flat"])
        for batch, dtype in itertools.product(batches, dtypes)
    ]


def filter_times(vocab: int, batch: int) -> dict[str, float]:
    """Microseconds with other filters than the table's."""
    inputs, times = Inputs(made_logits(vocab, batch, "peaked"), torch.bfloat16), {}
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
    parser.add_argument("--vocab", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=list(DTYPES))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.2, help="for each time, at the least of two calls")
    parser.add_argument("--no-peers", action="store_true", help="our operator and the read time only")
    parser.add_argument("--json", type=Path, help="save the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops.set_num_threads(args.threads)

    real = smollm2_logits(max(args.batch)) if SMOLLM2 in args.vocab else None
    rows = []
    print(f"One pair, top-p {TOP_P}, temperature {TEMPERATURE}; {args.threads} threads, torch {torch.__version__}.")
    print("Median µs of ours and of reading its bytes; then each peer's time over ours.\n")
    names = [] if args.no_peers else list(PEERS)
    print("| V, rows | B | type | MB | ours | × read | " + "".join(f"× {name} | " for name in names))
    print("|---" * (6 + len(names)) + "|", flush=True)
    for case in tqdm(cases(args.vocab, args.batch, args.dtype), leave=False):
        logits = made_logits(case.vocab, case.batch, case.kind) if case.kind != "smollm2" else None
        if logits is None:
            assert real is not None
            logits = (real[0][: case.batch], real[1][: case.batch], real[2][: case.batch])
        row = measure(case, logits, args.seconds, not args.no_peers)
        rows.append(row)
        tqdm.write(
            f"| {case.vocab} {case.kind} | {case.batch} | {case.dtype} | {row.bytes / 1e6:.1f} | {row.ours:.0f} | "
            f"{row.times_read:.2f} | " + "".join(f"{row.peers[name] / row.ours:.0f} | " for name in names)
        )
    overhead, filters = call_overhead(), filter_times(max(args.vocab), 8)
    print(
        f"\nOther filters, V = {max(args.vocab)}, B = 8, peaked, bfloat16, µs: "
        + ", ".join(f"{k} {v:.0f}" for k, v in filters.items())
    )
    print("A call on one row of 8 tokens, µs: " + ", ".join(f"{k} {v:.1f}" for k, v in overhead.items()))
    if args.json:
        table = [asdict(row) | {"times_read": row.times_read} for row in rows]
        args.json.write_text(
            json.dumps({"threads": args.threads, "rows": table, "filters": filters, "call": overhead}, indent=1)
        )


if __name__ == "__main__":
    main()
