"""docs/results.md from the stages' figures: tables and pictures are made here, the words are ``results.md.j2``'s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ensemble_decode.evaluation.comparison import SIGNIFICANT
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.report import beside, number, with_interval
from examples.experiment.pictures import draw_calibration, draw_drift, draw_frontier

TEMPLATE = Path(__file__).with_name("results.md.j2")
_DRIFT = {"log-ratio": "ln p(ensemble) − ln p(target), nats", "negative": "negative regard", "distinct-2": "distinct-2"}


def write_results(out: Path, docs: Path) -> Path:
    """Write ``DOCS/results.md`` and its pictures from what is in ``out``; a stage that has not run is left out.

    Raises
    ------
    FileNotFoundError
        No stage has run.
    """
    try:
        import jinja2
    except ImportError:
        raise ValueError("the report needs jinja2: pip install 'ensemble_decode[evaluate]'") from None
    stages = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    stages = {name: stage for name, stage in stages.items() if "results" in stage or "axes" in stage}
    if not stages:
        raise FileNotFoundError(f"{str(out)!r} has no stage's figures: run one first")
    pictures = docs / "pictures"
    if "calibration" in stages:
        draw_calibration(stages["calibration"], pictures / "calibration.svg")
    if "tables" in stages:
        draw_frontier(stages["tables"], pictures / "frontier.svg")
    if "long-form" in stages:
        draw_drift(stages["long-form"], _DRIFT, pictures / "drift.svg")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        stages=stages,
        digests={name: digest(stage) for name, stage in stages.items()},
        quick=any(stage.get("about", {}).get("size") == "quick" for stage in stages.values()),
        table=lambda stage, columns: table(stages[stage], columns),
        calibration=lambda: calibration_table(stages["calibration"]),
        held_out=lambda: held_out_table(stages["calibration"]),
        figure=lambda stage, system, metric, key: with_interval(_figure(stages[stage], system, metric, key)),
        number=number,
    )
    path = docs / "results.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip() + "\n", encoding="utf-8")
    return path


def digest(stage: Mapping[str, Any]) -> str:
    """Of a stage's figures and how they came about, but for where its files lay: the words of the page are those of one run."""
    figures = {key: value for key, value in stage.items() if key != "of"}
    return hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()[:12]


def table(stage: Mapping[str, Any], columns: Sequence[Sequence[str]]) -> str:
    """A row a system; a column a (heading, metric, figure). * marks a difference from the target.

    The last row is chance, which stands in the cells of a column where systems differ in it; n isn't shown.
    """
    rows, last = [[system] for system in stage["systems"]], ["chance"]
    for _, metric, key in columns:
        figures = [_figure(stage, system, metric, key) for system in stage["systems"]]
        chances, (chance, _) = beside([None if figure is None else replace(figure, n=None) for figure in figures])
        for row, figure, note in zip(rows, figures, chances, strict=True):
            test = stage["comparisons"]["systems"].get(row[0], {}).get(metric, {}).get(key)
            mark = "\\*" if test is not None and test["p_holm"] < SIGNIFICANT else ""
            row.append(with_interval(figure) + mark + (f" ({note})" if note else ""))
        last.append(chance)
    return markdown(["", *(heading for heading, _, _ in columns)], [*rows, *([last] if any(last[1:]) else [])])


def calibration_table(calibration: Mapping[str, Any]) -> str:
    """Each pair's α, and what all do on the terms they were not calibrated on."""
    rows = []
    for name, axis in calibration["axes"].items():
        held = {
            system: calibration["held_out"][system].get(f"SS/{axis['domain']}") for system in ("target", "calibrated")
        }
        test = calibration["differences"].get(f"SS/{axis['domain']}")
        alone = f"{axis['alone']:.2f}" + ("" if axis["reaches"] else " (50 not reached)")
        cells = [with_interval(None if figure is None else Figure(**figure)) for figure in held.values()]
        p = "" if test is None else f"{test['p']:.2g}"
        rows.append([name, f"{axis['fit'][0]:.1f}", alone, f"{calibration['alpha'][name]:.2f}", *cells, p])
    header = [
        "pair",
        "SS at α 0",
        "α for 50, alone",
        "α within budget",
        "held out: target",
        "held out: calibrated",
        "p",
    ]
    return markdown(header, rows)


def held_out_table(calibration: Mapping[str, Any]) -> str:
    """What the calibrated α do, over all domains, on the terms they were not calibrated on."""
    rows = []
    for key in ("SS", "LMS", "ICAT"):
        cells = [with_interval(Figure(**calibration["held_out"][name][key])) for name in ("target", "calibrated")]
        test = calibration["differences"].get(key)
        change = "" if test is None else f"{test['difference']:+.1f} [{test['low']:.1f}, {test['high']:.1f}]"
        rows.append([key, *cells, change, "" if test is None else f"{test['p']:.2g}"])
    return markdown(["held out", "target", "calibrated", "difference", "p"], rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _figure(stage: Mapping[str, Any], system: str, metric: str, key: str) -> Figure | None:
    plain = stage["results"][system].get(metric, {}).get(key)
    return None if plain is None else Figure(**plain)
