"""An explanation as one self-contained HTML page."""

from __future__ import annotations

from functools import cache
from typing import Any

from ensemble_decode.explain.explanation import Explanation


def render(explanation: Explanation) -> str:
    """The page's text. It names no external resource.

    Raises
    ------
    ImportError
        jinja2 is missing; the line says which extra brings it.
    """
    data = explanation.to_dict()
    largest = max([abs(total["log_odds"]) for total in data["totals"]] + [1e-9])
    return _template().render(data=data, largest=largest, shade=_shade, shown=_shown, moved=_moved(explanation))


def _shade(log_odds: float) -> str:
    """CSS class of a move: five steps on each side of none."""
    size = sum(abs(log_odds) >= edge for edge in (0.25, 0.5, 1.0, 2.0, 4.0))
    return "m0" if size == 0 else f"{'up' if log_odds > 0 else 'down'}{size}"


def _shown(text: str) -> str:
    """A token's text, or a sign where there is nothing to see: ⏎ a line break, ␣ white space, · part of a character."""
    if text.strip():
        return text
    return "·" if not text else "⏎" if "\n" in text or "\r" in text else "␣"


def _moved(explanation: Explanation) -> int:
    return sum(abs(step.chosen.log_odds) >= 0.25 for step in explanation.steps)


@cache
def _template() -> Any:
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError:
        raise ImportError("the page needs jinja2: pip install 'ensemble_decode[report]'") from None
    loader = PackageLoader("ensemble_decode.explain", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")
