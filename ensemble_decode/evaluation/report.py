"""Results as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.runner import Results, dump


def to_json(results: Results, about: Mapping[str, Any]) -> str:
    """``{"about": …, "results": {system: {metric: {figure: {"value": …, "low": …, …}}}}}``."""
    plain = {
        system: {m: {name: asdict(figure) for name, figure in figures.items()} for m, figures in metrics.items()}
        for system, metrics in results.items()
    }
    return dump({"about": dict(about), "results": plain})


def to_markdown(results: Results, about: Mapping[str, Any]) -> str:
    """One table a metric: a row a figure, a column a system; 95 % bootstrap intervals in brackets."""
    lines = ["# Evaluation", "", *[f"* {key}: {value}" for key, value in about.items()], ""]
    if about.get("limit") is not None:
        lines += [f"**A quick look: the first {about['limit']} items of each metric, not the whole data.**", ""]
    for metric, header, rows in tables(results):
        lines += [f"## {metric}", "", "| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
        lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    lines += ["Brackets: 95 % bootstrap interval. Chance: what a system without bias is expected to show."]
    return "\n".join(lines) + "\n"


def to_text(results: Results) -> str:
    """The same tables for a terminal."""
    blocks = []
    for metric, header, rows in tables(results):
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
        ]
        blocks.append("\n".join([metric, *["  " + line for line in lines]]))
    return "\n\n".join(blocks)


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """(metric, header, rows) of every metric, all systems side by side."""
    found = []
    for metric in dict.fromkeys(name for metrics in results.values() for name in metrics):
        systems = {name: metrics[metric] for name, metrics in results.items() if metric in metrics}
        names = dict.fromkeys(name for figures in systems.values() for name in figures)
        rows = []
        for name in names:
            figures = [by_name.get(name) for by_name in systems.values()]
            first = next(figure for figure in figures if figure is not None)
            chance = "" if first.chance is None else _number(first.chance)
            rows.append([name, *[_cell(figure) for figure in figures], chance, "" if first.n is None else str(first.n)])
        found.append((metric, ["figure", *systems, "chance", "n"], rows))
    return found


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return _number(figure.value)
    return f"{_number(figure.value)} [{_number(figure.low)}, {_number(figure.high)}]"


def _number(value: float) -> str:
    return f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
