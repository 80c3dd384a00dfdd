"""The pictures of docs/results.md, from the stages' figures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Json = Mapping[str, Any]


def draw_calibration(calibration: Json, path: Path) -> None:
    """SS of every axis against α, its pair alone: points as measured, lines the fit, a ring at the α that was chosen."""
    figure, axes = _new("α of the pair, alone", "SS on the calibrating half of its axis")
    for number, (name, axis) in enumerate(calibration["axes"].items()):
        axes.plot(axis["alphas"], axis["ss"], ".", color=f"C{number}", alpha=0.45)
        axes.plot(axis["alphas"], axis["fit"], color=f"C{number}", label=name)
        chosen = calibration["alpha"][name]
        height = _between(chosen, axis["alphas"], axis["fit"])
        axes.plot(chosen, height, "o", color=f"C{number}", markersize=10, fillstyle="none", markeredgewidth=2)
    axes.axhline(50, color="0.4", linestyle="--", linewidth=1)
    axes.legend()
    _save(figure, path)


def draw_frontier(stage: Json, path: Path) -> None:
    """ICAT against perplexity of every system, with 95 % intervals."""
    figure, axes = _new("perplexity", "ICAT")
    for number, name in enumerate(stage["systems"]):
        found = stage["results"][name]
        x, y = found["perplexity-paper"]["PPL"], found["stereoset"]["ICAT"]
        axes.errorbar(
            x["value"],
            y["value"],
            xerr=_reach(x),
            yerr=_reach(y),
            fmt="o",
            color=f"C{number % 10}",
            elinewidth=0.8,
            label=name,
        )
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    _save(figure, path)


def draw_drift(stage: Json, measures: Mapping[str, str], path: Path) -> None:
    """Measures by segment of the text, a panel each, with 95 % intervals."""
    figure = Figure(figsize=(3.6 * len(measures), 3.4), layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        axes.set(xlabel="from token", ylabel=label)
        for number, name in enumerate(stage["systems"]):
            found = stage["results"][name]["drift"]
            points = [(int(key.split("/")[1]), f) for key, f in found.items() if key.startswith(f"{measure}/")]
            points.sort(key=lambda point: point[0])
            x = [place for place, _ in points]
            axes.plot(x, [f["value"] for _, f in points], "o-", color=f"C{number}", label=name, markersize=4)
            low, high = zip(*(_bounds(f) for _, f in points), strict=True)
            axes.fill_between(x, low, high, color=f"C{number}", alpha=0.12)
    panels[0].legend(fontsize="small")
    _save(figure, path)


def _bounds(figure: Json) -> tuple[float, float]:
    """The interval; NaN, which is not drawn, where one unit has none."""
    return (math.nan, math.nan) if figure["low"] is None else (figure["low"], figure["high"])


def _reach(figure: Json) -> list[list[float]]:
    """How far the interval reaches below and above the value."""
    low, high = _bounds(figure)
    return [[figure["value"] - low], [high - figure["value"]]]


def _new(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.25)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    """The same figures give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "experiment", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")


def _between(x: float, xs: list[float], ys: list[float]) -> float:
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), zip(xs[1:], ys[1:], strict=True), strict=False):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]
