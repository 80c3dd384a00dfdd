"""Running a stage: train the pairs it needs, load them with the target, measure, keep."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ensemble_decode import LLM
from ensemble_decode.cli.common import SMOLLM2, refuse_learned
from ensemble_decode.corpora.stereoset import SOURCE as STEREOSET
from ensemble_decode.corpora.stereoset import read_examples
from ensemble_decode.evaluation.classifiers import ClassifierSource
from ensemble_decode.evaluation.comparison import compare_all
from ensemble_decode.evaluation.distill import read_labelled
from ensemble_decode.evaluation.metric import Metric, System
from ensemble_decode.evaluation.perplexity import read_text
from ensemble_decode.evaluation.report import Report
from ensemble_decode.evaluation.runner import Results, Task, fingerprint, make_tasks, run_tasks, write
from ensemble_decode.evaluation.swept import share_forwards
from ensemble_decode.evaluation.trigger_examples import regard_examples
from ensemble_decode.experts.calibration import CalibrationSettings, Calibrator
from ensemble_decode.experts.card import digest
from ensemble_decode.experts.training import SIDES, train_pair
from ensemble_decode.models.pairs import ExpertPair
from ensemble_decode.models.smollm2 import HUB_ID, smollm2_path
from examples.experiment.metrics import READING, distilled, make_metric, make_texts
from examples.experiment.settings import Experiment, PairSpec, Stage, SystemSpec
from examples.experiment.trigger import find_trigger

TARGET = "target"


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
        """Train what is not trained yet; a killed training goes on from its last checkpoint.

        Raises
        ------
        ValueError
            A pair is there that was trained with other settings or texts, or from another model.
        """
        for name in names:
            spec = self.experiment.pairs[name]
            if spec.folder is None and (self.folder(spec) / "pair.json").is_file():
                self._check_trained(spec)
            elif spec.folder is None:
                self.say(f"training {name}")
                train_pair(
                    str(self.target),
                    spec.texts(self.data),
                    self.folder(spec),
                    spec.training,
                    base_name=self.model_name,
                    say=self.say,
                    progress=self.progress,
                )

    def refuse_learned(self, names: Sequence[str]) -> None:
        """An error for a pair that would be measured on StereoSet and has learned from it."""
        refuse_learned([f"{name}={self.folder(self.experiment.pairs[name])}" for name in names], STEREOSET.name)

    def _check_trained(self, spec: PairSpec) -> None:
        folder = self.folder(spec)
        about = json.loads((folder / "pair.json").read_text(encoding="utf-8"))
        trained = {"base_model": about["base_model"], **about["settings"]}
        asked = {"base_model": self.model_name, **asdict(spec.training)}
        if "texts" in about:  # pairs of older versions don't say
            trained["texts"], asked["texts"] = about["texts"], digest(spec.texts(self.data))
        changed = ", ".join(name for name in asked if trained.get(name) != asked[name])
        if changed:
            raise ValueError(
                f"pair {spec.name!r} in {str(folder)!r} was trained with other {changed}: remove it or name another"
            )

    def folder(self, spec: PairSpec) -> Path:
        """Where a pair is, or will be."""
        return self.out / "pairs" / spec.name if spec.folder is None else Path(spec.folder).expanduser()

    @property
    def model_name(self) -> str:
        """The model as pairs and reports name it."""
        return HUB_ID if self.experiment.model == SMOLLM2 else self.experiment.model

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

    # ── before anything is computed ─────────────────────────────────────────────────────────────────────────────────
    def check(self, stages: Sequence[Stage], train: bool = False, calibrate: bool = False) -> None:
        """Read once what the stages will read, so that a corpus that is missing is said now and not after hours."""
        systems = [spec for stage in stages for spec in stage.systems]
        calibrate |= any(spec.calibrated for spec in systems)
        axes = self.experiment.axes if train or calibrate else []
        for name in dict.fromkeys([*axes, *(name for spec in systems for name in spec.alpha)]):
            pair = self.experiment.pairs[name]
            if pair.folder is None:
                pair.texts(self.data)
        if calibrate:
            read_examples(self.data, "intrasentence")
            read_text(self.data, "paper", "valid")
        if any(spec.searched for spec in systems):
            search = self.experiment.trigger
            regard_examples(self.data, search["domain"], search["examples"])
        labelled = False
        for stage in stages:
            texts = make_texts(self.out / "continuations", self.experiment.text_of(stage))
            for name in stage.metrics:
                settings = self.experiment.settings_of(stage, name)
                if name in READING and "classifier" not in settings:  # its stand-in is distilled when it is needed
                    texts.check(self.data)
                    labelled = True
                else:
                    make_metric(name, settings, texts, self._stand_in)[0].check(self.data)
        if labelled:
            read_labelled(self.data)

    # ── calibrating ─────────────────────────────────────────────────────────────────────────────────────────────────
    def calibrate(self) -> dict[str, float]:
        """The calibrated α of the axes' pairs, measured once; the whole calibration is in ``OUT/calibration.json``."""
        axes = self.experiment.axes
        self.refuse_learned(axes)
        self.train(axes)
        identity = self.identity(SystemSpec("calibration", dict.fromkeys(axes, 1.0)))
        settings = CalibrationSettings(**self.experiment.calibration)
        path = self.out / "calibration.json"
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        domains = {name: self.experiment.pairs[name].axis for name in axes}
        of = {"identity": identity, "settings": self.experiment.calibration, "axes": domains}
        key = json.loads(json.dumps(of | {"data": str(self.data.resolve())}))
        if kept.get("of") != key:
            found = Calibrator(self.load(axes), domains, self.data, self.out, settings, identity, self.say).run()
            self.say(found.to_text())
            kept = json.loads(found.to_json()) | {"of": key}
            write(path, json.dumps(kept, sort_keys=True, indent=1, ensure_ascii=False) + "\n")
        return kept["alpha"]

    # ── measuring ───────────────────────────────────────────────────────────────────────────────────────────────────
    def run(self, stage: Stage) -> Results:
        """Figures of a stage, also in ``OUT/<stage>.json``; records that are there are not measured again."""
        specs = self.resolved(stage)
        pairs = tuple(dict.fromkeys(name for spec in specs for name in spec.alpha))
        if "stereoset" in stage.metrics:
            self.refuse_learned(pairs)
        self.train(pairs)
        llm = self.load(pairs)
        results: Results = {spec.name: {} for spec in specs}
        comparisons: dict[str, Any] = {}
        texts = make_texts(self.out / "continuations", self.experiment.text_of(stage))
        for name in stage.metrics:
            metric, limit = make_metric(name, self.experiment.settings_of(stage, name), texts, self._stand_in)
            tasks = self.tasks(specs, metric, limit, llm)
            for system, figures in run_tasks(tasks, self.data, self.out, limit, self.say).items():
                results[system].update(figures)
            for system, tests in compare_all(tasks, self.out, TARGET).items():
                comparisons.setdefault(system, {}).update(tests)
            report = Report(results, self.about(stage, specs), comparisons, TARGET)
            write(self.out / f"{stage.name}.json", report.to_json())
        write(self.out / f"{stage.name}.md", report.to_markdown())
        self.say(report.to_text())
        return results

    def _stand_in(self, kind: str) -> ClassifierSource:
        return distilled(kind, self.data, self.out / "classifiers", self.say)

    def resolved(self, stage: Stage) -> list[SystemSpec]:
        """The stage's systems, with α and trigger found where they are to be found."""
        specs = []
        for spec in stage.systems:
            if spec.calibrated:
                spec = replace(spec, alpha={n: a for n, a in self.calibrate().items() if a}, calibrated=False)
            if spec.searched:
                search = self.experiment.trigger
                trigger = find_trigger(str(self.target), self.data, self.out / "trigger-search.json", search)
                spec = replace(spec, trigger=trigger, searched=False)
            specs.append(spec)
        return specs

    def tasks(self, specs: Sequence[SystemSpec], metric: Metric, limit: int | None, llm: LLM) -> list[Task]:
        """A task a system; those that only score text share one forward of the members."""
        tasks = []
        for spec in specs:
            system = System(spec.name, llm, spec.params, spec.trigger)
            tasks += make_tasks([system], [metric], self.identity(spec), self.data, limit)
        return share_forwards(tasks, self.out / "records")

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

    def about(self, stage: Stage, specs: Sequence[SystemSpec]) -> Mapping[str, Any]:
        """What a stage's report says of itself."""
        return {
            "model": self.model_name,
            "size": self.experiment.size,
            "dtype": self.experiment.dtype,
            "metrics": {name: self.experiment.settings_of(stage, name) for name in stage.metrics},
            "text": self.experiment.text_of(stage),
            "systems": {s.name: {"alpha": s.alpha, "trigger": bool(s.trigger), **s.sampling} for s in specs},
        }
