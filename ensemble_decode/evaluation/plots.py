"""Plots of a report as inline SVG. Colours are the page's CSS classes, so that light and dark have theirs; no library, same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 560, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 14, 46


@dataclass(frozen=True, slots=True)
class Point:
    """A figure at x with its interval; ``name`` is what is shown when a mouse rests on it, ``label`` what stands beside it."""

    x: float
    y: float
    name: str
    y_low: float | None = None
    y_high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    label: str = ""


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one colour, joined by a line or not. Intervals of y alone are a band around the line, else each has bars.

    ``level`` is a dotted line of the same colour through (x, y): what chance alone shows.
    """

    name: str
    points: Sequence[Point]
    joined: bool = True
    level: Sequence[tuple[float, float]] = ()


def line_plot(series: Sequence[Series], x_label: str, y_label: str, rule: float | None = None, note: str = "") -> str:
    """Lines with bands; ``rule`` is a dashed level that ``note`` says the meaning of."""
    return _plot(series, x_label, y_label, rule, note)


def scatter_plot(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """Points with bars both ways."""
    return _plot(series, x_label, y_label, None, "")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers that cover ``low`` … ``high``: 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _plot(series: Sequence[Series], x_label: str, y_label: str, rule: float | None, note: str) -> str:
    points = [point for one in series for point in one.points]
    xs = [v for p in points for v in (p.x, p.x_low, p.x_high) if v is not None]
    ys = [v for p in points for v in (p.y, p.y_low, p.y_high) if v is not None]
    ys += [y for one in series for _, y in one.level] + ([] if rule is None else [rule])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    to_x = _scale(x_ticks[0], x_ticks[-1], _LEFT, _WIDTH - _RIGHT)
    to_y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)} against {escape(x_label)}">',
        *_axes(x_ticks, y_ticks, to_x, to_y, x_label, y_label),
    ]
    if rule is not None:
        y = to_y(rule)
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="note" x="{_WIDTH - _RIGHT - 4}" y="{y - 5:.1f}" text-anchor="end">{escape(note)}</text>'
        )
    for number, one in enumerate(series):
        parts += _series(one, f"s{number % 6}", to_x, to_y)
    return "\n".join([*parts, "</svg>"])


def _axes(
    x_ticks: list[float],
    y_ticks: list[float],
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> list[str]:
    bottom = _HEIGHT - _BOTTOM
    parts = []
    for value in y_ticks:
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        parts.append(
            f'<text class="tick" x="{to_x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value:g}</text>'
        )
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + bottom) / 2
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(
        f'<text class="name" x="{middle_x:.0f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>'
    )
    turned = f'transform="rotate(-90 14 {middle_y:.0f})"'
    parts.append(f'<text class="name" x="14" y="{middle_y:.0f}" text-anchor="middle" {turned}>{escape(y_label)}</text>')
    return parts


def _series(one: Series, style: str, to_x: Callable[[float], float], to_y: Callable[[float], float]) -> list[str]:
    parts = [f'<g class="{style}">']
    if one.level:
        level = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in one.level)
        parts.append(f'<polyline class="level" points="{level}"/>')
    banded = [point for point in one.points if point.x_low is None and point.y_low is not None]
    if not one.joined or len(one.points) == 1:
        banded = []
    if one.joined:
        upper = [f"{to_x(p.x):.1f},{to_y(p.y_high or 0.0):.1f}" for p in banded]
        lower = [f"{to_x(p.x):.1f},{to_y(p.y_low or 0.0):.1f}" for p in reversed(banded)]
        if banded:
            parts.append(f'<polygon class="band" points="{" ".join(upper + lower)}"/>')
        line = " ".join(f"{to_x(p.x):.1f},{to_y(p.y):.1f}" for p in one.points)
        parts.append(f'<polyline class="line" points="{line}"/>')
    for point in one.points:
        x, y = to_x(point.x), to_y(point.y)
        if point.y_low is not None and point.y_high is not None and not banded:
            low, high = to_y(point.y_low), to_y(point.y_high)
            parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>')
        if point.x_low is not None and point.x_high is not None:
            low, high = to_x(point.x_low), to_x(point.x_high)
            parts.append(f'<line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5"><title>{escape(point.name)}</title></circle>')
        if point.label:
            left = x > _WIDTH - 120
            parts.append(
                f'<text class="label" x="{x + (-9 if left else 9):.1f}" y="{y - 8:.1f}" '
                f'text-anchor="{"end" if left else "start"}">{escape(point.label)}</text>'
            )
    return [*parts, "</g>"]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low) * (end - start)
