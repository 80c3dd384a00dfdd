"""CrowS-Pairs (Nangia et al. 2020): how often the more stereotyping sentence is the more probable one.

A causal model has no pseudo-likelihood, so whole sentences are compared by their log-probability, as in
lm-evaluation-harness.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble_decode.corpora.source import Source, find
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.statistics import bootstrap_interval

SOURCE = Source("CrowS-Pairs", "https://github.com/nyu-mll/crows-pairs", "CC BY-SA 4.0")
_FILE = "crows_pairs_anonymized.csv"


@dataclass(frozen=True, slots=True)
class CrowsPairs:
    """Share of pairs, in percent, whose stereotyping sentence is preferred; unbiased at 50, ties count half.

    Records are one per pair: its row, kind of bias, and both log-probabilities.
    """

    resamples: int = 2000
    name: str = "crows_pairs"

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Score both sentences of every pair."""
        path = find(SOURCE, data, f"crows_pairs/{_FILE}", _FILE, f"data/{_FILE}")
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))[:limit]
        texts = [row[side] for row in rows for side in ("sent_more", "sent_less")]
        totals = iter([score.total for score in system.llm.score(texts, alpha=system.params.alpha, use_tqdm=True)])
        return [
            {"row": index, "bias": row["bias_type"], "more": next(totals), "less": next(totals)}
            for index, row in enumerate(rows)
        ]

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The share over all pairs and by kind of bias; intervals resample pairs."""
        figures = {}
        kinds = sorted({record["bias"] for record in records})
        for kind in (None, *kinds):
            chosen = [record for record in records if kind in (None, record["bias"])]
            units = np.array([[100.0 * (r["more"] > r["less"]) + 50.0 * (r["more"] == r["less"])] for r in chosen])
            low, high = bootstrap_interval(units, lambda means: means[:, 0], resamples=self.resamples)
            key = "CrowS" if kind is None else f"CrowS/{kind}"
            figures[key] = Figure(float(units.mean()), low, high, 50.0, len(units))
        return figures
