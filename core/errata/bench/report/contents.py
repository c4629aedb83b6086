"""What a report holds: the parts of each section, its headlines, and what was located."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from errata.bench.config import BASE
from errata.bench.report.grouping import FINAL, IMMEDIATE
from errata.bench.report.progress import RunProgress, progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from errata.bench.report.curves import Curve
    from errata.bench.report.errors_and_costs import ColumnCost, ErrorCounts, Incident
    from errata.bench.report.grouping import Section
    from errata.bench.report.locate_results import Located
    from errata.bench.report.reading import RunResults
    from errata.bench.report.tables import MetricCell, MetricRow, MetricTable

HEADLINE_METRICS = (
    "Score",
    "rewrite_contained",
    "paraphrase_contained",
    "portability_contained",
    "locality_exact",
    "locality_unchanged",
    "neighbourhood_exact",
    "neighbourhood_unchanged",
    "perplexity_ratio",
)
"""Shown first in the overview where they were measured, else a protocol's first metrics."""
SUMMARY_METRICS = ("ES", "PS", "NS", *HEADLINE_METRICS)
"""Shown when a run ends: what the published tables show, too."""
EFFICACY = "rewrite_contained"


@dataclass(frozen=True)
class Headline:
    """One metric at one moment, for every column of the section: None where it has none."""

    table: MetricTable
    row: MetricRow
    moment: str
    cells: tuple[MetricCell | None, ...]


@dataclass(frozen=True)
class Part:
    """One section with everything that is said about it.

    Attributes:
        section: the results.
        tables: a table per protocol.
        curves: what happens as edits pile up; none in regimes that edit one case at a time.
        errors: error types per column and metric.
        costs: of each column's edits.
        failures: cases that could not be carried out.
        refusals: edits that a guard refused.
    """

    section: Section
    tables: tuple[MetricTable, ...]
    curves: tuple[Curve, ...]
    errors: tuple[ErrorCounts, ...]
    costs: tuple[ColumnCost, ...]
    failures: tuple[Incident, ...]
    refusals: tuple[Incident, ...]

    @cached_property
    def overview(self) -> tuple[Headline, ...]:
        """The few numbers to look at first, protocols in their order."""
        return self._headlines(HEADLINE_METRICS)

    @cached_property
    def summary(self) -> tuple[Headline, ...]:
        """The numbers that are shown when a run ends."""
        return self._headlines(SUMMARY_METRICS)

    def _headlines(self, wanted: Sequence[str]) -> tuple[Headline, ...]:
        found: list[Headline] = []
        for table in self.tables:
            moments = [head.moment for head in table.heads if head.column]
            last = moments[-1] if moments else ""
            rows = _rows(table, wanted)
            found += [_headline(self.section, table, row, last) for row in rows]
        streamed = [one for one in found if one.moment == FINAL and IMMEDIATE in _moments(one)]
        if streamed:  # one metric right after each edit as well, to compare with
            first = min(streamed, key=lambda one: one.row.metric != EFFICACY)
            now = _headline(self.section, first.table, first.row, IMMEDIATE)
            found.insert(found.index(first), now)
        return tuple(found)

    @property
    def first_curves(self) -> tuple[Curve, ...]:
        """The curves of the overview's metrics; all of them where it has none."""
        wanted = {(head.row.metric, head.row.protocol) for head in self.overview}
        chosen = tuple(one for one in self.curves if (one.metric, one.protocol) in wanted)
        return chosen or self.curves


@dataclass(frozen=True)
class ReportContents:
    """What some runs found: all that a report shows, on whatever medium.

    Attributes:
        runs: as read.
        parts: one per model, dataset and regime.
        reference: label of the column that differences are taken from; "" where none are tested.
        located: results of `errata locate` and `errata diff` shown beside them.
    """

    runs: tuple[RunResults, ...]
    parts: tuple[Part, ...]
    reference: str = BASE
    located: tuple[Located, ...] = ()

    @property
    def title(self) -> str:
        """The runs' names; without runs what was located."""
        if self.runs:
            return ", ".join(dict.fromkeys(run.name for run in self.runs))
        return self.located[0].title if len(self.located) == 1 else "Where knowledge lies"

    @property
    def sources(self) -> list[Path]:
        """What was read."""
        return [*(run.path for run in self.runs), *(one.path for one in self.located)]

    @property
    def progress(self) -> list[RunProgress]:
        """How far each run is."""
        return [progress(run) for run in self.runs]


def _rows(table: MetricTable, wanted: Sequence[str]) -> list[MetricRow]:
    """Return the rows of a table to look at first; none of what is only a cost."""
    rows = [row for row in table.rows if row.unit not in ("bytes", "s", "seconds")]
    by_name = {row.metric: row for row in rows}
    return [by_name[name] for name in wanted if name in by_name] or rows[:1]


def _moments(one: Headline) -> list[str]:
    return [head.moment for head in one.table.heads]


def _headline(section: Section, table: MetricTable, row: MetricRow, moment: str) -> Headline:
    cells: list[MetricCell | None] = [None] * len(section.columns)
    for head, cell in zip(table.heads, row.cells, strict=True):
        if head.moment == moment or section.columns[head.column].is_base:
            cells[head.column] = cell
    return Headline(table, row, moment, tuple(cells))
