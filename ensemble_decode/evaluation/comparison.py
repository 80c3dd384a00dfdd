"""Is a system different from the target? Paired bootstrap tests on the units that both were measured on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

import numpy as np

from ensemble_decode.evaluation.estimate import Estimate
from ensemble_decode.evaluation.runner import Task
from ensemble_decode.evaluation.statistics import holm, interval, two_sided

#: A difference whose corrected p-value is below this is marked.
SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Comparison:
    """A figure of a system minus the baseline's.

    ``low`` and ``high`` bound the 95 % interval of the difference; ``p`` is two-sided; ``p_holm`` is ``p`` corrected for the
    number of systems that this figure was compared for; ``n`` counts the units that both have.
    """

    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    n: int


def is_significant(test: Comparison | None) -> TypeGuard[Comparison]:
    """Whether there is a difference, and chance alone hardly explains it."""
    return test is not None and test.p_holm < SIGNIFICANT


#: Comparisons by system, metric and figure.
Comparisons = dict[str, dict[str, dict[str, Comparison]]]


def compare(system: Estimate, baseline: Estimate, resamples: int) -> Comparison | None:
    """The difference of two estimates; None where they have fewer than 2 units in common."""
    if list(system.units) != list(baseline.units):
        known = set(baseline.units)
        common = [unit for unit in system.units if unit in known]
        if len(common) < 2:
            return None
        system, baseline = system.only(common), baseline.only(common)
    if len(system.units) < 2:
        return None
    differences = system.replicates(resamples) - baseline.replicates(resamples)
    units = len(system.units)
    low, high = interval(differences, units)
    p = two_sided(differences, units)
    return Comparison(system.value - baseline.value, low, high, p, p, units)


def compare_all(tasks: Sequence[Task], out: Path, baseline: str) -> Comparisons:
    """Every system against the one named ``baseline``, from the records that :func:`run_tasks` left in ``out``.

    Holm's correction is over the systems, for each figure by itself.
    """
    found: Comparisons = {}
    references: dict[str, Mapping[str, Estimate]] = {}
    for task in sorted(tasks, key=lambda task: task.system.name != baseline):  # the baseline's first
        records = json.loads(task.path(out / "records").read_text(encoding="utf-8"))["records"]
        estimates = task.metric.estimates(records)
        if task.system.name == baseline:
            references[task.metric.name] = estimates
            continue
        reference = references.get(task.metric.name, {})
        for name, estimate in estimates.items():
            if name in reference and (test := compare(estimate, reference[name], task.metric.resamples)) is not None:
                found.setdefault(task.system.name, {}).setdefault(task.metric.name, {})[name] = test
    return _corrected(found)


def _corrected(comparisons: Comparisons) -> Comparisons:
    families: dict[tuple[str, str], list[str]] = {}
    for system, metrics in comparisons.items():
        for metric, tests in metrics.items():
            for name in tests:
                families.setdefault((metric, name), []).append(system)
    for (metric, name), systems in families.items():
        p_values = holm(np.array([comparisons[system][metric][name].p for system in systems]))
        for system, p in zip(systems, p_values, strict=True):
            tests = comparisons[system][metric]
            tests[name] = replace(tests[name], p_holm=float(p))
    return comparisons
