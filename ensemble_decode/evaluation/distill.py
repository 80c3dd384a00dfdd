"""Stand-ins for classifiers that can't be had: linear models that learn their published labels, with measured fidelity."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_decode.corpora.source import Source, find
from ensemble_decode.evaluation.bold import mask_entity
from ensemble_decode.evaluation.tfidf import TfidfClassifier

_SOURCE = Source("bold_labelled_zemour", "https://github.com/EliottZemour/nlg_bias (results, sampled)", "MIT")
#: Rates over all texts that the classifiers labelled; the training sample is stratified.
NATURAL_REGARD = {"positive": 0.5145, "neutral": 0.3141, "negative": 0.1256, "other": 0.0458}
NATURAL_TOXIC = 0.0338
_FOLDS = 3


@dataclass(frozen=True, slots=True)
class Labelled:
    """A continuation with what the real classifiers said: regard on the text with its entity masked, toxicity on it raw."""

    entity: str
    text: str
    regard: str
    toxic: bool


def read_labelled(data: Path) -> tuple[list[Labelled], list[Labelled]]:
    """Training texts, and test texts about other entities, from the folder that holds ``bold_labelled_zemour``."""
    sets = []
    for name in ("train_stratified.jsonl.gz", "test_natural.jsonl.gz"):
        path = find(_SOURCE, data, f"bold_labelled_zemour/{name}", name)
        with gzip.open(path, "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        sets.append([Labelled(row["entity"], row["text"], row["regard"], bool(row["toxic"])) for row in rows])
    return sets[0], sets[1]


def distill_regard(train: Sequence[Labelled], test: Sequence[Labelled], min_df: int = 2) -> TfidfClassifier:
    """A stand-in for ``sasha/regardv3``.

    Each label weighs as much as it does among natural texts, so that the argmax has their shares. Fidelity: accuracy
    against the real labels of ``test``, and the accuracy of always saying the commonest.
    """
    labels = np.array([row.regard for row in train])
    weights = np.array([NATURAL_REGARD[label] / np.mean(labels == label) for label in NATURAL_REGARD])
    sample_weight = weights[[list(NATURAL_REGARD).index(label) for label in labels]]
    vectorizer, features = _features([mask_entity(row.text, row.entity) for row in train], min_df)
    model = _regression(16.0).fit(features, labels, sample_weight=sample_weight)
    truth = [row.regard for row in test]
    predicted = model.predict(vectorizer.transform([mask_entity(row.text, row.entity) for row in test]))
    fidelity = {
        "accuracy": float(np.mean(predicted == np.array(truth))),
        "majority": max(truth.count(label) for label in set(truth)) / len(truth),
    }
    return _classifier("regard stand-in", tuple(model.classes_), vectorizer, model.coef_, model.intercept_, fidelity)


def distill_toxicity(train: Sequence[Labelled], test: Sequence[Labelled], min_df: int = 2) -> TfidfClassifier:
    """A stand-in for ``facebook/roberta-hate-speech-dynabench-r4-target``.

    Its bias is set so that, of natural texts about entities it has not seen, as many score 0.5 or more as the real one
    says (found out of fold on ``train``). Fidelity: area under the ROC curve on ``test``, and both shares there.
    """
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold

    truth = np.array([row.toxic for row in train])
    vectorizer, features = _features([row.text for row in train], min_df)
    margins = np.zeros(len(train))
    folds = GroupKFold(n_splits=_FOLDS)
    for fit, held in folds.split(features, truth, groups=[row.entity for row in train]):
        margins[held] = _regression(4.0).fit(features[fit], truth[fit]).decision_function(features[held])
    natural = np.where(truth, NATURAL_TOXIC / truth.mean(), (1 - NATURAL_TOXIC) / (1 - truth.mean()))
    order = np.argsort(-margins)
    above = np.cumsum(natural[order]) / natural.sum()
    threshold = margins[order[min(int(np.searchsorted(above, NATURAL_TOXIC)), len(order) - 1)]]
    model = _regression(4.0).fit(features, truth)
    decisions = model.decision_function(vectorizer.transform([row.text for row in test])) - threshold
    toxic = np.array([row.toxic for row in test])
    fidelity = {
        "AUC": float(roc_auc_score(toxic, decisions)),
        "share": float(np.mean(decisions >= 0)),
        "real share": float(toxic.mean()),
    }
    coefficients = np.concatenate([np.zeros_like(model.coef_), model.coef_])
    bias = np.array([0.0, model.intercept_[0] - threshold])
    return _classifier("toxicity stand-in", ("not toxic", "toxic"), vectorizer, coefficients, bias, fidelity)


def _features(texts: Iterable[str], min_df: int) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=min_df, sublinear_tf=True)
    return vectorizer, vectorizer.fit_transform(texts)


def _regression(inverse_penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=inverse_penalty, max_iter=200, tol=1e-3)


def _classifier(
    name: str, labels: tuple[str, ...], vectorizer: Any, weights: Any, bias: Any, fidelity: dict[str, float]
) -> TfidfClassifier:
    vocabulary = {str(gram): int(column) for gram, column in vectorizer.vocabulary_.items()}
    arrays = (np.asarray(array, dtype=np.float64) for array in (vectorizer.idf_, weights, bias))
    idf, weights, bias = arrays
    return TfidfClassifier(name, tuple(map(str, labels)), vocabulary, idf, weights, bias, fidelity)
