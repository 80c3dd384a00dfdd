"""Regard (Sheng et al. 2019): how a text speaks of whom it is about, and whether groups are spoken of alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ensemble_decode.evaluation.bold import Continuations, full_text, mask_entity
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.estimate import Estimate
from ensemble_decode.evaluation.gaps import Labels, by_domain
from ensemble_decode.evaluation.metric import Figure, Record, System

#: What the gap is averaged over; the classifier's fourth label, "other", counts in the totals alone.
LABELS = ("positive", "neutral", "negative")


@dataclass(frozen=True, slots=True)
class Regard:
    """The gap in regard between groups, for each domain of BOLD.

    Records are one per prompt: its id, domain, group, the label of each continuation, and who gave it.
    """

    classifier: ClassifierSource
    continuations: Continuations
    resamples: int = 2000
    name: str = "regard"
    generates: ClassVar[bool] = True

    def check(self, data: Path) -> None:
        """Read the prompts and load the classifier."""
        self.continuations.check(data)
        self.classifier.load()

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Label the continuations of every prompt, or of the first ``limit`` of each group."""
        classifier = self.classifier.load()
        known = classifier.labels
        if not set(LABELS) <= set(known):
            raise ValueError(f"classifier {classifier.name!r} has the labels {known}, regard needs {LABELS}")
        found = self.continuations.of(system, data, limit)
        texts = [mask_entity(full_text(prompt, text), prompt.entity) for prompt, samples in found for text in samples]
        best = iter(classifier.scores(texts).argmax(axis=1))
        return [
            {
                "id": prompt.id,
                "domain": prompt.domain,
                "group": prompt.group,
                "labels": [known[next(best)] for _ in samples],
                "classifier": classifier.name,
                "fidelity": dict(classifier.fidelity),
            }
            for prompt, samples in found
        ]

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        """``gap/domain`` and ``label/group``; a unit is a prompt."""
        found: dict[str, Estimate] = {}
        for domain, labels in self._domains(records):
            found |= by_domain(labels.estimates(), domain)
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The same as figures, the gap with its chance, and a stand-in's fidelity."""
        figures: dict[str, Figure] = {}
        for domain, labels in self._domains(records):
            figures |= by_domain(labels.figures(self.resamples), domain)
        return figures | fidelity_figures(records)

    def _domains(self, records: Sequence[Record]) -> Iterator[tuple[str, Labels]]:
        for domain in dict.fromkeys(record["domain"] for record in records):
            chosen = [record for record in records if record["domain"] == domain]
            counts = np.array([[record["labels"].count(label) for label in LABELS] for record in chosen], np.float64)
            totals = np.array([len(record["labels"]) for record in chosen], np.float64)
            ids, groups = [record["id"] for record in chosen], [record["group"] for record in chosen]
            yield domain, Labels(ids, groups, counts, totals, LABELS)


def fidelity_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """A stand-in's measured fidelity, so that no report shows its figures without it; none for a real classifier."""
    fidelity = records[0]["fidelity"] if records else {}
    return {f"stand-in {key}": Figure(value) for key, value in fidelity.items()}
