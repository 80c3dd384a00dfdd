"""Classifiers of generated text: real ones by hub id or folder, or their distilled stand-ins."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ensemble_decode.evaluation.runner import fingerprint
from ensemble_decode.evaluation.tfidf import CONFIG, WEIGHTS, Scores, load_tfidf

#: The classifiers of arXiv 2412.01711.
REGARD_ID = "sasha/regardv3"
TOXICITY_ID = "facebook/roberta-hate-speech-dynabench-r4-target"


class Classifier(Protocol):
    """Texts in, a probability for each label out.

    ``fidelity`` is empty for a real classifier. For a stand-in it holds the measured agreement with the real one, which
    reports show beside every figure.
    """

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> tuple[str, ...]: ...

    @property
    def fidelity(self) -> dict[str, float]: ...

    def scores(self, texts: Sequence[str]) -> Scores:
        """Probability of each label, [len(texts), len(labels)]."""


class PipelineClassifier:
    """A text classifier of transformers, loaded from safetensors."""

    fidelity: dict[str, float] = {}  # noqa: RUF012 - empty for every instance: this is the real one

    def __init__(self, name: str, batch_size: int = 32) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

        model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True)
        self.name = name
        self.labels: tuple[str, ...] = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
        self._batch_size = batch_size
        self._pipeline: Any = pipeline(
            "text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(name), top_k=None
        )

    def scores(self, texts: Sequence[str]) -> Scores:
        """Probability of each label, [len(texts), len(labels)]; long texts are cut at the model's length."""
        found = np.zeros((len(texts), len(self.labels)))
        for row, answer in enumerate(self._pipeline(list(texts), batch_size=self._batch_size, truncation=True)):
            for entry in answer:
                found[row, self.labels.index(entry["label"])] = entry["score"]
        return found


def load_classifier(source: str) -> Classifier:
    """The classifier of a hub id or a folder; a folder that ``ensemble-decode distill`` made is a stand-in.

    Raises
    ------
    ValueError
        It can't be had, with what to do.
    """
    if (Path(source) / CONFIG).is_file():
        return load_tfidf(Path(source))
    try:
        return PipelineClassifier(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"classifier {source!r} can't be loaded ({reason}): name a folder that holds it as safetensors, "
            "or a stand-in: `ensemble-decode distill --data DATA --out FOLDER`, then --classifiers FOLDER"
        ) from None


@dataclass(frozen=True, slots=True)
class ClassifierSource:
    """Which classifier a metric uses, as plain data: what its records depend on. Loaded when it is needed.

    ``digest`` is that of a folder's files, so that one distilled or trained anew is not taken for the old one; a hub id has none.
    """

    source: str
    digest: str = ""

    def load(self) -> Classifier:
        """The classifier; see :func:`load_classifier`. Loaded once."""
        return _load_once(self)


def classifier_source(source: str) -> ClassifierSource:
    """The source of a hub id or a folder, with a folder's digest."""
    digest = hashlib.sha256()
    paths = [Path(source) / name for name in (CONFIG, WEIGHTS)]
    if not all(path.is_file() for path in paths):
        return ClassifierSource(source, fingerprint(source) if Path(source).is_dir() else "")
    for path in paths:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return ClassifierSource(source, digest.hexdigest())


@lru_cache(maxsize=2)
def _load_once(source: ClassifierSource) -> Classifier:
    return load_classifier(source.source)
