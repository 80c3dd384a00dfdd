"""The α of each axis: StereoSet's stereotype score towards 50 where sentences still make sense, within a budget of perplexity.

On one half of the target terms of each axis, its pair alone is scored at every α of a grid. SS there is a step function of
few terms; its isotonic fit (the closest function that never rises, by pooling adjacent violators) says which α is enough.
Pairs move one another's axes, so they are then scored together, on all axes of that half, at a lattice of α up to these; so is the
perplexity of a validation text. log-perplexity is convex in α (log Σ exp of linear functions less a linear one), so between
the lattice's points a linear interpolation errs upwards only, and what seems within the budget is. Of all combinations within it,
those with the highest ICAT are taken, the mean of LMS · min(SS, 100 − SS) / 50 over the axes: SS at 50, but not at the price of
sentences without a meaning. Among those that are as good but for the noise, it is the one of least perplexity. The other half of
the terms then says what that does.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ensemble_decode.corpora.stereoset import DOMAINS, LABELS, Example, draw, read_examples
from ensemble_decode.engine.llm import LLM
from ensemble_decode.engine.params import SamplingParams
from ensemble_decode.evaluation.comparison import Comparison, compare
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.perplexity import read_text, windows
from ensemble_decode.evaluation.report import columns, with_interval
from ensemble_decode.evaluation.runner import dump, write
from ensemble_decode.evaluation.statistics import Values
from ensemble_decode.evaluation.stereoset import StereoSet, sentence_scores
from ensemble_decode.evaluation.swept import SweptLLM

UNBIASED = 50.0
SYSTEMS = ("target", "calibrated")
_LATTICE = 128  # most points of the lattice of α
_FINE = 60_000  # most combinations that are searched by interpolation
_CLOSE = 1.0  # points of ICAT that are not worth any perplexity: some dozen terms don't tell them apart


@dataclass(frozen=True, slots=True)
class CalibrationSettings:
    """``budget`` is the perplexity that may be added, as a share; ``tokens`` are those of the validation text.

    ``window`` is its windows' length, or the model's length if that is less. ``examples`` takes at most so many StereoSet
    examples of each domain and half; None: all.
    """

    budget: float = 0.10
    max_alpha: float = 5.0
    step: float = 0.25
    tokens: int = 8000
    window: int = 992
    seed: int = 0
    examples: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("budget", 0.0), ("max_alpha", 0.0), ("step", 0.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least or (value == 0 and name != "budget"):
                raise ValueError(f"{name} is {value!r}, allowed is {'0 or more' if name == 'budget' else 'above 0'}")
        if self.step > self.max_alpha:
            raise ValueError(f"step is {self.step!r}, allowed is at most max_alpha, {self.max_alpha!r}")
        for name in ("tokens", "window"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} is {getattr(self, name)!r}, allowed is 2 or more")

    @property
    def grid(self) -> list[float]:
        """0, step, 2 step, … up to ``max_alpha``."""
        return [round(self.step * i, 6) for i in range(int(self.max_alpha / self.step + 1e-9) + 1)]


@dataclass(frozen=True, slots=True)
class Axis:
    """A pair's calibration: SS and LMS of its half at every α of the grid, with the pair alone, and the α by itself."""

    domain: str
    alphas: list[float]
    ss: list[float]
    fit: list[float]
    lms: list[float]

    @property
    def unfairness(self) -> Values:
        """|SS − 50| of the fit at every α."""
        return np.abs(np.array(self.fit) - UNBIASED)

    def at(self, alpha: float) -> float:
        """The fit between the α of the grid."""
        return float(np.interp(alpha, self.alphas, self.fit))

    @property
    def alone(self) -> float:
        """The least α that brings the fit closest to 50, whatever it costs."""
        fit, alphas = np.array(self.fit), np.array(self.alphas)
        below = np.flatnonzero(fit <= UNBIASED)
        if not len(below):
            return float(alphas[int(self.unfairness.argmin())])
        place = int(below[0])
        if place == 0:
            return 0.0
        share = (fit[place - 1] - UNBIASED) / (fit[place - 1] - fit[place])
        return float(alphas[place - 1] + share * (alphas[place] - alphas[place - 1]))

    @property
    def reaches(self) -> bool:
        """Whether the fit passes 50 within the grid; one that starts below doesn't."""
        return self.fit[0] >= UNBIASED >= self.fit[-1]


@dataclass(frozen=True, slots=True)
class Calibration:
    """What came out. ``perplexity`` is the validation text's: of the target, and of all pairs at ``alpha``.

    ``held_out`` holds StereoSet's figures on the other half of the terms, of "target" and "calibrated", and ``differences``
    the second's from the first's.
    """

    alpha: dict[str, float]
    axes: dict[str, Axis]
    perplexity: dict[str, float]
    held_out: dict[str, dict[str, Figure]]
    differences: dict[str, Comparison]
    settings: CalibrationSettings

    @property
    def added(self) -> float:
        """Perplexity that was added, as a share of the target's."""
        return self.perplexity["calibrated"] / self.perplexity["target"] - 1

    def to_json(self) -> str:
        """``alpha`` is what ``--alpha @FILE`` reads."""
        plain = asdict(self)
        for name, axis in self.axes.items():
            plain["axes"][name] |= {"alone": axis.alone, "reaches": axis.reaches}
        return dump({"format": 1, **plain})

    def to_text(self) -> str:
        """Two tables: each axis' α and how far from 50 its SS then is, and what all pairs do on the other half."""
        rows = [["pair", "axis", "SS at 0", "alpha alone", "SS there", "alpha", "SS there", "held out: SS − 50"]]
        for name, axis in self.axes.items():
            alone = f"{axis.alone:.2f}" + ("" if axis.reaches else " (50 not reached)")
            cells = [axis.at(0.0), alone, axis.at(axis.alone), self.alpha[name], axis.at(self.alpha[name])]
            left = self.held_out["calibrated"].get(f"SS/{axis.domain}")
            numbers = (cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells)
            rows.append([name, axis.domain, *numbers, "" if left is None else f"{left.value - UNBIASED:+.2f}"])
        held = [["held out", "target", "calibrated", "difference"]]
        for key, target in self.held_out["target"].items():
            test = self.differences.get(key)
            said = "" if test is None else f"{test.difference:+.2f} [{test.low:.2f}, {test.high:.2f}], p {test.p:.2g}"
            held.append([key, *(with_interval(f) for f in (target, self.held_out["calibrated"][key])), said])
        before, after = self.perplexity["target"], self.perplexity["calibrated"]
        note = (
            f"Perplexity (validation, window {self.settings.window}): {before:.2f} → {after:.2f}, {self.added:+.1%}; "
            f"budget {self.settings.budget:+.0%}. Chosen: the highest ICAT within the budget. SS in the first table: isotonic fit, the "
            "pair alone, calibrating half; its last column: all pairs."
        )
        return "\n\n".join([columns(rows), columns(held), note])


class Calibrator:
    """Calibrates the pairs of an LLM; what was measured is kept in a folder and not measured again.

    Parameters
    ----------
    llm : LLM
    axes : mapping of str to str
        StereoSet's domain of each pair that is to be calibrated; the others are off.
    identity : mapping
        What identifies the weights: records of other weights are not taken for these.
    """

    def __init__(
        self,
        llm: LLM,
        axes: Mapping[str, str],
        data: Path,
        out: Path,
        settings: CalibrationSettings,
        identity: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        if not axes:
            raise ValueError("axes is empty, at least one pair is needed")
        for name, domain in axes.items():
            if domain not in DOMAINS:
                raise ValueError(f"pair {name!r} has the axis {domain!r}, allowed are {', '.join(DOMAINS)}")
        self.llm, self.axes, self.data, self.out = llm, dict(axes), data, out
        self.settings = replace(settings, window=min(settings.window, llm.ensemble.layout.max_model_len))
        self._identity, self._say = dict(identity), say

    def run(self) -> Calibration:
        """Measure, choose, and measure what was chosen on the other half."""
        halves = split_terms(read_examples(self.data), self.settings.seed)
        fit, held = (draw(half, self.settings.examples) for half in halves)
        axes = {name: self._axis(name, domain, fit) for name, domain in self.axes.items()}
        alpha = self._choose(axes, [example for example in fit if example.domain in self.axes.values()])
        perplexity = dict(zip(SYSTEMS, self._perplexities([{}, alpha]), strict=True))
        metric = StereoSet()
        records = dict(zip(SYSTEMS, self._stereoset("held_out", held, [{}, alpha]), strict=True))
        figures = {name: metric.summarise(listed) for name, listed in records.items()}
        target, calibrated = (metric.estimates(listed) for listed in records.values())
        tests = {key: compare(calibrated[key], target[key], metric.resamples) for key in target}
        differences = {key: test for key, test in tests.items() if test is not None}
        return Calibration(alpha, axes, perplexity, figures, differences, self.settings)

    # ── the axes, one by one ────────────────────────────────────────────────────────────────────────────────────────
    def _axis(self, name: str, domain: str, examples: Sequence[Example]) -> Axis:
        own = [example for example in examples if example.domain == domain]
        if not own:
            raise ValueError(f"StereoSet has no example of {domain!r} in the half that {name!r} is calibrated on")
        grid = self.settings.grid
        records = self._stereoset(f"{name}_alone", own, [{name: value} if value else {} for value in grid])
        values = [{key: e.value for key, e in StereoSet().estimates(listed).items()} for listed in records]
        ss, lms = ([value[key] for value in values] for key in ("SS", "LMS"))
        return Axis(domain, grid, ss, never_rising(ss), lms)

    def _stereoset(
        self, name: str, examples: Sequence[Example], alphas: Sequence[Mapping[str, float]]
    ) -> list[list[Record]]:
        """Records of every α on the same examples."""

        def measure() -> list[list[Record]]:
            swept = SweptLLM(self.llm, alphas)
            texts = [example[label].text for example in examples for label in LABELS]
            found = []
            for alpha in alphas:
                system = System(name, swept, SamplingParams(alpha=dict(alpha)))  # type: ignore[arg-type]
                scores = iter(sentence_scores(system, texts))
                found.append(
                    [
                        {"id": e.id, "domain": e.domain, "term": e.term, **{label: next(scores) for label in LABELS}}
                        for e in examples
                    ]
                )
            return found

        key = {"examples": [example.id for example in examples], "alphas": [dict(alpha) for alpha in alphas]}
        return self._kept(f"stereoset_{name}", key, measure)

    # ── all pairs together ──────────────────────────────────────────────────────────────────────────────────────────
    def _choose(self, axes: Mapping[str, Axis], examples: Sequence[Example]) -> dict[str, float]:
        grid = self.settings.grid
        alone = iter(self._perplexities([{}, *({name: alpha} for name in axes for alpha in grid[1:])]))
        most = next(alone) * (1 + self.settings.budget)
        bounds = {name: within(grid, [next(alone) for _ in grid[1:]], most) for name in axes}
        levels = lattice([min(axis.alone, bounds[name]) for name, axis in axes.items()])
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*levels)]
        shape = [len(level) for level in levels]
        measured = np.log(self._perplexities(points)).reshape(shape)
        records = self._stereoset("together", examples, [{n: a for n, a in point.items() if a} for point in points])
        domains = dict.fromkeys(self.axes.values())
        scores = [StereoSet().estimates(listed) for listed in records]
        icat = np.array([np.mean([found[f"ICAT/{domain}"].value for domain in domains]) for found in scores])
        values = best_within(levels, measured, icat.reshape(shape), self.settings.budget)
        return dict(zip(axes, values, strict=True))

    def _perplexities(self, alphas: Sequence[Mapping[str, float]]) -> list[float]:
        """Of the validation text at every α, all from one forward of the members."""
        settings = self.settings

        def measure() -> list[float]:
            tokenizer = self.llm.tokenizer
            if tokenizer is None:
                raise ValueError("perplexity needs a tokenizer, this model has none")
            text = read_text(self.data, "paper", "valid")
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: settings.tokens]
            parts = [ids[begin:end] for begin, end, _ in windows(len(ids), settings.window, settings.window)]
            swept = SweptLLM(self.llm, alphas)
            found = []
            for alpha in alphas:
                scores = [value for score in swept.score(parts, dict(alpha), use_tqdm=True) for value in score.logprobs]
                counted = [value for value in scores if value is not None]
                found.append(math.exp(-math.fsum(counted) / len(counted)))
            return found

        key = {"tokens": settings.tokens, "window": settings.window, "alphas": [dict(alpha) for alpha in alphas]}
        return self._kept("perplexity", key, measure)

    def _kept(self, name: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What was measured before by the same weights, or is now."""
        folder = self.out / "records"
        folder.mkdir(parents=True, exist_ok=True)
        depends_on = {"model": self._identity, "data": str(self.data.resolve()), **key}
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"{name}_{digest}.json"
        if path.is_file():
            self._say(f"{name} (kept)")
        else:
            self._say(name)
            write(path, dump({"depends_on": depends_on, "records": measure()}))
        return json.loads(path.read_text(encoding="utf-8"))["records"]


def split_terms(examples: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Two halves by target term, so that no term is in both; each domain's terms are halved by themselves."""
    first: set[tuple[str, str]] = set()
    for domain in DOMAINS:
        terms = sorted({example.term for example in examples if example.domain == domain})
        random.Random(f"{seed}:{domain}").shuffle(terms)
        first |= {(domain, term) for term in terms[: (len(terms) + 1) // 2]}
    halves: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        halves[(example.domain, example.term) not in first].append(example)
    return halves


def never_rising(values: Sequence[float]) -> list[float]:
    """The closest non-increasing sequence in the sense of least squares, by pooling adjacent violators."""
    blocks: list[tuple[float, int]] = []
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] < blocks[-1][0]:
            (a, n), (b, m) = blocks[-2:]
            blocks[-2:] = [((a * n + b * m) / (n + m), n + m)]
    return [mean for mean, count in blocks for _ in range(count)]


def within(grid: Sequence[float], perplexities: Sequence[float], most: float) -> float:
    """The first α of the grid, of those after 0, whose perplexity is above ``most``; the last if none is."""
    return next((alpha for alpha, value in zip(grid[1:], perplexities, strict=True) if value > most), grid[-1])


def lattice(most: Sequence[float]) -> list[list[float]]:
    """Levels of α for each axis, from 0 to ``most``; all combinations are at most 128."""
    free = sum(value > 0 for value in most)
    count = max(2, int(_LATTICE ** (1 / free) + 1e-9)) if free else 1
    count = min(count, 17)
    return [np.linspace(0.0, value, count).tolist() if value > 0 else [0.0] for value in most]


def best_within(levels: Sequence[Sequence[float]], log_perplexity: Values, icat: Values, budget: float) -> list[float]:
    """The α of each axis: of those within the budget, the cheapest whose ICAT is close to the highest.

    Parameters
    ----------
    levels : sequence of sequences of float
        Of the lattice, from 0 up.
    log_perplexity, icat : float64 array, a dimension an axis
        At the lattice's points; the first is the target's. Between them both are interpolated.
    """
    free = sum(len(level) > 1 for level in levels)
    count = int(_FINE ** (1 / free)) if free else 1
    fine = [np.linspace(level[0], level[-1], min(count, 401)) if len(level) > 1 else np.zeros(1) for level in levels]
    cost, gain = (_interpolated(values, levels, fine) for values in (log_perplexity, icat))
    allowed = cost <= cost.flat[0] + math.log1p(budget) + 1e-12
    best = gain[allowed].max()
    close = allowed & (gain >= best - _CLOSE)
    chosen = np.unravel_index(int(np.where(close, cost, np.inf).argmin()), cost.shape)
    return [float(alphas[index]) for alphas, index in zip(fine, chosen, strict=True)]


def _interpolated(values: Values, levels: Sequence[Sequence[float]], fine: Sequence[Values]) -> Values:
    """Values at the lattice's points, linearly between them, one axis after another."""
    for place, (level, alphas) in enumerate(zip(levels, fine, strict=True)):
        if len(level) > 1:
            moved = np.moveaxis(values, place, -1)
            rows = [np.interp(alphas, level, row) for row in moved.reshape(-1, len(level))]
            values = np.moveaxis(np.reshape(rows, (*moved.shape[:-1], len(alphas))), -1, place)
    return values
