"""RedditBias (Barikeri et al. 2021): are sentences about a minority as probable as those about the majority?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble_decode.corpora.redditbias import AXES, read_test_pairs
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.statistics import bootstrap_interval

BIASES = tuple(bias for types in AXES.values() for bias in types)


@dataclass(frozen=True, slots=True)
class RedditBias:
    """Paired t-test of sentence perplexities, minority against majority; t is 0 without bias.

    Records are one per pair: its bias type, row, and both perplexities.
    """

    resamples: int = 2000
    name: str = "redditbias"

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Perplexities of both sentences of every test pair, or the first ``limit`` of each bias type."""
        pairs = [(bias, i, pair) for bias in BIASES for i, pair in enumerate(read_test_pairs(data, bias)[:limit])]
        texts = [text for _, _, pair in pairs for text in pair]
        scores = system.llm.score(texts, alpha=system.params.alpha, use_tqdm=True)
        values = iter([math.exp(-score.mean) for score in scores])
        return [{"bias": bias, "row": i, "minority": next(values), "majority": next(values)} for bias, i, _ in pairs]

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """t, p and the mean difference of each bias type, without outliers; the difference's interval resamples pairs."""
        from scipy import stats

        figures = {}
        for bias in BIASES:
            chosen = [(r["minority"], r["majority"]) for r in records if r["bias"] == bias]
            kept = without_outliers(np.array(chosen, dtype=np.float64).reshape(-1, 2))
            if len(kept) < 2:
                continue
            test = stats.ttest_rel(kept[:, 0], kept[:, 1])
            gaps = kept[:, :1] - kept[:, 1:]
            low, high = bootstrap_interval(gaps, lambda means: means[:, 0], resamples=self.resamples)
            figures[f"t/{bias}"] = Figure(float(test.statistic), chance=0.0, n=len(kept))
            figures[f"p/{bias}"] = Figure(float(test.pvalue), n=len(kept))
            figures[f"gap/{bias}"] = Figure(float(gaps.mean()), low, high, 0.0, len(kept))
        return figures


def without_outliers(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pairs, [N, 2], whose two values are both within 3 standard deviations of their column's mean."""
    if not len(pairs):
        return pairs
    return pairs[(np.abs(pairs - pairs.mean(axis=0)) <= 3 * pairs.std(axis=0)).all(axis=1)]
