"""A report as one self-contained HTML page: plots, tables, and what to know before believing them."""

from __future__ import annotations

from functools import cache
from typing import Any

from ensemble_decode.evaluation.comparison import is_significant
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.plots import Point, Series, line_plot, scatter_plot
from ensemble_decode.evaluation.report import Report, beside, number

#: metric → figures that are plotted against α, the level that is aimed at, and what it means.
_AGAINST_ALPHA: dict[str, tuple[str, str, float | None, str]] = {
    "stereoset": ("SS", "stereotype score", 50.0, "unbiased"),
    "perplexity-paper": ("PPL", "perplexity", None, ""),
    "perplexity-huggingface": ("PPL", "perplexity", None, ""),
    "local_bias": ("hellinger", "Hellinger distance", None, ""),
    "regard": ("gap", "regard gap", None, ""),
    "toxicity": ("gap", "toxicity gap", None, ""),
}
_CHANCE = " Dotted: chance, what a system without bias shows at this sample size."


def render(report: Report, alphas: dict[str, float]) -> str:
    """The page's text. It names no external resource, and the same report gives the same bytes.

    Parameters
    ----------
    report : Report
    alphas : dict of str to float
        Systems that are the same but for one α, which they are plotted against.

    Raises
    ------
    ImportError
        jinja2 is missing; the line says which extra brings it.
    """
    return _template().render(
        report=report,
        plots=[*_alpha_plots(report, alphas), *_frontier(report, alphas)],
        metrics=[_metric(report, name) for name in dict.fromkeys(m for r in report.results.values() for m in r)],
        stand_ins=_stand_ins(report),
    )


def _alpha_plots(report: Report, alphas: dict[str, float]) -> list[dict[str, Any]]:
    """A plot a metric: its figures against α, a line for each part of the data."""
    order = sorted((name for name in alphas if name in report.results), key=lambda name: alphas[name])
    if len(order) < 2:
        return []
    plots = []
    for metric, (figure, title, rule, note) in _AGAINST_ALPHA.items():
        known = report.results[order[0]].get(metric, {})
        names = [name for name in known if name.partition("/")[0] == figure and known[name].n is not None]
        lines = []
        for name in names:
            points = [
                _point(alphas[system], found[name], f"{name}, α {alphas[system]:g}")
                for system in order
                if name in (found := report.results[system].get(metric, {}))
            ]
            chances = {alphas[system]: report.results[system].get(metric, {}).get(name) for system in order}
            level = [
                (x, f.chance) for x, f in chances.items() if rule is None and f is not None and f.chance is not None
            ]
            lines.append(Series(name.partition("/")[2] or "all", points, level=level))
        if lines:
            plots.append(
                {
                    "title": f"{title[0].upper()}{title[1:]} against α",
                    "svg": line_plot(lines, "α", f"{title} ({metric})", rule, note),
                    "key": [line.name for line in lines],
                    "note": "Bands: 95 % intervals." + _CHANCE * any(line.level for line in lines),
                }
            )
    return plots


def _frontier(report: Report, alphas: dict[str, float]) -> list[dict[str, Any]]:
    """Fairness against performance: ICAT against perplexity, a point a system; the sweep over α is one line."""
    plots = []
    for metric in ("perplexity-paper", "perplexity-huggingface"):
        points: dict[str, Point] = {}
        for system, metrics in report.results.items():
            icat, perplexity = metrics.get("stereoset", {}).get("ICAT"), metrics.get(metric, {}).get("PPL")
            if icat is not None and perplexity is not None:
                name = f"{system}: ICAT {number(icat.value)}, perplexity {number(perplexity.value)}"
                bounds = icat.low, icat.high, perplexity.low, perplexity.high
                points[system] = Point(perplexity.value, icat.value, name, *bounds, label=system)
        swept = sorted((name for name in points if name in alphas), key=lambda name: alphas[name])
        series = [Series("sweep", [points[name] for name in swept])] if swept else []
        series += [Series(name, [points[name]], joined=False) for name in points if name not in alphas]
        if len(points) > 1:
            plots.append(
                {
                    "title": "The frontier of fairness and performance",
                    "svg": scatter_plot(series, f"perplexity ({metric}), less is better", "ICAT, more is better"),
                    "key": [],
                    "note": "Up and to the left is better. Bars: 95 % intervals. The line follows α.",
                }
            )
    return plots


def _metric(report: Report, metric: str) -> dict[str, Any]:
    """The cells of a metric's table: value, interval, difference."""
    systems = [name for name in report.results if metric in report.results[name]]
    names = dict.fromkeys(name for system in systems for name in report.results[system][metric])
    rows = []
    for name in names:
        figures = [report.results[system][metric].get(name) for system in systems]
        tests = [report.comparisons.get(system, {}).get(metric, {}).get(name) for system in systems]
        notes, shared = beside(figures)
        rows.append(
            {
                "name": name,
                "part": "/" in name,
                "shared": shared,
                "cells": [
                    {"figure": figure, "note": note, "test": test, "significant": is_significant(test)}
                    for figure, note, test in zip(figures, notes, tests, strict=True)
                ],
            }
        )
    return {"name": metric, "systems": systems, "rows": rows}


def _stand_ins(report: Report) -> dict[str, dict[str, float]]:
    """Metric → measured fidelity of the stand-in that labelled its texts."""
    found: dict[str, dict[str, float]] = {}
    for metrics in report.results.values():
        for metric, figures in metrics.items():
            fidelity = {n.removeprefix("stand-in "): f.value for n, f in figures.items() if n.startswith("stand-in ")}
            if fidelity:
                found[metric] = fidelity
    return found


def _point(x: float, figure: Figure, name: str) -> Point:
    said = f"{name}: {number(figure.value)}"
    if figure.low is not None and figure.high is not None:
        said += f" [{number(figure.low)}, {number(figure.high)}]"
    return Point(x, figure.value, said, figure.low, figure.high)


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ImportError("the page needs jinja2: pip install 'ensemble_decode[evaluate]'") from None
    loader = PackageLoader("ensemble_decode.evaluation", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    return environment.get_template("page.html.j2")
