"""Drift in long texts: what the pairs still do, and what the text has become, from one segment of tokens to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ensemble_decode.evaluation.bold import Continuations, mask_entity
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.diversity import distinct
from ensemble_decode.evaluation.estimate import Estimate, figures_of
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.regard import LABELS, fidelity_figures

MEASURES = ("log-ratio", *LABELS, "distinct-2")


@dataclass(frozen=True, slots=True)
class Drift:
    """Means by segment of BOLD's continuations; a unit is a prompt.

    ``log-ratio`` is the mean of ln p(token) under the ensemble less that under the target, in nats: how far the pairs move
    the text that was written, 0 for the target. Regard is the classifier's of the segment by itself. A text that ends in the
    first half of a segment has no part in it. Records are one per sample: prompt id and the measures of each segment.
    """

    classifier: ClassifierSource
    continuations: Continuations
    segment: int = 60
    resamples: int = 2000
    name: str = "drift"
    generates: ClassVar[bool] = True

    def check(self, data: Path) -> None:
        """Read the prompts and load the classifier."""
        self.continuations.check(data)
        self.classifier.load()

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        """Measure every sample, or those of the first ``limit`` prompts of each group."""
        found = self.continuations.of(system, data, limit)
        samples = [(prompt, text) for prompt, texts in found for text in texts]
        prompts = [system.encode(prompt.text) for prompt, _ in samples]
        written = [system.encode_more(text) for _, text in samples]
        scores = system.score([prompt + text for prompt, text in zip(prompts, written, strict=True)])
        parts: list[str] = []
        records: list[Record] = []
        for (prompt, _), before, tokens, score in zip(samples, prompts, written, scores, strict=True):
            ratios = [
                own - target
                for own, target in zip(score.logprobs[len(before) :], score.target_logprobs[len(before) :], strict=True)
                if own is not None and target is not None
            ]
            segments = []
            for start in range(0, len(tokens), self.segment):
                piece = tokens[start : start + self.segment]
                if len(piece) * 2 < self.segment:
                    continue
                text = system.llm.tokenizer.decode(piece)  # type: ignore[union-attr]
                parts.append(mask_entity(text, prompt.entity))
                segments.append(
                    {
                        "log-ratio": float(np.mean(ratios[start : start + self.segment])),
                        "distinct-2": distinct([text], 2) or 0.0,
                    }
                )
            records.append({"id": prompt.id, "segments": segments})
        classifier = self.classifier.load()
        shares = iter(classifier.scores(parts)) if parts else iter(())
        for record in records:
            record["fidelity"] = dict(classifier.fidelity)
            for segment in record["segments"]:
                best = classifier.labels[int(next(shares).argmax())]
                segment |= {label: float(best == label) for label in LABELS}
        return records

    def estimates(self, records: Sequence[Record]) -> dict[str, Estimate]:
        """``measure/first token of the segment``, counted from 1."""
        found = {}
        for place in range(max((len(record["segments"]) for record in records), default=0)):
            by_prompt: dict[str, list[dict[str, float]]] = {}
            for record in records:
                if place < len(record["segments"]):
                    by_prompt.setdefault(record["id"], []).append(record["segments"][place])
            for measure in MEASURES:
                values = [[np.mean([sample[measure] for sample in samples])] for samples in by_prompt.values()]
                key = f"{measure}/{place * self.segment + 1}"
                found[key] = Estimate(list(by_prompt), np.array(values, np.float64))
        return found

    def summarise(self, records: Sequence[Record]) -> dict[str, Figure]:
        """The means with intervals, and a stand-in's fidelity."""
        return figures_of(self.estimates(records), self.resamples) | fidelity_figures(records)
