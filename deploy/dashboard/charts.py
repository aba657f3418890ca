"""Curves and grids as SVG: drawn here, so that a page needs no script, and no style of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

from umbel.server.summary import Point

WIDTH, HEIGHT = 460, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
COLOURS = 8
MOST_POINTS = 400


class Cell(NamedTuple):
    """A client in a round: ``state`` is a word of the style sheet, ``text`` what it says."""

    state: str
    text: str


class Bar(NamedTuple):
    """A stretch of time in a row: from, to, a word of the style sheet, what it says."""

    begin: float
    end: float
    state: str
    text: str


def curves(series: Mapping[str, Sequence[Point]], limit: float | None = None) -> Markup:
    """Lines over rounds, each with its points' values to be read off.

    Args:
        series: name -> points; what is not finite leaves a gap.
        limit: a line across, such as a budget.
    """
    kept = {name: _thin([p for p in s if math.isfinite(p.value)]) for name, s in series.items()}
    points = [p for s in kept.values() for p in s]
    if not points:
        return Markup('<p class="quiet">no figures yet</p>')
    rounds = [p.round for p in points]
    values = [p.value for p in points] + ([] if limit is None else [limit])
    first, last = min(rounds), max(rounds)
    low, high, marks = _scale(min(values), max(values))
    inner = WIDTH - LEFT - RIGHT

    def x(number: float) -> float:
        return LEFT + inner * ((number - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - (value - low) / (high - low))

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for mark in marks:
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(mark):.1f}" '
            f'y2="{y(mark):.1f}"/><text class="tick" x="{LEFT - 6}" y="{y(mark) + 3.5:.1f}" '
            f'text-anchor="end">{mark:.4g}</text>'
        )
    for number in sorted({first, (first + last) // 2, last}):
        parts.append(
            f'<text class="tick" x="{x(number):.1f}" y="{HEIGHT - 6}" '
            f'text-anchor="middle">{number}</text>'
        )
    if limit is not None:
        parts.append(
            f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(limit):.1f}" '
            f'y2="{y(limit):.1f}"/>'
        )
    for place, (name, line) in enumerate(kept.items()):
        colour = f"s{place % COLOURS}"
        path = " ".join(f"{x(p.round):.1f},{y(p.value):.1f}" for p in line)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        radius = 2.5 if len(line) <= 40 else 1.2
        for p in line:
            title = escape(f"{name}, round {p.round}: {p.value:.5g}")
            parts.append(
                f'<circle class="dot {colour}" cx="{x(p.round):.1f}" cy="{y(p.value):.1f}" '
                f'r="{radius}"><title>{title}</title></circle>'
            )
    parts.append("</svg>")
    return Markup("".join(parts))


def heat(
    rows: Sequence[str], columns: Sequence[int], cells: Mapping[tuple[str, int], Cell]
) -> Markup:
    """A grid, client by round; what a cell says is shown when it is pointed at.

    Args:
        rows: clients.
        columns: rounds.
        cells: (client, round) -> what was; none: not asked.
    """
    side, gap, label = 16, 2, 150
    step = side + gap
    width, height = label + step * len(columns) + gap, step * len(rows) + 20
    parts = [
        f'<svg class="heat" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img">'
    ]
    for i, client in enumerate(rows):
        shown = client if len(client) <= 22 else f"{client[:21]}…"
        parts.append(
            f'<text class="tick" x="{label - 8}" y="{i * step + 13}" text-anchor="end">'
            f"{escape(shown)}</text>"
        )
        for j, number in enumerate(columns):
            cell = cells.get((client, number), Cell("idle", "not asked"))
            title = escape(f"{client}, round {number}: {cell.text}")
            parts.append(
                f'<rect class="cell {cell.state}" x="{label + j * step}" y="{i * step}" '
                f'width="{side}" height="{side}" rx="2"><title>{title}</title></rect>'
            )
    every = max(1, math.ceil(24 / step * 1.2), len(columns) // 12)
    for j in range(0, len(columns), every):
        parts.append(
            f'<text class="tick" x="{label + j * step + side / 2}" y="{height - 5}" '
            f'text-anchor="middle">{columns[j]}</text>'
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def timeline(rows: Mapping[str, Sequence[Bar]]) -> Markup:
    """Bars over time, a row each, all rows from the same beginning; times in seconds."""
    bars = [bar for row in rows.values() for bar in row]
    if not bars:
        return Markup('<p class="quiet">no rounds yet</p>')
    begin, end = min(b.begin for b in bars), max(b.end for b in bars)
    label, width, step = 150, 1180, 20
    height = step * len(rows) + 20
    scale = (width - label - 10) / max(end - begin, 1e-9)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    for i, (name, row) in enumerate(rows.items()):
        shown = name if len(name) <= 22 else f"{name[:21]}…"
        parts.append(
            f'<text class="tick" x="{label - 8}" y="{i * step + 13}" text-anchor="end">'
            f"{escape(shown)}</text>"
        )
        for bar in row:
            parts.append(
                f'<rect class="bar {bar.state}" x="{label + (bar.begin - begin) * scale:.1f}" '
                f'y="{i * step + 2}" width="{max(1.0, (bar.end - bar.begin) * scale - 0.5):.1f}" '
                f'height="{step - 5}" rx="2"><title>{escape(bar.text)}</title></rect>'
            )
    for share in (0.0, 0.5, 1.0):
        at = label + (width - label - 10) * share
        anchor = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
        parts.append(
            f'<text class="tick" x="{at:.0f}" y="{height - 5}" text-anchor="{anchor}">'
            f"{(end - begin) * share:.3g} s</text>"
        )
    parts.append("</svg>")
    return Markup("".join(parts))


def _thin(points: Sequence[Point]) -> list[Point]:
    """At most :data:`MOST_POINTS`, the last among them."""
    step = math.ceil(len(points) / MOST_POINTS) or 1
    return list(points[::-1][::step][::-1])


def _scale(low: float, high: float) -> tuple[float, float, list[float]]:
    """An axis around the values, and its marks: round numbers."""
    if high - low < 1e-12 * max(abs(high), 1e-12):
        pad = abs(high) / 10 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * f for f in (1, 2, 2.5, 5, 10) if size * f >= raw)
    low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    count = round((high - low) / step)
    return low, high, [low + step * i for i in range(count + 1)]
