"""TF-IDF and logistic regression from a folder of safetensors and JSON: what scikit-learn computes, and no pickle."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from ensemble_decode.evaluation.runner import write

WEIGHTS = "classifier.safetensors"
CONFIG = "classifier.json"
_FORMAT = "ensemble_decode.tfidf"
_WORD = re.compile(r"(?u)\b\w\w+\b")
Scores = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TfidfClassifier:
    """A linear classifier of the words and word pairs of a text.

    Features are (1 + ln tf)·idf of lower-cased words of two characters or more and of neighbouring words, scaled to unit
    length, as scikit-learn's ``TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)`` has them.

    Parameters
    ----------
    name : str
        What reports call it.
    labels : tuple of str, K
    vocabulary : dict of str to int
        Column of each n-gram, 0 … V − 1.
    idf : float64 array [V]
    weights : float64 array [K, V]
    bias : float64 array [K]
    fidelity : dict of str to float
        How well it agrees with the classifier it stands in for, on texts about entities it was not trained on.
    """

    name: str
    labels: tuple[str, ...]
    vocabulary: dict[str, int]
    idf: Scores
    weights: Scores
    bias: Scores
    fidelity: dict[str, float]

    def scores(self, texts: Sequence[str]) -> Scores:
        """Probability of each label, [len(texts), K]."""
        logits = np.stack([self._logits(text) for text in texts]) if texts else np.zeros((0, len(self.labels)))
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exponentials / exponentials.sum(axis=1, keepdims=True)

    def _logits(self, text: str) -> Scores:
        words = _WORD.findall(text.lower())
        grams = words + [f"{a} {b}" for a, b in itertools.pairwise(words)]
        counts = Counter(column for gram in grams if (column := self.vocabulary.get(gram)) is not None)
        if not counts:
            return self.bias
        columns = list(counts)
        values = np.array([1 + math.log(count) for count in counts.values()]) * self.idf[columns]
        return self.weights[:, columns] @ (values / np.linalg.norm(values)) + self.bias

    def save(self, folder: Path) -> None:
        """Write ``classifier.safetensors`` and ``classifier.json`` into a folder, which is made.

        The second is there only while both are whole.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).unlink(missing_ok=True)
        arrays = {"idf": self.idf, "weights": self.weights, "bias": self.bias}
        save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, folder / WEIGHTS)
        config = {
            "format": _FORMAT,
            "name": self.name,
            "labels": list(self.labels),
            "fidelity": self.fidelity,
            "vocabulary": sorted(self.vocabulary, key=self.vocabulary.__getitem__),
        }
        write(folder / CONFIG, json.dumps(config, ensure_ascii=False))


def load_tfidf(folder: Path) -> TfidfClassifier:
    """Read what :meth:`TfidfClassifier.save` wrote.

    Raises
    ------
    FileNotFoundError
        A file is not there.
    ValueError
        A file is damaged, of another format, or the two don't fit each other.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"classifier {str(folder)!r} has no {name}: `ensemble-decode distill` makes one")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        arrays = load_file(folder / WEIGHTS)
        if config["format"] != _FORMAT:
            raise ValueError(f"format {config['format']!r}, allowed is {_FORMAT!r}")
        vocabulary = {gram: column for column, gram in enumerate(config["vocabulary"])}
        shapes = [arrays[key].shape for key in ("idf", "weights", "bias")]
        count, labels = len(vocabulary), len(config["labels"])
        if shapes != [(count,), (labels, count), (labels,)]:
            raise ValueError(f"shapes {shapes} for {count} n-grams and {labels} labels")
        return TfidfClassifier(
            config["name"],
            tuple(config["labels"]),
            vocabulary,
            arrays["idf"],
            arrays["weights"],
            arrays["bias"],
            {key: float(value) for key, value in config["fidelity"].items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise ValueError(f"classifier {str(folder)!r} can't be read: {error}") from None
