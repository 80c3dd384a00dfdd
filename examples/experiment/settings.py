"""The experiment as its file says it: pairs, metrics, and stages of systems."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.evaluation.bold import paper_params
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.trigger import SearchSettings
from ensemble_decode.experts import texts
from ensemble_decode.experts.calibration import CalibrationSettings
from ensemble_decode.experts.training import TrainingSettings
from examples.experiment.metrics import make_metric, make_texts

DEFAULT = Path(__file__).with_name("settings.toml")
_DEMO_LINES = Path(texts.__file__).parents[1] / "data" / "gender" / "train.txt"
SIZES = ("quick", "large")
_TABLES = ("training", "pairs", "metrics", "text", "calibration", "trigger", "stages")
_SOURCES = ("redditbias", "readings")
#: Names that a stage can't have: what --stage calls otherwise, and files of OUT beside the stages' own.
_TAKEN = ("train", "calibrate", "report", "calibration", "trigger-search")


@dataclass(frozen=True, slots=True)
class PairSpec:
    """A pair: the folder of a trained one, or what it learns from and how."""

    name: str
    axis: str
    training: TrainingSettings
    folder: str | None = None
    redditbias: str | None = None
    readings: str | None = None
    share: float = 1.0

    def texts(self, data: Path) -> texts.PairTexts:
        """All its sources, one after another, or a share of their lines."""
        parts = []
        if self.redditbias is not None:
            parts.append(texts.from_redditbias(data, self.axis, self.redditbias))
        if self.readings is not None:
            path = _DEMO_LINES if self.readings == "demo" else Path(self.readings)
            parts.append(texts.from_readings(path, self.axis))
        return texts.part(texts.joined(parts), self.share, self.training.seed)


@dataclass(frozen=True, slots=True)
class SystemSpec:
    """A system before its models are loaded: α of each pair that is on, and how to sample.

    ``calibrated``: α is still to be found by calibration. ``searched``: so is the trigger, by its search.
    """

    name: str
    alpha: dict[str, float]
    sampling: dict[str, Any] = field(default_factory=dict)
    trigger: str = ""
    calibrated: bool = False
    searched: bool = False

    @property
    def params(self) -> SamplingParams:
        """As arXiv 2412.01711 samples where nothing else is said."""
        return replace(paper_params(self.alpha), **self.sampling)


@dataclass(frozen=True, slots=True)
class Stage:
    """Every metric on every system; ``text`` and ``settings`` say how its texts and metrics differ from the experiment's."""

    name: str
    metrics: tuple[str, ...]
    systems: tuple[SystemSpec, ...]
    text: dict[str, Any]
    settings: dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Experiment:
    """The whole file, with the part that ``size`` names laid over it."""

    size: str | None
    model: str
    dtype: str
    axes: tuple[str, ...]
    pairs: dict[str, PairSpec]
    metrics: dict[str, dict[str, Any]]
    text: dict[str, Any]
    calibration: dict[str, Any]
    trigger: dict[str, Any]
    stages: dict[str, Stage]

    def settings_of(self, stage: Stage, metric: str) -> dict[str, Any]:
        """Those of a metric in a stage."""
        return {**self.metrics[metric], **stage.settings.get(metric, {})}

    def text_of(self, stage: Stage) -> dict[str, Any]:
        """Those of a stage's texts."""
        return {**self.text, **stage.text}


def read_settings(path: Path = DEFAULT, size: str | None = None) -> Experiment:
    """Read a settings file, with a part of :data:`SIZES` laid over the rest where ``size`` names it.

    Raises
    ------
    ValueError
        One line: where in the file, what is wrong, what is allowed.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from None
    over = {name: raw.pop(name, {}) for name in SIZES}
    if size is not None:
        raw = _laid_over(raw, over[size])
    try:
        training = {"seed": raw.get("seed", 0), **raw.get("training", {})}
        pairs = {name: _pair(name, table, training) for name, table in raw["pairs"].items()}
        axes = tuple(raw["axes"])
        metrics = {name: dict(table) for name, table in raw["metrics"].items()}
        stages = {name: _stage(name, table, axes, pairs, metrics) for name, table in raw["stages"].items()}
        for name in axes:
            if name not in pairs:
                raise ValueError(f"axes names {name!r}, allowed are the pairs {', '.join(pairs)}")
        _only("", raw, (*_TABLES, "model", "dtype", "axes", "seed"))
        experiment = Experiment(
            size,
            raw["model"],
            raw.get("dtype", "auto"),
            axes,
            pairs,
            metrics,
            raw.get("text", {}),
            raw.get("calibration", {}),
            {"domain": "gender", "examples": 8, **raw.get("trigger", {})},
            stages,
        )
        _check(experiment)
        return experiment
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def _check(experiment: Experiment) -> None:
    """Make all that is described once: what is wrong is said before hours of training, not after."""
    search = {key: value for key, value in experiment.trigger.items() if key not in ("domain", "examples")}
    with _naming("calibration"):
        CalibrationSettings(**experiment.calibration)
    with _naming("trigger"):
        SearchSettings(**search)
    with _naming("text"):
        texts = make_texts(Path(), experiment.text)
    for name, table in experiment.metrics.items():
        with _naming(f"metrics.{name}"):
            make_metric(name, table, texts, ClassifierSource)
    for stage in experiment.stages.values():
        with _naming(f"stages.{stage.name}.text"):
            make_texts(Path(), experiment.text_of(stage))
        for name in stage.settings:
            with _naming(f"stages.{stage.name}.settings.{name}"):
                make_metric(name, experiment.settings_of(stage, name), texts, ClassifierSource)


@contextmanager
def _naming(where: str) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _only(where: str, table: Mapping[str, Any], allowed: Sequence[str]) -> None:
    for key in table:
        if key not in allowed:
            raise ValueError(f"{where}{key!r} is unknown, allowed are {', '.join(allowed)}")


def _pair(name: str, table: Mapping[str, Any], training: Mapping[str, Any]) -> PairSpec:
    own = {"axis", "folder", "share", *_SOURCES}
    settings = TrainingSettings(**{**training, **{key: value for key, value in table.items() if key not in own}})
    spec = PairSpec(name, training=settings, **{key: value for key, value in table.items() if key in own})
    if spec.folder is None and spec.redditbias is None and spec.readings is None:
        raise ValueError(f"pairs.{name} has nothing to learn from, needed is folder, {' or '.join(_SOURCES)}")
    return spec


def _stage(
    name: str,
    table: Mapping[str, Any],
    axes: tuple[str, ...],
    pairs: Mapping[str, PairSpec],
    metrics: Mapping[str, Any],
) -> Stage:
    if name in _TAKEN:
        raise ValueError(f"stages has {name!r}, allowed is any name but {', '.join(_TAKEN)}")
    _only(f"stages.{name}: ", table, ("metrics", "systems", "text", "settings"))
    systems = tuple(_system(f"stages.{name}", entry, axes, pairs) for entry in table["systems"])
    for metric in table["metrics"]:
        if metric not in metrics:
            raise ValueError(f"stages.{name} names the metric {metric!r}, allowed are {', '.join(metrics)}")
    _only(f"stages.{name}.settings: ", table.get("settings", {}), table["metrics"])
    names = [system.name for system in systems]
    if len(set(names)) < len(names):
        raise ValueError(f"stages.{name} has two systems of one name, each needs its own")
    return Stage(name, tuple(table["metrics"]), systems, dict(table.get("text", {})), dict(table.get("settings", {})))


def _system(where: str, entry: Mapping[str, Any], axes: tuple[str, ...], pairs: Mapping[str, PairSpec]) -> SystemSpec:
    sampling = dict(entry)
    name, alpha, trigger = sampling.pop("name"), sampling.pop("alpha"), sampling.pop("trigger", "")
    calibrated, searched = alpha == "calibrated", trigger is True
    by_pair = {} if calibrated else dict(alpha) if isinstance(alpha, Mapping) else dict.fromkeys(axes, alpha)
    for pair, value in by_pair.items():
        if pair not in pairs:
            raise ValueError(f"{where}: {name!r} steers with {pair!r}, allowed are the pairs {', '.join(pairs)}")
        if isinstance(value, str):
            raise ValueError(f"{where}: {name!r} has α {value!r}, allowed are numbers and 'calibrated'")
    active = {pair: float(value) for pair, value in by_pair.items() if value}
    spec = SystemSpec(name, active, sampling, "" if searched else trigger, calibrated, searched)
    _ = spec.params  # so that a wrong parameter is said before anything runs
    return spec


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(below.get(key), Mapping)
        merged[key] = _laid_over(below[key], value) if both else value
    return merged
