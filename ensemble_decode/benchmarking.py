"""Timing an :class:`~ensemble_decode.LLM`: what ``ensemble-decode bench`` and ``benchmarks/`` share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ensemble_decode import LLM, RequestOutput, SamplingParams
from ensemble_decode.engine.outputs import RequestMetrics
from ensemble_decode.engine.speculation import Speculator


@dataclass(frozen=True, slots=True)
class Measurement:
    """One setting, timed. Times in seconds, medians over rounds; rates in new tokens a second."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    total_s: float
    first_token_s: float
    step_s: float
    tokens_per_s: float
    decode_tokens_per_s: float
    overhead: float  # share of a step outside forwards and sampling
    #: With speculation, over all rounds: drafted and accepted tokens, new tokens a target forward, seconds saved.
    drafted: int = 0
    accepted: int = 0
    tokens_per_forward: float = 1.0
    saved_s: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prompts(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """``batch`` prompts of ``length`` token ids, all different, and different from those of every other batch size."""
    rows = range(batch * batch, batch * batch + batch)
    return [[(7919 * (row * length + i) + 13) % (vocab_size - 1) + 1 for i in range(length)] for row in rows]


def measure(
    llm: LLM, batch: int, prompt_tokens: int, new_tokens: int, params: SamplingParams | None = None, rounds: int = 3
) -> Measurement:
    """Time ``batch`` requests of fixed lengths; a round is one generation of a single token and one of ``new_tokens``.

    The time of a decode step is the difference of the two, divided by the steps between them. Nothing is taken from the
    prefix cache.
    """
    return compare(llm, [llm.engine.speculator], batch, prompt_tokens, new_tokens, params, rounds)[0]


def compare(
    llm: LLM,
    speculators: Sequence[Speculator | None],
    batch: int,
    prompt_tokens: int,
    new_tokens: int,
    params: SamplingParams | None = None,
    rounds: int = 3,
) -> list[Measurement]:
    """:func:`measure` with each of ``speculators`` (None: without), which take turns on the same requests."""
    params = replace(params or SamplingParams(top_p=0.9, seed=1), max_tokens=new_tokens, ignore_eos=True)
    vocab_size = llm.engine.layout.vocab_size
    own, caching = llm.engine.speculator, llm.engine.blocks.prefix_caching
    taken: list[_Turns] = [_Turns() for _ in speculators]
    llm.engine.blocks.prefix_caching = False
    try:
        llm.generate(prompts(1, 8, vocab_size), replace(params, max_tokens=2), use_tqdm=False)  # warm-up
        for number in range(rounds):
            ids = [
                [(t + number * 31) % (vocab_size - 1) + 1 for t in p] for p in prompts(batch, prompt_tokens, vocab_size)
            ]
            for turns, speculator in zip(taken, speculators, strict=True):
                llm.engine.speculator = speculator
                turns.add(llm, ids, params)
    finally:
        llm.engine.speculator, llm.engine.blocks.prefix_caching = own, caching
    return [turns.measurement(prompt_tokens, new_tokens) for turns in taken]


@dataclass(slots=True)
class _Turns:
    """Rounds of one setting: seconds to one token and to all, shares outside forwards and sampling, and what came out."""

    firsts: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    outputs: list[list[RequestOutput]] = field(default_factory=list)

    def add(self, llm: LLM, ids: list[list[int]], params: SamplingParams) -> None:
        start = time.perf_counter()
        llm.generate(ids, replace(params, max_tokens=1), use_tqdm=False)
        self.firsts.append(time.perf_counter() - start)
        before = dict(llm.engine.timings)
        start = time.perf_counter()
        self.outputs.append(llm.generate(ids, params, use_tqdm=False))
        self.totals.append(time.perf_counter() - start)
        spent = {key: value - before.get(key, 0.0) for key, value in llm.engine.timings.items()}
        self.shares.append(1 - (spent["forward"] + spent["sample"]) / spent["total"])

    def measurement(self, prompt_tokens: int, new_tokens: int) -> Measurement:
        batch = len(self.outputs[0])
        total, first = statistics.median(self.totals), statistics.median(self.firsts)
        step = (total - first) / (new_tokens - 1) if new_tokens > 1 else float("nan")
        return Measurement(
            batch,
            prompt_tokens,
            new_tokens,
            total,
            first,
            step,
            batch * new_tokens / total,
            batch / step,
            statistics.median(self.shares),
            *_speculated([output.metrics for outputs in self.outputs for output in outputs]),
        )


def _speculated(metrics: list[RequestMetrics]) -> tuple[int, int, float, float]:
    forwards = sum(m.target_forwards for m in metrics)
    return (
        sum(m.drafted_tokens for m in metrics),
        sum(m.accepted_tokens for m in metrics),
        sum(m.new_tokens for m in metrics) / forwards if forwards else 1.0,
        sum(m.saved_seconds for m in metrics),
    )
