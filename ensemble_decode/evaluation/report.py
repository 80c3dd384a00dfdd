"""Results as JSON, as Markdown and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ensemble_decode.diagnosis import Finding
from ensemble_decode.evaluation.comparison import SIGNIFICANT, Comparison, Comparisons, is_significant
from ensemble_decode.evaluation.findings import find
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.runner import Results, dump


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, and what is said of the run.

    Parameters
    ----------
    results : dict
        Figures by system, metric and name.
    about : dict
        Model, pairs, settings; JSON values. ``limit`` set marks a quick look.
    comparisons : dict
        Against the system named ``baseline``; empty where there is none.
    """

    results: Results
    about: Mapping[str, Any]
    comparisons: Comparisons = field(default_factory=dict)
    baseline: str = "target"

    def to_json(self) -> str:
        """``{"about": …, "results": {system: {metric: {figure: {"value": …, …}}}}, "comparisons": {"baseline": …, …}, "findings": …}``."""
        plain = {
            system: {m: {name: asdict(figure) for name, figure in figures.items()} for m, figures in metrics.items()}
            for system, metrics in self.results.items()
        }
        tests = {
            system: {m: {name: asdict(test) for name, test in found.items()} for m, found in metrics.items()}
            for system, metrics in self.comparisons.items()
        }
        return dump(
            {
                "about": dict(self.about),
                "systems": list(self.results),
                "results": plain,
                "comparisons": {"baseline": self.baseline, "systems": tests},
                "findings": {name: [asdict(one) for one in found] for name, found in self.findings().items()},
            }
        )

    def to_markdown(self) -> str:
        """What was found; one table a metric: a row a figure, a column a system; then the differences from the baseline."""
        lines = ["# Evaluation", "", *[f"* {key}: {value}" for key, value in self.about.items()], ""]
        if self.quick_look:
            lines += [f"**{self.quick_look}**", ""]
        if said := self._said():
            lines += ["## Findings", "", *[f"* {line}" for line in said], ""]
        for table in self.tables():
            lines += [f"## {table.metric}", "", *_markdown(table.header, table.rows), ""]
            if table.differences:
                lines += [f"Differences from {self.baseline}:", ""]
                lines += [*_markdown(table.header[:-2], table.differences), ""]
        return "\n".join([*lines, *self.legend()]) + "\n"

    def to_text(self) -> str:
        """The tables for a terminal, then what was found; * marks a difference from the baseline."""
        blocks = [self.quick_look] if self.quick_look else []
        for table in self.tables():
            rows = columns([table.header, *table.rows]).splitlines()
            blocks.append("\n".join([table.metric, *["  " + row for row in rows]]))
        if said := self._said():
            blocks.append("\n".join(["findings", *["  " + line for line in said]]))
        return "\n\n".join([*blocks, "\n".join(self.legend())])

    def findings(self) -> dict[str, list[Finding]]:
        """What was found of each system against the baseline, in words; a system of which nothing was found is left out."""
        return find(self.results, self.comparisons, self.baseline)

    def _said(self) -> list[str]:
        return [f"{name}: {finding.message}" for name, found in self.findings().items() for finding in found]

    @property
    def quick_look(self) -> str:
        """What is said of a run that was limited; empty for a whole one."""
        limit = self.about.get("limit")
        return "" if limit is None else f"A quick look: the first {limit} items of each metric, not the whole data."

    def legend(self) -> list[str]:
        """What brackets, chance and stars mean."""
        lines = ["Brackets: 95 % bootstrap interval. Chance: what a system without bias is expected to show."]
        if self.comparisons:
            lines.append(
                f"*: differs from {self.baseline} at p < {SIGNIFICANT} (paired bootstrap, corrected for the number of "
                "systems by Holm's method)."
            )
        return lines

    def tables(self) -> list[Table]:
        """A table for every metric, all systems side by side."""
        return [self._table(name) for name in dict.fromkeys(m for metrics in self.results.values() for m in metrics)]

    def _table(self, metric: str) -> Table:
        systems = {name: metrics[metric] for name, metrics in self.results.items() if metric in metrics}
        tests = {name: self.comparisons.get(name, {}).get(metric, {}) for name in systems}
        rows, differences = [], []
        for name in dict.fromkeys(name for figures in systems.values() for name in figures):
            known = [figures.get(name) for figures in systems.values()]
            notes, shared = beside(known)
            cells = [
                with_interval(figure) + "*" * is_significant(tests[system].get(name)) + (f" ({note})" if note else "")
                for system, figure, note in zip(systems, known, notes, strict=True)
            ]
            rows.append([name, *cells, *shared])
            if any(name in found for found in tests.values()):
                differences.append([name, *[_difference(found.get(name)) for found in tests.values()]])
        return Table(metric, ["figure", *systems, "chance", "n"], rows, differences)


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of a metric: ``rows`` under ``header``, and ``differences`` under all of it but its last two."""

    metric: str
    header: list[str]
    rows: list[list[str]]
    differences: list[list[str]]


def beside(figures: Sequence[Figure | None]) -> tuple[list[str], list[str]]:
    """What is said beside each figure of a row, and the row's chance and n: each of the two here or there.

    Where systems differ in one of them, a word for all would be wrong, and it stands beside each figure.
    """
    notes: list[list[str]] = [[] for _ in figures]
    shared = []
    chances = ["" if figure is None or figure.chance is None else number(figure.chance) for figure in figures]
    counts = ["" if figure is None or figure.n is None else str(figure.n) for figure in figures]
    for name, texts in (("chance", chances), ("n", counts)):
        different = list(dict.fromkeys(filter(None, texts)))
        shared.append(different[0] if len(different) == 1 else "")
        if len(different) > 1:
            for note, text in zip(notes, texts, strict=True):
                note += [f"{name} {text}"] if text else []
    return [", ".join(note) for note in notes], shared


def number(value: float) -> str:
    """Two decimals; three digits of what is below 1; none where hundreds are whole."""
    if abs(value) >= 100 and float(value).is_integer():
        text = f"{value:.0f}"
    else:
        text = f"{value:.2f}" if abs(value) >= 1 or value == 0 else f"{value:.3g}"
    return text.replace("-", "−")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns of equal widths."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def with_interval(figure: Figure | None) -> str:
    """A figure and its interval; nothing where there is none."""
    if figure is None:
        return ""
    if figure.low is None or figure.high is None:
        return number(figure.value)
    return f"{number(figure.value)} [{number(figure.low)}, {number(figure.high)}]"


def _difference(test: Comparison | None) -> str:
    if test is None:
        return ""
    p = f"{test.p_holm:.2g}" if test.p_holm < 1 else "1"
    return f"{number(test.difference)} [{number(test.low)}, {number(test.high)}], p {p}"


def _markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
