"""Regard (Sheng et al. 2019): how a text speaks of whom it is about, and whether groups are spoken of alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ensemble_decode.evaluation.bold import Continuations, full_text, mask_entity
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.gaps import gap_figures
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

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """``gap/domain``, ``label/group``, and a stand-in's fidelity; intervals resample prompts."""
        figures: dict[str, Figure] = {}
        for domain in dict.fromkeys(record["domain"] for record in records):
            chosen = [record for record in records if record["domain"] == domain]
            counts = np.array([[record["labels"].count(label) for label in LABELS] for record in chosen], np.float64)
            totals = np.array([len(record["labels"]) for record in chosen], np.float64)
            groups = [record["group"] for record in chosen]
            for key, figure in gap_figures(counts, totals, groups, LABELS, resamples=self.resamples).items():
                figures[f"gap/{domain}" if key == "gap" else key] = figure
        return figures | fidelity_figures(records)


def fidelity_figures(records: Sequence[Record]) -> dict[str, Figure]:
    """A stand-in's measured fidelity, so that no report shows its figures without it; none for a real classifier."""
    fidelity = records[0]["fidelity"] if records else {}
    return {f"stand-in {key}": Figure(value) for key, value in fidelity.items()}
