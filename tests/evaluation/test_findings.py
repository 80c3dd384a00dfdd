"""A report's words: each failure is found where it is planted, and not where chance explains the figures."""

from __future__ import annotations

import json

import pytest

from ensemble_decode.evaluation.comparison import Comparison
from ensemble_decode.evaluation.findings import find
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.page import render
from ensemble_decode.evaluation.report import Report


def difference(low: float, high: float, p: float = 0.001) -> Comparison:
    return Comparison((low + high) / 2, low, high, p, p, 100)


TARGET = {
    "stereoset": {"SS": Figure(62.0, 58.0, 66.0, 50.0, 100), "ICAT": Figure(69.0, 60.0, 75.0)},
    "regard": {"gap/gender": Figure(0.02, 0.01, 0.03, 0.01, 100)},
    "perplexity-paper": {"PPL": Figure(20.0)},
}


def found(perplexity: float = 20.0, baseline: str = "target", **tests: Comparison) -> list[str]:
    """What is said of a system "α 1" with these differences."""
    names = {"SS": ("stereoset", "SS"), "ICAT": ("stereoset", "ICAT"), "gap": ("regard", "gap/gender")}
    compared: dict[str, dict[str, Comparison]] = {}
    for key, test in tests.items():
        metric, name = names[key]
        compared.setdefault(metric, {})[name] = test
    results = {"target": TARGET, "α 1": TARGET | {"perplexity-paper": {"PPL": Figure(perplexity)}}}
    return [finding.message for finding in find(results, {"α 1": compared}, baseline).get("α 1", [])]


def test_perplexity_beyond_the_budget() -> None:
    (said,) = found(perplexity=25.0)
    assert said.startswith("Perplexity rises from 20.00 to 25.00, by 25.0%")
    assert found(perplexity=21.9) == found(perplexity=25.0, baseline="not measured") == []


def test_metrics_that_disagree() -> None:
    (said,) = found(SS=difference(-14, -6), gap=difference(0.01, 0.03))
    assert said.startswith("stereoset SS improved while regard gap/gender got worse.")
    (said,) = found(ICAT=difference(2, 6), gap=difference(0.01, 0.03))
    assert said.startswith("stereoset ICAT improved while regard gap/gender got worse.")
    (said,) = found(SS=difference(2, 6), gap=difference(-0.03, -0.01))
    assert said.startswith("regard gap/gender improved while stereoset SS got worse.")


def test_metrics_that_agree_or_do_not_differ() -> None:
    assert found(SS=difference(-14, -6), ICAT=difference(2, 6), gap=difference(-0.03, -0.01)) == []
    assert found(SS=difference(-14, -6), gap=difference(0.01, 0.03, p=0.06)) == []


@pytest.mark.parametrize(("low", "high", "words"), [(-15, -2, "improved"), (-40, -34, "got worse"), (-20, -14, "")])
def test_nearer_to_50_may_overshoot(low: float, high: float, words: str) -> None:
    """From 58 … 66, 15 less is nearer to 50 for certain, 34 less is farther, and 20 less may be either."""
    said = found(SS=difference(low, high), gap=difference(0.01, 0.03)) + found(
        SS=difference(low, high), gap=difference(-0.03, -0.01)
    )
    assert [f"stereoset SS {words}" in message for message in said] == [True] * bool(words)


def test_every_form_of_the_report_says_what_was_found() -> None:
    results = {"target": TARGET, "<α 1>": TARGET | {"perplexity-paper": {"PPL": Figure(25.0)}}}
    report = Report(results, {})
    said = "Perplexity rises from 20.00 to 25.00, by 25.0%"
    assert f"findings\n  <α 1>: {said}" in report.to_text()
    assert f"## Findings\n\n* <α 1>: {said}" in report.to_markdown()
    assert f"<strong>&lt;α 1&gt;: perplexity.</strong> {said}" in render(report, {})
    (kept,) = json.loads(report.to_json())["findings"]["<α 1>"]
    assert kept["signature"] == "perplexity"
    assert kept["message"].startswith(said)
    alone = Report({"target": TARGET}, {})
    assert json.loads(alone.to_json())["findings"] == {}
    assert "indings" not in alone.to_text() + alone.to_markdown()
