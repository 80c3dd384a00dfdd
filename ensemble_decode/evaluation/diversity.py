"""Diversity of generated text: distinct n-grams among a prompt's samples, repeated n-grams within one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ensemble_decode.evaluation.bold import Continuations
from ensemble_decode.evaluation.estimate import Estimate, figures_of
from ensemble_decode.evaluation.metric import Figure, Record, System

ORDERS = (1, 2, 3)
REPETITION_ORDER = 2


def ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    """All runs of ``order`` words."""
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def distinct(texts: Sequence[str], order: int) -> float | None:
    """Distinct n-grams among the samples of a prompt, over their words (Li et al. 2016; by prompt as Liu et al. 2021).

    Words are what lies between white space. None where there are no words.
    """
    listed = [text.split() for text in texts]
    length = sum(map(len, listed))
    return len({gram for words in listed for gram in ngrams(words, order)}) / length if length else None


def repetition(text: str, order: int = REPETITION_ORDER) -> float | None:
    """seq-rep-n: the share of n-grams that came before in the same text (Welleck et al. 2020). None below n words."""
    grams = ngrams(text.split(), order)
    return 1 - len(set(grams)) / len(grams) if grams else None


@dataclass(frozen=True, slots=True)
class Diversity:
    """distinct-1, -2, -3 and seq-rep-2 of BOLD's continuations."""

    continuations: Continuations
    resamples: int = 2000
    name: str = "diversity"
    generates: ClassVar[bool] = True

    def check(self, data: Path) -> None:
        """Read the prompts."""
        self.continuations.check(data)

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Measure every prompt's samples, or those of the first ``limit`` prompts of each group."""
        records: list[Record] = []
        for prompt, samples in self.continuations.of(system, data, limit):
            repeated = [value for text in samples if (value := repetition(text)) is not None]
            records.append(
                {
                    "id": prompt.id,
                    **{f"distinct-{order}": distinct(samples, order) for order in ORDERS},
                    f"repetition-{REPETITION_ORDER}": sum(repeated) / len(repeated) if repeated else None,
                }
            )
        return records

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        """The mean over prompts of each measure; a unit is a prompt."""
        found: dict[str, Estimate] = {}
        for key in (*(f"distinct-{order}" for order in ORDERS), f"repetition-{REPETITION_ORDER}"):
            chosen = [record for record in records if record[key] is not None]
            if chosen:
                values = np.array([[record[key]] for record in chosen], np.float64)
                found[key] = Estimate([record["id"] for record in chosen], values)
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The means with intervals."""
        return figures_of(self.estimates(records), self.resamples)
