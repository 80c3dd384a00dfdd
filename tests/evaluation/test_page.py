"""The report as a page: its plots, opened and photographed in a real browser."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from playwright.sync_api import sync_playwright

from ensemble_decode.evaluation.comparison import Comparison
from ensemble_decode.evaluation.metric import Figure
from ensemble_decode.evaluation.page import render
from ensemble_decode.evaluation.plots import Point, Series, line_plot, scatter_plot, ticks
from ensemble_decode.evaluation.report import Report
from tests.explain.test_page import BROWSER, FLAGS

ALPHAS = {"target": 0.0, "α 1": 1.0, "α 2": 2.0}


def figure(value: float, chance: float | None = None) -> Figure:
    return Figure(value, value - 2, value + 2, chance, 100)


@pytest.fixture
def report() -> Report:
    results = {
        name: {
            "stereoset": {
                "SS": figure(62 - 5 * a, 50.0),
                "SS/gender": figure(63 - 4 * a, 50.0),
                "ICAT": figure(69 + 6 * a),
            },
            "perplexity-paper": {"PPL": figure(25 + a * a), "PPL/window": Figure(992)},
            "regard": {"gap/gender": figure(0.02 - 0.005 * a, 0.01), "stand-in accuracy": Figure(0.754)},
        }
        for name, a in ({**ALPHAS, "<b>trigger</b>": 0.5}).items()
    }
    tests = {"α 2": {"stereoset": {"SS": Comparison(-10, -13, -7, 0.001, 0.003, 100)}}}
    return Report(results, {"model": "m", "limit": 20}, tests)


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0, 2) == [0, 0.5, 1, 1.5, 2]
    assert ticks(48.2, 63.9) == [45, 50, 55, 60, 65]
    assert ticks(5, 5)[0] < 5 < ticks(5, 5)[-1]


def test_points_stand_where_the_axes_say() -> None:
    """Read back through the ticks: the place of a point, its bars and the dashed level."""
    series = [Series("s", [Point(1.0, 55.0, "one", 50.0, 60.0, 0.5, 1.5)], joined=False)]
    root = ElementTree.fromstring(line_plot(series, "α", "SS", rule=50.0, note="unbiased"))
    marks = [(float(t.attrib["x"]), float(t.attrib["y"]), t.text) for t in root if t.attrib.get("class") == "tick"]
    x = {text: at for at, _, text in marks}
    y = {text: at - 4 for _, at, text in marks}
    circle = next(root.iter("circle"))
    assert float(circle.attrib["cx"]) == pytest.approx(x["1"], abs=0.1)
    assert float(circle.attrib["cy"]) == pytest.approx((y["54"] + y["56"]) / 2, abs=0.1)
    upright = next(e for e in root.iter("line") if e.attrib["class"] == "bar")
    assert float(upright.attrib["y1"]) == pytest.approx(y["50"], abs=0.1)
    rule = next(e for e in root.iter("line") if e.attrib["class"] == "rule")
    assert float(rule.attrib["y1"]) == pytest.approx(y["50"], abs=0.1)


def test_names_are_never_markup(report: Report) -> None:
    text = scatter_plot([Series("<b>", [Point(1, 2, "<b>", label="<b>")], joined=False)], "<b>", "<b>")
    assert "<b>" not in text
    assert "<b>" not in render(report, ALPHAS)


def test_the_page_says_what_a_reader_must_know(report: Report) -> None:
    text = render(report, ALPHAS)
    assert "first 20 items" in text
    assert "regard is measured by a stand-in" in text
    assert "accuracy 0.754" in text
    assert "52.00*" in text
    assert "p 0.003" in text
    assert "Dotted: chance" in text
    assert text.count('class="level"') == 1
    assert '<tr class="part"><th scope="row">SS/gender</th>' in text
    assert "http" not in text
    assert render(report, ALPHAS) == text
    assert "<svg" not in render(Report({"target": {"m": {"x": Figure(1.0)}}}, {}), {"target": 0.0})


def test_what_one_unit_shows_is_plotted_without_an_interval(report: Report) -> None:
    results = {
        name: {"perplexity-paper": {"PPL": Figure(25.0, n=1), "PPL/window": Figure(992)}} for name in report.results
    }
    text = render(Report(results, {}), ALPHAS)
    assert text.count("<circle") == 3
    assert 'class="band"' not in text
    assert 'class="bar"' not in text


def test_chance_and_n_stand_in_the_cells_where_systems_differ_in_them() -> None:
    """A gap's chance is its system's own: one number for all made a system seem biased, or not."""
    figures = {"target": Figure(0.02, 0.01, 0.03, 0.0125, 40), "α 1": Figure(0.03, 0.02, 0.04, 0.0225, 40)}
    results = {
        name: {"regard": {"gap": gap, "SS": figure(50.0, 50.0), "n": Figure(1.0, n=a)}}
        for a, (name, gap) in enumerate(figures.items(), 1)
    }
    report = Report(results, {})
    (table,) = report.tables()
    assert table.rows[0] == ["gap", "0.02 [0.01, 0.03] (chance 0.0125)", "0.03 [0.02, 0.04] (chance 0.0225)", "", "40"]
    assert table.rows[1][1:] == ["50.00 [48.00, 52.00]"] * 2 + ["50.00", "100"]
    assert table.rows[2][1:] == ["1.00 (n 1)", "1.00 (n 2)", "", ""]
    text = render(report, {"target": 0.0, "α 1": 1.0})
    assert text.count("<small>chance 0.0125</small>") == text.count("<small>chance 0.0225</small>") == 1
    assert "<td></td><td>40</td>" in text
    assert "<td>50.00</td><td>100</td>" in text
    level = text.partition('class="level" points="')[2].partition('"')[0].split()
    assert len({point.partition(",")[2] for point in level}) == 2


def test_page_in_a_browser(report: Report, tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no browser: install chromium or set ENSEMBLE_DECODE_BROWSER")
    (tmp_path / "report.html").write_text(render(report, ALPHAS), encoding="utf-8")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(10_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        assert page.locator("svg").count() == 4  # SS, perplexity and regard against α, and the frontier
        assert page.locator("svg circle").count() == 3 * 2 + 3 + 3 + 4
        box = page.locator("svg").first.bounding_box()
        assert box is not None
        assert box["width"] > 400
        wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        pictures = []
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            pictures.append(page.screenshot(path=tmp_path / f"{scheme}.png", full_page=True))
        page.set_viewport_size({"width": 400, "height": 800})
        narrow = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        browser.close()
    assert wide
    assert narrow
    assert pictures[0] != pictures[1]
    assert min(map(len, pictures)) > 20_000
    assert [url for url in asked if not url.startswith("file:")] == []
