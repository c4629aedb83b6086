"""What happens as edits pile up: a metric over all earlier edits, after each so many edits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.bench.report.grouping import FINAL, MOMENTS, ONCE, of_states, sample, table_of

if TYPE_CHECKING:
    from errata.bench.report.grouping import Column, Section
    from errata.evaluate import Measurement


@dataclass(frozen=True)
class Point:
    """A metric after `step` edits, with its interval and sample size."""

    step: int
    value: float
    interval: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class CurveLine:
    """The points of one column."""

    column: int
    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Curve:
    """One metric over the number of edits.

    Attributes:
        metric: its name.
        protocol: how it was measured.
        unit: of the values.
        direction: which way is better.
        lines: a line per column that was looked at more than once.
        base: the unedited model's value, over all cases; None where it has none.
        of_state: whether it is about the model as a whole, not about the earlier edits.
    """

    metric: str
    protocol: str
    unit: str
    direction: str
    lines: tuple[CurveLine, ...]
    base: Point | None
    of_state: bool

    @property
    def what(self) -> str:
        """What is drawn over what, in words."""
        over = "the model as a whole" if self.of_state else "all edits made so far"
        return f"{self.metric}, measured on {over}, after each number of edits"


def curves(section: Section) -> list[Curve]:
    """Return the section's curves: metrics that were measured at two steps or more."""
    keys: dict[tuple[str, str, bool], Measurement] = {}
    lines: dict[tuple[str, str, bool], dict[int, list[Point]]] = {}
    for index, column in enumerate(section.columns):
        if column.is_base:
            continue
        for of_state in (False, True):
            for step in column.steps("state" if of_state else "case"):
                for one in _at(column, step, of_state):
                    key = (one.metric, one.protocol, of_state)
                    keys.setdefault(key, one)
                    found = lines.setdefault(key, {}).setdefault(index, [])
                    found.append(Point(step, one.value, one.interval, one.n))
    base = _base(section)
    return [
        Curve(
            one.metric,
            one.protocol,
            one.unit,
            one.direction,
            tuple(
                CurveLine(index, section.columns[index].label, tuple(points))
                for index, points in lines[key].items()
                if len(points) > 1
            ),
            base.get(key),
            key[2],
        )
        for key, one in keys.items()
        if any(len(points) > 1 for points in lines[key].values())
    ]


def _at(column: Column, step: int, of_state: bool) -> list[Measurement]:
    entries = [
        entry
        for entry in column.entries
        if entry.step == step
        and MOMENTS.get(entry.stage) == FINAL
        and entry.kind == ("state" if of_state else "case")
    ]
    return of_states(entries) if of_state else table_of(sample(entries))


def _base(section: Section) -> dict[tuple[str, str, bool], Point]:
    found = {}
    for column in section.columns:
        if column.is_base:
            cases, states = column.at(ONCE), column.states(ONCE)
            for of_state, measured in (
                (False, table_of(sample(cases)) if cases else []),
                (True, of_states(states) if states else []),
            ):
                for one in measured:
                    point = Point(0, one.value, one.interval, one.n)
                    found[one.metric, one.protocol, of_state] = point
    return found
