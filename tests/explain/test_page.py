"""The page, opened, used with mouse and keyboard, and photographed in a real browser."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, sync_playwright

from ensemble_decode.explain.explanation import Explanation, Step, TokenEffect

BROWSER = os.environ.get("ENSEMBLE_DECODE_BROWSER") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]


def effect(text: str, log_odds: float, **changes: Any) -> TokenEffect:
    given = {"token_id": 1, "target_prob": 0.1, "prob": 0.6, "target_rank": 4, "rank": 1, "kept": True}
    given |= {"target_kept": True, "contributions": {"gender": log_odds}, **changes}
    return TokenEffect(text=text, log_odds=log_odds, **given)


@pytest.fixture
def explanation() -> Explanation:
    other = effect(" he", -3.0, target_prob=0.4, prob=0.01)
    steps = [
        Step(effect(" she", 4.1, target_kept=False), [effect(" she", 4.1)], [other], 0.7, 1.2, 5, 9),
        Step(effect("</script><b>", -1.2), [], [other], 0.1, 0.1, 5, 9),
        Step(effect(" waved", 0.0), [], [], 0.0, 0.0, 5, 9),
    ]
    return Explanation("The driver smiled and", " she waved", "length", 3, 1.0, {"gender": 2.0}, steps)


@pytest.fixture
def page(explanation: Explanation, tmp_path: Path) -> Iterator[Page]:
    if BROWSER is None:
        pytest.skip("no browser: install chromium or set ENSEMBLE_DECODE_BROWSER")
    explanation.save_html(tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.set_default_timeout(10_000)
        page.errors = []  # type: ignore[attr-defined]
        page.on("pageerror", lambda error: page.errors.append(str(error)))  # type: ignore[attr-defined]
        page.requests = []  # type: ignore[attr-defined]
        page.on("request", lambda request: page.requests.append(request.url))  # type: ignore[attr-defined]
        page.goto((tmp_path / "page.html").as_uri())
        yield page
        browser.close()


def test_findings_stand_on_the_page_and_in_the_terminal(explanation: Explanation) -> None:
    """Planted: distributions that hardly move at α 2, and two pairs that undo each other."""
    assert explanation.findings() == []
    assert 'class="card finding"' not in explanation.to_html()
    steps = [replace(step, hellinger=0.001) for step in explanation.steps]
    failing = replace(explanation, steps=steps, moved={"gender": [2.0, -1.0], "race": [-2.0, 1.0]})
    assert [finding.signature for finding in failing.findings()] == ["no shift", "experts disagree"]
    for text in (failing.to_html(), failing.to_terminal()):
        assert "α is up to 2" in text
        assert "(cosine -1.00)" in text


def test_page_in_a_browser(page: Page, tmp_path: Path) -> None:
    words, why = page.locator("[data-step]"), page.locator("#why")
    assert words.count() == 3
    assert "outside the target's own nucleus" in why.inner_text()  # opens at the word that moved most
    words.nth(2).hover()
    assert "“waved”" in why.inner_text()
    words.nth(0).focus()
    page.keyboard.press("ArrowRight")
    assert "</script><b>" in why.inner_text()  # text is never markup
    assert page.locator("main b").count() == 0
    page.keyboard.press("Home")
    assert "“she”" in why.inner_text()
    colors = [words.nth(i).evaluate("e => getComputedStyle(e).backgroundColor") for i in range(3)]
    assert len(set(colors)) == 3
    pictures = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        pictures.append(page.screenshot(path=tmp_path / f"{scheme}.png"))
    assert pictures[0] != pictures[1]
    assert min(map(len, pictures)) > 10_000  # not an empty page
    assert page.errors == []  # type: ignore[attr-defined]
    assert [url for url in page.requests if not url.startswith("file:")] == []  # type: ignore[attr-defined]


def test_what_can_t_be_seen_has_a_sign_of_its_own(explanation: Explanation) -> None:
    """A line break, white space, and a token that is the first part of a character; the breaks are in the text too."""
    explanation.steps.extend(Step(effect(text, 0.0), [], [], 0.0, 0.0, 5, 9) for text in ("\n\n", "  ", "", " &\n"))
    text = explanation.to_html()
    shown = re.findall(r"([\s]*)<button[^>]*data-step[^>]*>([^<]*)</button>", text)
    assert shown[3:] == [("", "⏎"), ("\n\n  ", "␣"), ("", "·"), (" ", "&amp;\n")]
    assert all(f"<td>{sign}</td>" in text for sign in ("⏎", "␣", "·"))


def test_the_panel_shows_the_same_signs(explanation: Explanation, page: Page, tmp_path: Path) -> None:
    signs = {"\r\n": "⏎", "\t": "␣", "": "·"}
    unseen = [effect(text, 0.5) for text in signs]
    explanation.steps.extend(Step(token, [token], [], 0.0, 0.0, 5, 9) for token in unseen)
    explanation.save_html(tmp_path / "page.html")
    page.reload()
    for index, sign in enumerate(signs.values(), 3):
        page.locator("[data-step]").nth(index).focus()
        assert page.locator("#why h2").inner_text() == f"“{sign}”"
        assert page.locator("#why td").all_inner_texts().count(sign) == 1
    assert page.errors == []  # type: ignore[attr-defined]


def test_page_is_self_contained(explanation: Explanation) -> None:
    text = explanation.to_html()
    assert "http:" not in text
    assert "https:" not in text
    assert text.count("</script>") == 2
