"""Running a stage: train the pairs it needs, load them with the target, measure, keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ensemble_decode import LLM
from ensemble_decode.cli.common import SMOLLM2
from ensemble_decode.evaluation.metric import Metric, System
from ensemble_decode.evaluation.perplexity import Perplexity
from ensemble_decode.evaluation.report import Report
from ensemble_decode.evaluation.runner import Results, fingerprint, make_tasks, run_tasks, write
from ensemble_decode.evaluation.stereoset import StereoSet
from ensemble_decode.experts.training import SIDES, train_pair
from ensemble_decode.models.pairs import ExpertPair
from ensemble_decode.models.smollm2 import HUB_ID, smollm2_path
from examples.experiment.settings import Experiment, PairSpec, Stage, SystemSpec


@dataclass
class Laboratory:
    """An experiment with its data and the folder that its results go to."""

    experiment: Experiment
    data: Path
    out: Path
    say: Callable[[str], None] = print
    progress: bool = False

    # ── pairs ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def train(self, names: Sequence[str]) -> None:
        """Train what is not trained yet; a killed training goes on from its last checkpoint."""
        for name in names:
            spec = self.experiment.pairs[name]
            if spec.folder is None and not (self.folder(spec) / "pair.json").is_file():
                self.say(f"training {name}")
                train_pair(
                    str(self.target),
                    spec.texts(self.data),
                    self.folder(spec),
                    spec.training,
                    base_name=HUB_ID if self.experiment.model == SMOLLM2 else None,
                    say=self.say,
                    progress=self.progress,
                )

    def folder(self, spec: PairSpec) -> Path:
        """Where a pair is, or will be."""
        return self.out / "pairs" / spec.name if spec.folder is None else Path(spec.folder).expanduser()

    @cached_property
    def target(self) -> str | Path:
        """The model's folder or hub id."""
        return smollm2_path() if self.experiment.model == SMOLLM2 else self.experiment.model

    def load(self, pairs: Sequence[str]) -> LLM:
        """The target with these pairs."""
        folders = {name: self.folder(self.experiment.pairs[name]) for name in pairs}
        return LLM(
            str(self.target),
            {name: ExpertPair.from_folder(folder, self.target) for name, folder in folders.items()},
            dtype=self.experiment.dtype,
        )

    # ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────
    def run(self, stage: Stage) -> Results:
        """Figures of a stage, also in ``OUT/<stage>.json``; records that are there are not measured again."""
        self.train(stage.pairs)
        llm = self.load(stage.pairs)
        results: Results = {}
        for name in stage.metrics:
            metric, limit = self.metric(name)
            tasks = [
                task
                for spec in stage.systems
                for task in make_tasks([spec_system(spec, llm)], [metric], self.identity(spec), self.data, limit)
            ]
            for system, figures in run_tasks(tasks, self.data, self.out, limit, self.say).items():
                results.setdefault(system, {}).update(figures)
            write(self.out / f"{stage.name}.json", Report(results, self.about(stage)).to_json())
        self.say(Report(results, self.about(stage)).to_text())
        return results

    def metric(self, name: str) -> tuple[Metric, int | None]:
        """A metric of the settings, and how many items it takes."""
        settings = dict(self.experiment.metrics[name])
        limit = settings.pop("limit", None)
        makers: dict[str, Callable[..., Metric]] = {"stereoset": StereoSet, "perplexity": Perplexity}
        if name not in makers:
            raise ValueError(f"metrics has {name!r}, allowed are {', '.join(makers)}")
        return makers[name](**settings), limit

    def identity(self, spec: SystemSpec) -> dict[str, Any]:
        """What identifies the weights of a system: of the pairs that are on in it, and of no others."""
        folders = {name: self.folder(self.experiment.pairs[name]) for name in spec.alpha}
        pairs = {name: [self.fingerprint(folder / side) for side in SIDES] for name, folder in folders.items()}
        return {"target": self.fingerprint(Path(self.target)), "pairs": pairs, "dtype": self.experiment.dtype}

    def fingerprint(self, folder: Path) -> str:
        """Of a folder, computed once."""
        if folder not in self._fingerprints:
            self._fingerprints[folder] = fingerprint(folder)
        return self._fingerprints[folder]

    @cached_property
    def _fingerprints(self) -> dict[Path, str]:
        return {}

    def about(self, stage: Stage) -> Mapping[str, Any]:
        """What a stage's report says of itself."""
        return {
            "model": HUB_ID if self.experiment.model == SMOLLM2 else self.experiment.model,
            "dtype": self.experiment.dtype,
            "metrics": {name: self.experiment.metrics[name] for name in stage.metrics},
            "systems": {spec.name: {"alpha": spec.alpha, **spec.sampling} for spec in stage.systems},
        }


def spec_system(spec: SystemSpec, llm: LLM) -> System:
    """A system of a loaded model."""
    return System(spec.name, llm, spec.params)
