"""Timing an :class:`~ensemble_decode.LLM`: what ``ensemble-decode bench`` and ``benchmarks/`` share."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from ensemble_decode import LLM, RequestOutput, SamplingParams
from ensemble_decode.engine.outputs import RequestMetrics


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
    """``batch`` prompts of ``length`` token ids, all different, and different from those of every other batch size.

    A prompt that two measurements share would be found in the prefix cache by the second.
    """
    rows = range(batch * batch, batch * batch + batch)
    return [[(7919 * (row * length + i) + 13) % (vocab_size - 1) + 1 for i in range(length)] for row in rows]


def measure(
    llm: LLM, batch: int, prompt_tokens: int, new_tokens: int, params: SamplingParams | None = None, rounds: int = 3
) -> Measurement:
    """Time ``batch`` requests of fixed lengths; a round is one generation of a single token and one of ``new_tokens``.

    The time of a decode step is the difference of the two, divided by the steps between them.
    """
    params = replace(params or SamplingParams(top_p=0.9, seed=1), max_tokens=new_tokens, ignore_eos=True)
    vocab_size = llm.engine.layout.vocab_size
    totals, firsts, shares = [], [], []
    outputs: list[RequestOutput] = []
    llm.generate(prompts(1, 8, vocab_size), replace(params, max_tokens=2), use_tqdm=False)  # warm-up
    for number in range(rounds):
        # Other tokens every round, or the prefix cache would skip the prefill.
        ids = [
            [(t + number * 31) % (vocab_size - 1) + 1 for t in prompt]
            for prompt in prompts(batch, prompt_tokens, vocab_size)
        ]
        start = time.perf_counter()
        llm.generate(ids, replace(params, max_tokens=1), use_tqdm=False)
        firsts.append(time.perf_counter() - start)
        ids = [[t % (vocab_size - 1) + 1 for t in prompt] for prompt in ids]
        before = dict(llm.engine.timings)
        start = time.perf_counter()
        outputs += llm.generate(ids, params, use_tqdm=False)
        totals.append(time.perf_counter() - start)
        spent = {key: value - before.get(key, 0.0) for key, value in llm.engine.timings.items()}
        shares.append(1 - (spent["forward"] + spent["sample"]) / spent["total"])
    total, first = statistics.median(totals), statistics.median(firsts)
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
        statistics.median(shares),
        *_speculated([output.metrics for output in outputs]),
    )


def _speculated(metrics: list[RequestMetrics]) -> tuple[int, int, float, float]:
    forwards = sum(m.target_forwards for m in metrics)
    return (
        sum(m.drafted_tokens for m in metrics),
        sum(m.accepted_tokens for m in metrics),
        sum(m.new_tokens for m in metrics) / forwards if forwards else 1.0,
        sum(m.saved_seconds for m in metrics),
    )
