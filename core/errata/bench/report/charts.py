"""Charts for the page, drawn as small inline SVG; colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from errata.bench.report import formatting
from errata.cli.render import size

if TYPE_CHECKING:
    from errata.bench.report.curves import Curve, CurveLine

WIDTH, HEIGHT = 380, 230
RIGHT, TOP, BOTTOM = 14, 10, 38
COLOURS = 8
"""Columns beyond these repeat a colour, but not together with the mark and the dashes."""

DASHES = ("", "7 3", "2 3", "9 3 2 3", "", "5 5", "1 3", "12 4")
MARKS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.6"/>',
    lambda x, y: f'<rect x="{x - 3.3:.1f}" y="{y - 3.3:.1f}" width="6.6" height="6.6"/>',
    lambda x, y: _shape(x, y, (0, -4.4), (4.2, 3.2), (-4.2, 3.2)),
    lambda x, y: _shape(x, y, (0, -4.8), (4.8, 0), (0, 4.8), (-4.8, 0)),
    lambda x, y: _shape(x, y, (0, 4.4), (4.2, -3.2), (-4.2, -3.2)),
    lambda x, y: _shape(x, y, (-4.6, -1.4), (4.6, -1.4), (4.6, 1.4), (-4.6, 1.4)),
    lambda x, y: _shape(x, y, (-1.4, -4.6), (1.4, -4.6), (1.4, 4.6), (-1.4, 4.6)),
)


@dataclass(frozen=True)
class Scale:
    """A range of values along an axis."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return where a value stands."""
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = (math.log10(max(x, 1e-12)) for x in (low, high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def curve(one: Curve) -> str:
    """Return a line chart: a band for each interval, a mark for each point, titles to hover."""
    values = [p.value for line in one.lines for p in line.points if math.isfinite(p.value)]
    ends = [end for line in one.lines for p in line.points for end in p.interval or ()]
    base = [one.base.value] if one.base and math.isfinite(one.base.value) else []
    if not values:
        return ""
    steps = sorted({p.step for line in one.lines for p in line.points})
    y, ticks = _vertical([*values, *ends, *base], one.unit, values)
    names = [_tick(tick, one.unit) for tick in ticks]
    left = max(36, 12 + 6 * max(map(len, names)))
    x = Scale(steps[0], steps[-1], left + 8, WIDTH - RIGHT - 8, _is_wide(steps))
    parts = [_grid(y, ticks, names, left), _steps(x, steps)]
    if base:
        at = y(base[0])
        title = f"base: {formatting.amount(base[0], one.unit)}"
        parts.append(
            f'<g class="base-line"><title>{escape(title)}</title>'
            f'<line x1="{left}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/></g>'
        )
    parts += [_band(line, x, y) for line in one.lines]
    parts += [_line(line, x, y, one.unit) for line in one.lines]
    label = f"{one.what}: " + "; ".join(_said(line, one.unit) for line in one.lines)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}"
        f'<text class="axis" x="{(left + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}">'
        "edits so far</text></svg>"
    )


def mark(column: int) -> str:
    """Return a column's mark alone, for legends and table heads; column 0 is the base."""
    if column == 0:
        return (
            '<svg class="mark base-line" viewBox="0 0 22 12" aria-hidden="true">'
            '<line x1="1" x2="21" y1="6" y2="6"/></svg>'
        )
    return (
        f'<svg class="mark {colour(column)}" viewBox="0 0 22 12" aria-hidden="true">'
        f'<line x1="1" x2="21" y1="6" y2="6"{_dash(column)}/>{_mark(column)(11, 6)}</svg>'
    )


def colour(column: int) -> str:
    """Return the CSS class of a column's colour; column 0 is the base."""
    return "c-base" if column == 0 else f"c{(column - 1) % COLOURS}"


def _shape(x: float, y: float, *corners: tuple[float, float]) -> str:
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>'


def _mark(column: int) -> Callable[[float, float], str]:
    return MARKS[(column - 1) % len(MARKS)]


def _dash(column: int) -> str:
    pattern = DASHES[(column - 1) % len(DASHES)]
    return f' stroke-dasharray="{pattern}"' if pattern else ""


def _is_wide(steps: Sequence[int]) -> bool:
    """Whether steps span so much that a plain axis would press the first ones together."""
    return steps[0] > 0 and steps[-1] / steps[0] >= 50


def _vertical(
    found: Sequence[float], unit: str, values: Sequence[float]
) -> tuple[Scale, list[float]]:
    """Return the vertical scale and its ticks: 0 to 1 for shares, logarithmic for explosions."""
    start, end = HEIGHT - BOTTOM, TOP
    finite = [value for value in found if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if unit == "share" and low >= 0 and high <= 1:
        return Scale(0, 1, start, end), [0, 0.25, 0.5, 0.75, 1]
    if low > 0 and max(values) / min(values) >= 50:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        every = max(1, (last - first) // 5)
        ticks = [10.0**k for k in range(first, last + 1, every)]
        return Scale(10.0**first, 10.0**last, start, end, is_log=True), ticks
    step = _nice((high - low) / 4 or abs(high) / 4 or 1.0)
    first, last = math.floor(low / step), math.ceil(high / step)
    if first == last:
        last += 1
    ticks = [k * step for k in range(first, last + 1)]
    return Scale(ticks[0], ticks[-1], start, end), ticks


def _nice(step: float) -> float:
    """Return the next larger of 1, 2, 2.5, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(k * power for k in (1, 2, 2.5, 5, 10) if k * power >= step * 0.999)


def _grid(y: Scale, ticks: Sequence[float], names: Sequence[str], left: int) -> str:
    parts = []
    for tick, name in zip(ticks, names, strict=True):
        at = y(tick)
        parts.append(
            f'<line x1="{left}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text x="{left - 6}" y="{at + 3.5:.1f}">{escape(name)}</text>'
        )
    return f'<g class="grid">{"".join(parts)}</g>'


def _tick(value: float, unit: str) -> str:
    if unit == "bytes":
        return size(value).replace(".0 ", " ")
    return f"{value:.4g}".replace("-", "−")


def _steps(x: Scale, steps: Sequence[int]) -> str:
    shown: list[int] = []
    for step in reversed(steps):  # the last one always; others where there is room
        if not shown or x(shown[-1]) - x(step) > 9 + 6 * len(str(step)):
            shown.append(step)
    parts = [f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 16}">{step}</text>' for step in shown]
    return f'<g class="steps">{"".join(parts)}</g>'


def _band(line: CurveLine, x: Scale, y: Scale) -> str:
    there = [(p.step, p.interval) for p in line.points if p.interval]
    if len(there) < 2:
        return ""
    upper = [f"{x(step):.1f},{y(high):.1f}" for step, (_, high) in there]
    lower = [f"{x(step):.1f},{y(low):.1f}" for step, (low, _) in reversed(there)]
    return f'<polygon class="band {colour(line.column)}" points="{" ".join(upper + lower)}"/>'


def _line(line: CurveLine, x: Scale, y: Scale, unit: str) -> str:
    there = [p for p in line.points if math.isfinite(p.value)]
    points = " ".join(f"{x(p.step):.1f},{y(p.value):.1f}" for p in there)
    marks = []
    for p in there:
        spread = formatting.interval(p.interval, unit)
        title = (
            f"{line.label}, {p.step} edits: {formatting.amount(p.value, unit)}"
            f"{f' ({spread})' if spread else ''}, n = {p.n}"
        )
        shape = _mark(line.column)(x(p.step), y(p.value))
        marks.append(f"<g><title>{escape(title)}</title>{shape}</g>")
    return (
        f'<g class="line {colour(line.column)}"><polyline points="{points}"{_dash(line.column)}/>'
        f"{''.join(marks)}</g>"
    )


def _said(line: CurveLine, unit: str) -> str:
    first, last = line.points[0], line.points[-1]
    return (
        f"{line.label} from {formatting.amount(first.value, unit)} after {first.step} edits to "
        f"{formatting.amount(last.value, unit)} after {last.step}"
    )
