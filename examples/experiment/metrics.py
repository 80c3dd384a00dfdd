"""The metrics that a settings file can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.bold import Continuations
from ensemble_decode.evaluation.classifiers import ClassifierSource, classifier_source
from ensemble_decode.evaluation.crows_pairs import CrowsPairs
from ensemble_decode.evaluation.distill import distill_regard, distill_toxicity, read_labelled
from ensemble_decode.evaluation.diversity import Diversity
from ensemble_decode.evaluation.drift import Drift
from ensemble_decode.evaluation.local_bias import LocalBias
from ensemble_decode.evaluation.metric import Metric
from ensemble_decode.evaluation.perplexity import Perplexity
from ensemble_decode.evaluation.regard import Regard
from ensemble_decode.evaluation.stereoset import StereoSet
from ensemble_decode.evaluation.tfidf import CONFIG
from ensemble_decode.evaluation.toxicity import Toxicity
from ensemble_decode.evaluation.winobias import WinoBias

SCORING: dict[str, Callable[..., Metric]] = {
    "stereoset": StereoSet,
    "perplexity": Perplexity,
    "local_bias": LocalBias,
    "crows_pairs": CrowsPairs,
    "winobias": WinoBias,
}
READING: dict[str, Callable[..., Metric]] = {"regard": Regard, "toxicity": Toxicity, "drift": Drift}


def make_metric(
    name: str, settings: Mapping[str, Any], texts: Continuations, stand_in: Callable[[str], ClassifierSource]
) -> tuple[Metric, int | None]:
    """A metric with its settings, and how many items it takes. Reads no data.

    ``stand_in`` gives the classifier of regard or toxicity where the settings name none.
    """
    settings = _hashable(settings)
    limit = settings.pop("limit", None)
    if name in SCORING:
        return SCORING[name](**settings), limit
    if name == "diversity":
        return Diversity(texts, **settings), limit
    if name not in READING:
        known = [*SCORING, *READING, "diversity"]
        raise ValueError(f"metrics has {name!r}, allowed are {', '.join(known)}")
    kind = "toxicity" if name == "toxicity" else "regard"
    source = settings.pop("classifier", None)
    classifier = stand_in(kind) if source is None else classifier_source(source)
    return READING[name](classifier, texts, **settings), limit


def make_texts(folder: Path, settings: Mapping[str, Any]) -> Continuations:
    """The continuations of BOLD that several metrics read."""
    return Continuations(str(folder), **_hashable(settings))


def distilled(kind: str, data: Path, folder: Path, say: Callable[[str], None]) -> ClassifierSource:
    """The distilled stand-in of a classifier, trained when it is first needed."""
    if not (folder / kind / CONFIG).is_file():
        say(f"distilling a stand-in for the {kind} classifier")
        train, test = read_labelled(data)
        {"regard": distill_regard, "toxicity": distill_toxicity}[kind](train, test).save(folder / kind)
    return classifier_source(str(folder / kind))


def _hashable(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
