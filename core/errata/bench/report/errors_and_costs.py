"""What went wrong and what it cost: error types, failures, refusals, seconds and bytes."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.bench.report.grouping import ONCE
from errata.edits.request import wish_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from errata.bench.report.grouping import Column, Section
    from errata.bench.report.reading import ResultEntry
    from errata.evaluate import Measurement

RIGHT, OTHER = "right", "not classified"


@dataclass(frozen=True)
class ErrorCounts:
    """How one column answered the questions of one metric, by error type.

    Attributes:
        column: its place in the section.
        label: of the column.
        moment: when it was asked.
        metric: that counts the answers.
        counts: "right" and each error type → answers.
    """

    column: int
    label: str
    moment: str
    metric: str
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        """How many answers there are."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class ColumnCost:
    """What a column's edits cost.

    Attributes:
        column: its place in the section.
        label: of the column.
        edits: how many were made, with all seeds; cases edited at once count as one.
        cases: how many different cases they cover.
        seconds: a case's share of its edit's seconds, with interval over edits; None if unknown.
            Edits of the same cases with several seeds are one, with their mean.
        median: the same of the median edit.
        size: a case's share of the stored bytes, the same.
        peak: highest memory in bytes that was recorded.
        measuring: seconds spent on measuring, in all.
    """

    column: int
    label: str
    edits: int
    cases: int
    seconds: Measurement | None
    median: float | None
    size: Measurement | None
    peak: float | None
    measuring: float


@dataclass(frozen=True)
class Incident:
    """A case that failed, or whose edit a guard refused."""

    label: str
    seed: int
    case_id: str
    stage: str
    step: int
    request: str
    reason: str


def error_counts(section: Section) -> list[ErrorCounts]:
    """Return the error types of every generated metric, column and moment (not of the base)."""
    found = []
    for index, column in enumerate(section.columns):
        if column.is_base:
            continue
        for moment in section.moments:
            by_metric: dict[str, Counter[str]] = {}
            for entry in column.at(moment):
                for answer in entry.answers:
                    kind = RIGHT if answer.right else answer.error or OTHER
                    by_metric.setdefault(answer.metric, Counter())[kind] += 1
            found += [
                ErrorCounts(index, column.label, moment, metric, dict(counts))
                for metric, counts in by_metric.items()
            ]
    return sorted(found, key=lambda one: _first(found, one.metric))


def error_types(found: Iterable[ErrorCounts]) -> list[str]:
    """Return the error types that occur, the known ones in their own order, "right" first."""
    there = {kind for one in found for kind in one.counts}
    known = error_order()
    return [kind for kind in known if kind in there] + sorted(there - set(known))


def error_order() -> list[str]:
    """Return everything that an answer can be, "right" first."""
    from errata.evaluate.failures import ERROR_TYPES

    return [RIGHT, *ERROR_TYPES, OTHER]


def costs(section: Section) -> list[ColumnCost]:
    """Return what the edits of each column cost."""
    return [
        _cost(index, column) for index, column in enumerate(section.columns) if not column.is_base
    ]


def failures(section: Section) -> list[Incident]:
    """Return the cases that could not be carried out."""
    return [
        _incident(column, entry, entry.error)
        for column in section.columns
        for entry in column.entries
        if entry.kind == "failure"
    ]


def refusals(section: Section) -> list[Incident]:
    """Return the edits that a guard refused, each once."""
    found: dict[tuple[str, int, str | None], Incident] = {}
    for column in section.columns:
        for entry in column.entries:
            if entry.refused:
                key = (column.label, entry.seed, entry.case_id)
                found.setdefault(key, _incident(column, entry, entry.refused))
    return list(found.values())


def _first(found: list[ErrorCounts], metric: str) -> int:
    return next(i for i, one in enumerate(found) if one.metric == metric)


def _cost(index: int, column: Column) -> ColumnCost:
    from errata.evaluate import Measurement

    made: dict[tuple[int, tuple[str, ...] | str], list[ResultEntry]] = {}
    for entry in column.entries:
        edit = entry.edit
        if entry.kind != "case" or edit is None or entry.refused or entry.stage == "checkpoint":
            continue
        ids = tuple(str(one) for one in edit.get("ids") or ())
        made.setdefault((entry.seed, ids or entry.key), []).append(entry)
    same: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for entries in made.values():
        cases = tuple(sorted({entry.case_id or "" for entry in entries}))
        same.setdefault(cases, []).append(entries[0].edit or {})
    seconds = _means(same.values(), "seconds")
    sizes = _means(same.values(), "bytes")
    peaks = [
        one.value
        for entry in column.entries
        for one in entry.measurements
        if one.unit == "bytes" and "peak" in one.metric
    ]
    return ColumnCost(
        index,
        column.label,
        len(made),
        len({case for cases in same for case in cases}),
        Measurement.mean("seconds", seconds, "cost: wall-clock", unit="s", direction="lower")
        if seconds
        else None,
        statistics.median(seconds) if seconds else None,
        Measurement.mean("bytes", sizes, "cost: stored size", unit="bytes", direction="lower")
        if sizes
        else None,
        max(peaks, default=None),
        sum(float(entry.seconds.get("measure") or 0) for entry in column.entries),
    )


def _means(same: Iterable[Sequence[Mapping[str, Any]]], name: str) -> list[float]:
    """Return the mean of a cost over the edits of the same cases, for all that know it."""
    known = [[float(one[name]) for one in edits if one.get(name) is not None] for edits in same]
    return [statistics.fmean(values) for values in known if values]


def _incident(column: Column, entry: ResultEntry, reason: str) -> Incident:
    return Incident(
        column.label,
        entry.seed,
        entry.case_id or "",
        entry.stage or ONCE,
        entry.step,
        title_of(entry),
        reason,
    )


def title_of(entry: ResultEntry) -> str:
    """Return "filled prompt → target" of a case's first request."""
    if not entry.requests:
        return ""
    first = entry.requests[0]
    text = str(first.get("prompt", "")).replace("{}", str(first.get("subject", "")))
    more = f" (+{len(entry.requests) - 1})" if len(entry.requests) > 1 else ""
    return f"{text} → {wish_of(first)}{more}"
