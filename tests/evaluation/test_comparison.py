"""Paired tests: the same units drawn alike, only common units, Holm's correction."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ensemble_decode import SamplingParams
from ensemble_decode.evaluation.comparison import compare, compare_all
from ensemble_decode.evaluation.crows_pairs import CrowsPairs
from ensemble_decode.evaluation.estimate import Estimate
from ensemble_decode.evaluation.metric import Figure, Record, System
from ensemble_decode.evaluation.report import Report
from ensemble_decode.evaluation.runner import make_tasks, run_tasks
from ensemble_decode.evaluation.statistics import holm, interval, resample, two_sided


def estimate(values: np.ndarray) -> Estimate:
    return Estimate(range(len(values)), np.asarray(values, np.float64).reshape(-1, 1))


def test_a_constant_shift_is_certain_whatever_the_spread() -> None:
    """Unpaired, a shift of 0.1 would drown in a spread of 10; paired, its interval has no width."""
    values = np.random.default_rng(1).normal(0, 10, 50)
    found = compare(estimate(values + 0.1), estimate(values), 500)
    assert found is not None
    assert (found.difference, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.p == pytest.approx(0.00638, abs=1e-5)  # 2 / 501, of 50 units


def test_no_difference_is_p_1() -> None:
    values = np.random.default_rng(2).normal(size=30)
    found = compare(estimate(values), estimate(values), 200)
    assert found is not None
    assert (found.difference, found.p) == (0, 1)


def test_p_values_are_even_where_nothing_differs() -> None:
    rng = np.random.default_rng(3)
    p_values = []
    for _ in range(300):
        found = compare(estimate(rng.normal(size=80)), estimate(rng.normal(size=80)), 400)
        assert found is not None
        p_values.append(found.p)
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.035)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.05)


def test_systems_are_compared_on_the_units_that_both_have() -> None:
    one = Estimate(["a", "b", "c"], np.array([[1.0], [2.0], [30.0]]))
    other = Estimate(["b", "d", "a"], np.array([[1.0], [50.0], [0.0]]))
    found = compare(one, other, 100)
    assert found is not None
    assert (found.difference, found.low, found.high, found.n) == (1, 1, 1, 2)
    assert compare(one, Estimate(["c", "x"], np.ones((2, 1))), 100) is None


@pytest.mark.parametrize("units", [6, 12, 30])
def test_few_units_don_t_seem_different_more_often_than_they_should(units: int) -> None:
    """Of a normal quantity around 0; plain percentiles say p < 0.05 in 14 % of cases with 6 units, in 9 % with 12."""
    samples = np.random.default_rng(4).normal(size=(units, 1000))
    replicates = resample(samples).T
    p_values = np.array([two_sided(row, units) for row in replicates])
    assert 0.035 < np.mean(p_values < 0.05) < 0.075
    missed = [low > 0 or high < 0 for low, high in (interval(row, units) for row in replicates)]
    assert 0.035 < np.mean(missed) < 0.075


def test_one_unit_has_no_interval() -> None:
    """Its resamples are all alike: bounds without width would look like certainty."""
    assert estimate(np.array([3.0])).figure(50) == Figure(3.0, n=1)
    two = estimate(np.array([3.0, 4.0])).figure(50)
    assert (two.low, two.high) == (3, 4)


def test_p_by_hand() -> None:
    """Plain percentiles say 0.4: t = 0.8416 √½, and of 2 units p = 1 − 2 arctan(t) / π. Of many it is the plain p."""
    assert two_sided(np.ones(4), 2) == pytest.approx(0.6582, abs=1e-4)
    assert two_sided(np.ones(4), 10**6) == pytest.approx(2 / 5, abs=1e-5)
    assert two_sided(np.array([1.0, 2.0, 3.0, -1.0]), 10**6) == pytest.approx(2 * 2 / 5, abs=1e-5)
    assert two_sided(np.zeros(4), 3) == 1


def test_an_interval_by_hand() -> None:
    """The quartiles of 2 units are at t = ∓1, so at Φ(∓√2) = 0.0786 and 0.9214 of the replicates; of many at a quarter."""
    replicates = np.linspace(0, 1, 10_001)
    assert interval(replicates, 2, 0.5) == pytest.approx((0.0786, 0.9214), abs=1e-4)
    assert interval(replicates, 10**6, 0.5) == pytest.approx((0.25, 0.75), abs=1e-4)
    assert interval(np.full(9, 3.0), 1) == (3, 3)


def test_holm_by_hand() -> None:
    # sorted .01, .02, .03: times 3, 2, 1, and never below the one before
    assert holm(np.array([0.03, 0.01, 0.02])) == pytest.approx([0.04, 0.03, 0.04])
    assert holm(np.array([0.6, 0.9])) == pytest.approx([1.0, 1.0])


@dataclass(frozen=True)
class Crows(CrowsPairs):
    """Prefers the stereotype in ``30 − 10·α`` of 40 pairs."""

    def run(self, system: System, data: Path, limit: int | None = None) -> list[Record]:
        preferred = 30 - 10 * float(system.params.alpha)  # type: ignore[arg-type]
        return [{"row": i, "bias": "age", "more": float(i < preferred), "less": 0.5} for i in range(40)]


def test_every_system_against_the_target(tmp_path: Path) -> None:
    systems = [System(f"α {a:g}", None, SamplingParams(alpha=a)) for a in (2.0, 0.1)]  # type: ignore[arg-type]
    systems.append(replace(systems[0], name="target", params=SamplingParams(alpha=0.0)))
    tasks = make_tasks(systems, [Crows(resamples=500)], {}, tmp_path, None)
    results = run_tasks(tasks, tmp_path, tmp_path, say=lambda line: None)
    found = compare_all(tasks, tmp_path, "target")
    strong, weak = (found[f"α {a}"]["crows_pairs"]["CrowS"] for a in ("2", "0.1"))
    assert (strong.difference, weak.difference) == (-50, -2.5)
    assert strong.p_holm == pytest.approx(2 * strong.p)
    assert strong.p_holm < 0.05 < weak.p_holm
    report = Report(results, {}, found)
    assert json.loads(report.to_json())["comparisons"]["systems"]["α 2"]["crows_pairs"]["CrowS"]["difference"] == -50
    assert "−50.00 [−65.00, −35.00], p 0.014" in report.to_markdown()
    row = next(line for line in report.to_text().splitlines() if "CrowS " in line)
    assert row.count("*") == 1
