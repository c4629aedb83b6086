"""Tables: metrics × columns per protocol, the best marked, differences from a reference tested."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from errata.bench.report.grouping import FINAL, IMMEDIATE, ONCE, of_states, sample, table_of
from errata.errors import ComparisonError

if TYPE_CHECKING:
    from errata.bench.report.grouping import Column, Section
    from errata.evaluate import Measurement
    from errata.evaluate.compare import Comparison

MOMENT_NAMES = {ONCE: "", IMMEDIATE: "right after", FINAL: "at the end"}
ALPHA = 0.05
POOLED = "; mean over evaluations"
"""What `errata.evaluate.pool` adds to the protocol of a number that is one value per evaluation."""


@dataclass(frozen=True)
class ColumnHead:
    """One column of a table: a variant, and when it was measured.

    Attributes:
        column: its place among the section's columns.
        label: of the variant.
        moment: "" (once), "immediate" or "final".
        steps: at how many applied edits, for example "40"; "" where it is one case each.
    """

    column: int
    label: str
    moment: str = ONCE
    steps: str = ""

    @property
    def when(self) -> str:
        """The moment in words."""
        return MOMENT_NAMES[self.moment] + (
            f" ({self.steps} edits)" if self.moment == FINAL and self.steps else ""
        )


@dataclass(frozen=True)
class MetricCell:
    """One number of a table.

    Attributes:
        measurement: the number.
        best: whether no edited column has a better one (of the same moment, and of the cases that
            all of them have).
        difference: from the reference column, paired by case, its p-value adjusted for the number
            of columns compared (Holm); None for the reference itself and where there are no cases.
    """

    measurement: Measurement
    best: bool = False
    difference: Comparison | None = None

    @property
    def p(self) -> float | None:
        """The adjusted p-value of the difference."""
        return self.difference.adjusted if self.difference else None

    @property
    def differs(self) -> bool:
        """Whether the difference from the reference is significant at 5 %."""
        return self.p is not None and self.p < ALPHA


@dataclass(frozen=True)
class MetricRow:
    """One metric: a cell per head, None where it was not measured."""

    metric: str
    protocol: str
    unit: str
    direction: str
    cells: tuple[MetricCell | None, ...]

    @property
    def clauses(self) -> tuple[str, ...]:
        """How it was measured, clause by clause."""
        return tuple(self.protocol.partition(":")[2].strip().split("; "))

    @property
    def n(self) -> str:
        """The sample size, or the smallest and the largest."""
        sizes = sorted({cell.measurement.n for cell in self.cells if cell})
        return "–".join(map(str, sizes if len(sizes) < 3 else (sizes[0], sizes[-1])))


@dataclass(frozen=True)
class MetricTable:
    """The metrics of one protocol.

    Attributes:
        protocol: its name.
        heads: columns.
        rows: metrics.
        reference: label of the column that differences are taken from; "" where none are.
    """

    protocol: str
    heads: tuple[ColumnHead, ...]
    rows: tuple[MetricRow, ...]
    reference: str = ""

    @property
    def ends(self) -> tuple[str, ...]:
        """After how many edits the columns of a stream end; more than one are not comparable."""
        return tuple(dict.fromkeys(head.steps for head in self.heads if head.steps))

    @property
    def notes(self) -> tuple[str, ...]:
        """Every clause of the rows' protocols once: row i is described by `numbers(row)`."""
        return tuple(dict.fromkeys(clause for row in self.rows for clause in row.clauses))

    def numbers(self, row: MetricRow) -> tuple[int, ...]:
        """Return which notes, counted from 1, say how a row was measured."""
        return tuple(self.notes.index(clause) + 1 for clause in row.clauses)

    @property
    def tests(self) -> tuple[str, ...]:
        """Which tests of differences were made."""
        cells = [cell for row in self.rows for cell in row.cells if cell]
        return tuple(sorted({cell.difference.test for cell in cells if cell.difference}))


def tables(section: Section, reference: str = "") -> list[MetricTable]:
    """Return a section's tables, one per protocol; the base's column comes first.

    Args:
        section: the results.
        reference: label of the column that the others are compared with; "" for none.
    """
    heads: list[ColumnHead] = []
    of_cases: list[list[Measurement]] = []
    of_whole: list[list[Measurement]] = []
    for index, column in enumerate(section.columns):
        for moment in (ONCE,) if column.is_base else section.moments:
            heads.append(ColumnHead(index, column.label, moment, _steps(column, moment)))
            cases, states = column.at(moment), column.states(moment)
            of_cases.append(table_of(sample(cases)) if cases else [])
            of_whole.append(of_states(states) if states else [])
    # The base knows some numbers twice: for each case, and of its state. It shows them as the
    # edited columns do, so that like is set against like.
    edited_states = {_key(one) for states in of_whole[1:] for one in states}
    twice = edited_states & {_key(one) for one in of_whole[0]}
    of_cases[0] = [one for one in of_cases[0] if _key(one) not in twice]
    by_key = [
        {_key(one): one for one in reversed([*cases, *states])}
        for cases, states in zip(of_cases, of_whole, strict=True)
    ]
    comparable = [
        {**measured, **_on_shared_cases(section, head)}
        for head, measured in zip(heads, by_key, strict=True)
    ]
    by_name: dict[str, list[MetricRow]] = {}
    edited = any(measured for head, measured in zip(heads, by_key, strict=True) if head.column)
    for key in _merged([list(reversed(measured)) for measured in by_key]):
        numbers = [measured.get(key) for measured in by_key]
        if edited and not any(numbers[1:]):
            continue  # of the base alone: there is nothing to set it against
        rivals = [measured.get(key) for measured in comparable]
        row = _row(section, heads, numbers, rivals, reference)
        by_name.setdefault(row.protocol.partition(":")[0], []).append(row)
    return [_table(name, heads, rows, reference) for name, rows in by_name.items()]


def _on_shared_cases(section: Section, head: ColumnHead) -> dict[tuple[str, str], Measurement]:
    """Return a column's numbers on the cases that all edited columns have at its moment.

    Nothing where they have the same cases: its numbers are those then.
    """
    column = section.columns[head.column]
    if column.is_base:
        return {}
    own = [{entry.case_id for entry in one.at(head.moment)} for one in section.edited]
    cases = [found for found in own if found]
    if not cases or all(found == cases[0] for found in cases):
        return {}
    shared = frozenset.intersection(*map(frozenset, cases))
    kept = [entry for entry in column.at(head.moment) if entry.case_id in shared]
    return {_key(one): one for one in reversed(table_of(sample(kept)))}


def _key(one: Measurement) -> tuple[str, str]:
    """Return what a row is about: one state's perplexity and the mean of several are one row."""
    return one.metric, one.protocol.removesuffix(POOLED)


def _table(
    name: str, heads: Sequence[ColumnHead], rows: Sequence[MetricRow], reference: str
) -> MetricTable:
    """Return a protocol's table without the moments at which it was not measured."""
    kept = [
        i
        for i, head in enumerate(heads)
        if head.column == 0
        or any(
            row.cells[j]
            for row in rows
            for j, other in enumerate(heads)
            if other.moment == head.moment and other.column
        )
    ]
    return MetricTable(
        name,
        tuple(heads[i] for i in kept),
        tuple(replace(row, cells=tuple(row.cells[i] for i in kept)) for row in rows),
        reference,
    )


def _row(
    section: Section,
    heads: Sequence[ColumnHead],
    numbers: Sequence[Measurement | None],
    rivals: Sequence[Measurement | None],
    reference: str,
) -> MetricRow:
    """Return a metric's row; `rivals` are its numbers on the same cases, for the best of them."""
    some = next(one for one in numbers if one is not None)
    differences = _differences(heads, numbers, reference) if reference else {}
    best = _best(section, heads, rivals, some.direction)
    cells = [
        None if one is None else MetricCell(one, i in best, differences.get(i))
        for i, one in enumerate(numbers)
    ]
    protocol = max((one.protocol for one in numbers if one is not None), key=len)
    return MetricRow(some.metric, protocol, some.unit, some.direction, tuple(cells))


def _differences(
    heads: Sequence[ColumnHead], numbers: Sequence[Measurement | None], reference: str
) -> dict[int, Comparison]:
    """Return how each column differs from the reference at the same moment, adjusted per moment."""
    from errata.evaluate.compare import compare, holm

    found: dict[int, Comparison] = {}
    for moment in dict.fromkeys(head.moment for head in heads):
        # The base was asked once and stands beside every moment.
        there = [i for i, head in enumerate(heads) if head.moment == moment or head.column == 0]
        place = next((i for i in there if heads[i].label == reference), None)
        other = None if place is None else numbers[place]
        if place is None or other is None:
            continue
        steps = heads[place].steps
        group: dict[int, Comparison] = {}
        for i in there:
            one = numbers[i]
            if one is None or heads[i].label == reference or heads[i].moment != moment:
                continue
            if steps not in ("", heads[i].steps):
                continue  # not after equally many edits
            with suppress(ComparisonError):  # no cases, or none shared: nothing to pair
                names = (heads[i].label, reference)
                group[i] = compare(one, other, shared=True, labels=names)
        adjusted = holm([difference.p for difference in group.values()])
        found |= {
            i: replace(difference, adjusted=p)
            for (i, difference), p in zip(group.items(), adjusted, strict=True)
        }
    return found


def _best(
    section: Section,
    heads: Sequence[ColumnHead],
    numbers: Sequence[Measurement | None],
    direction: str,
) -> set[int]:
    """Return which cells no other edited column betters, per moment; ties are all best.

    None where columns of a stream end after different numbers of edits, and where they were not
    measured on the same cases.
    """
    if not direction:
        return set()
    found: set[int] = set()
    for moment in section.moments:
        rivals = {
            i: one
            for i, (head, one) in enumerate(zip(heads, numbers, strict=True))
            if one is not None
            and head.moment == moment
            and not section.columns[head.column].is_base
            and not math.isnan(one.value)
        }
        ends = {heads[i].steps for i in rivals}  # a column with more edits on it is not comparable
        cases = {(one.n, tuple(sorted(one.case_ids))) for one in rivals.values()}
        if len(rivals) > 1 and len(ends) == len(cases) == 1:
            values = {i: one.value for i, one in rivals.items()}
            top = (max if direction == "higher" else min)(values.values())
            best = {i for i, value in values.items() if _is_same(value, top)}
            found |= best if len(best) < len(rivals) else set()  # all alike: none stands out
    return found


def _is_same(one: float, other: float) -> bool:
    """Say whether two means differ by nothing but the rounding of floats."""
    from errata.contract.measurement import PRECISION

    return math.isclose(one, other, rel_tol=PRECISION, abs_tol=1e-12)


def _merged(lists: Iterable[Sequence[tuple[str, str]]]) -> list[tuple[str, str]]:
    """Return the keys of several ordered lists in one order that keeps each list's own."""
    order: list[tuple[str, str]] = []
    for keys in lists:
        place = 0
        for key in keys:
            if key not in order:
                order.insert(place, key)
            place = order.index(key) + 1
    return order


def _steps(column: Column, moment: str) -> str:
    if moment != FINAL:
        return ""
    steps = sorted({e.step for e in [*column.at(FINAL), *column.states(FINAL)]})
    return "–".join(map(str, steps if len(steps) < 3 else (steps[0], steps[-1])))
