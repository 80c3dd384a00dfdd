"""Winogender (Rudinger et al. 2018) for a causal language model: do "he" and "she" mean the same person?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ensemble_decode.corpora.winogender import read_schemas, read_share_of_women
from ensemble_decode.evaluation.coreference import read_mentions
from ensemble_decode.evaluation.estimate import Estimate, figures_of, share
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.statistics import Values


@dataclass(frozen=True, slots=True)
class Winogender:
    """How often the two versions are understood alike (best at 100), and whether "she" goes with where women work (0).

    Records are one per schema: its id, occupation, whether the pronoun is the occupation's, the occupation's share of women,
    the log-probabilities of both versions, and by how much the referent was preferred.
    """

    resamples: int = 2000
    name: str = "winogender"
    generates: ClassVar[bool] = False

    def check(self, data: Path) -> None:
        """Read schemas and statistics."""
        read_schemas(data)
        read_share_of_women(data)

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Score both versions of every schema, or of the first ``limit``."""
        schemas, women = read_schemas(data)[:limit], read_share_of_women(data)
        readings = read_mentions(system, [mention for schema in schemas for mention in (schema.male, schema.female)])
        return [
            {
                "id": schema.id,
                "occupation": schema.occupation,
                "means_occupation": schema.means_occupation,
                "women": women[schema.occupation],
                "male": male.logprob,
                "female": female.logprob,
                "male_margin": male.margin,
                "female_margin": female.margin,
            }
            for schema, male, female in zip(schemas, readings[::2], readings[1::2], strict=True)
        ]

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        """Agreement, accuracies and their gap by schema; preference by schema; the correlation by occupation."""
        ids = [record["id"] for record in records]
        male, female = ([float(r[f"{side}_margin"] > 0) for r in records] for side in ("male", "female"))
        prefers_he = [(r["male"] > r["female"]) + 0.5 * (r["male"] == r["female"]) for r in records]
        found = {
            "agreement": share(ids, [float(a == b) for a, b in zip(male, female, strict=True)]),
            "accuracy male": share(ids, male),
            "accuracy female": share(ids, female),
            "gap": share(ids, list(np.subtract(male, female)), 0.0),
            "prefers he": share(ids, prefers_he),
        }
        by_occupation: dict[str, list[tuple[float, float]]] = {}
        for record in records:
            if record["means_occupation"]:
                leaning = record["female"] - record["male"]
                by_occupation.setdefault(record["occupation"], []).append((leaning, record["women"]))
        if len(by_occupation) > 2:
            x, y = np.array([np.mean(pairs, axis=0) for pairs in by_occupation.values()]).T
            # Moments about the means of all: the same correlation, without cancellation.
            x, y = x - x.mean(), y - y.mean()
            values = np.column_stack([x, y, x * x, y * y, x * y])
            found["correlation"] = Estimate(tuple(by_occupation), values, pearson, 0.0)
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The estimates with intervals."""
        return figures_of(self.estimates(records), self.resamples)


def pearson(means: Values) -> Values:
    """Correlation of x and y from the means of x, y, x², y² and xy, [R, 5]; 0 where one of them is constant."""
    x, y, xx, yy, xy = means.T
    spread = np.sqrt(np.maximum((xx - x * x) * (yy - y * y), 0.0))
    return np.divide(xy - x * y, spread, out=np.zeros_like(spread), where=spread > 1e-12)
