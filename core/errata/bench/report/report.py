"""A report: runs read, pooled and compared, as tables that know how to show themselves."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.config import BASE
from errata.bench.report.curves import Curve, curves
from errata.bench.report.errors_and_costs import (
    Cost,
    Errors,
    Incident,
    costs,
    error_counts,
    failures,
    refusals,
)
from errata.bench.report.grouping import FINAL, IMMEDIATE, Section, sections
from errata.bench.report.locate_results import Located, read_located
from errata.bench.report.progress import Progress, progress
from errata.bench.report.reading import Run, read_run
from errata.bench.report.tables import Cell, Row, Table, tables
from errata.errors import ConfigError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType


EFFICACY = "rewrite_exact"


@dataclass(frozen=True)
class Headline:
    """One metric at one moment, for every column of the section: None where it has none."""

    table: Table
    row: Row
    moment: str
    cells: tuple[Cell | None, ...]


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
    tables: tuple[Table, ...]
    curves: tuple[Curve, ...]
    errors: tuple[Errors, ...]
    costs: tuple[Cost, ...]
    failures: tuple[Incident, ...]
    refusals: tuple[Incident, ...]

    @cached_property
    def overview(self) -> tuple[Headline, ...]:
        """The few numbers to look at first, protocols in their order."""
        found: list[Headline] = []
        for table in self.tables:
            moments = [head.moment for head in table.heads if head.column]
            last = moments[-1] if moments else ""
            found += [_headline(self.section, table, row, last) for row in _headlines(table)]
        streamed = [one for one in found if one.moment == FINAL and IMMEDIATE in _moments(one)]
        if streamed:  # one metric right after each edit too: it is what the others are read by
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
class Report:
    """What some runs found.

    Attributes:
        runs: as read.
        parts: one per model, dataset and regime.
        reference: label of the column that differences are taken from; "" where none are tested.
        located: results of `errata locate` and `errata diff` shown beside them.
    """

    runs: tuple[Run, ...]
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
    def progress(self) -> list[Progress]:
        """How far each run is."""
        return [progress(run) for run in self.runs]

    def terminal(self, width: int = 100) -> RenderableType:
        """Return what `errata report` prints, for a rich console of this width."""
        from errata.bench.report.terminal import terminal

        return terminal(self, width)

    def markdown(self) -> str:
        """Return the report as Markdown: GitHub's tables, no HTML."""
        from errata.bench.report.markdown import markdown

        return markdown(self)

    def html(self, *, cases: int | None = None) -> str:
        """Return one self-contained page; it loads nothing from anywhere.

        Args:
            cases: at most so many cases of each section in the browser of cases; None for all.

        Raises:
            MissingExtraError: jinja2 is not installed.
        """
        from errata.bench.report.page import page

        return page(self, cases)

    def csv(self) -> str:
        """Return every number as a row of a comma-separated table with a header."""
        from errata.bench.report.csv_json import sheet

        return sheet(self)

    def as_json(self) -> dict[str, Any]:
        """Return the tables as plain JSON data, without single answers."""
        from errata.bench.report.csv_json import as_json

        return as_json(self)

    def plots(self, folder: str | Path) -> list[Path]:
        """Draw the curves and bars for a paper, each as PNG and SVG; return the files.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from errata.bench.report.plots import draw

        return draw(self, Path(folder))


def read(
    *directories: str | Path,
    reference: str | None = None,
    skip_bad: bool = False,
    located: Sequence[str | Path] = (),
) -> Report:
    """Read run directories into one report.

    Runs of one configuration that differ in their seeds are pooled; different configurations
    stand side by side.

    Args:
        *directories: that `errata bench` wrote.
        reference: label of the column that the others are compared with; by default the base.
        skip_bad: leave damaged lines out; the report names them.
        located: files that `errata locate --json` or `errata diff --json` wrote; with them a
            report needs no directory.

    Raises:
        ConfigError: nothing to read, one that is no run, an empty run, or one seed twice.
        IntegrityError: a damaged file, or one of another schema version.
        UnknownNameError: no column is called `reference`.
        MissingExtraError: a reference is given, but scipy, which tests differences, is missing.
    """
    if not directories and not located:
        raise ConfigError("Which runs? Give at least one directory that `errata bench` wrote.")
    places = tuple(read_located(path) for path in dict.fromkeys(map(Path, located)))
    folders = {Path(folder).resolve(): Path(folder) for folder in directories}
    runs = tuple(read_run(folder, skip_bad=skip_bad) for folder in folders.values())
    found = sections(runs)
    wanted = _reference(found, reference) if _testable(reference) else ""
    return Report(runs, tuple(_part(section, wanted) for section in found), wanted, places)


def _part(section: Section, reference: str) -> Part:
    return Part(
        section,
        tuple(tables(section, reference)),
        tuple(curves(section)),
        tuple(error_counts(section)),
        tuple(costs(section)),
        tuple(failures(section)),
        tuple(refusals(section)),
    )


def _testable(reference: str | None) -> bool:
    """Say whether differences can be tested; raise where they were asked for but cannot."""
    if importlib.util.find_spec("scipy") is not None:
        return True
    if reference is not None:
        raise MissingExtraError("Testing differences from a reference", "scipy", "measure")
    return False


def _reference(found: Sequence[Section], wanted: str | None) -> str:
    if wanted is None:
        return BASE
    labels = {column.label for section in found for column in section.columns}
    if wanted not in labels:
        raise UnknownNameError("column", wanted, labels)
    return wanted


def _headlines(table: Table) -> list[Row]:
    """Return the rows of a table to look at first; none of what is only a cost."""
    from errata.bench.report.formatting import HEADLINE_METRICS

    rows = [row for row in table.rows if row.unit not in ("bytes", "s", "seconds")]
    by_name = {row.metric: row for row in rows}
    return [by_name[name] for name in HEADLINE_METRICS if name in by_name] or rows[:1]


def _moments(one: Headline) -> list[str]:
    return [head.moment for head in one.table.heads]


def _headline(section: Section, table: Table, row: Row, moment: str) -> Headline:
    cells: list[Cell | None] = [None] * len(section.columns)
    for head, cell in zip(table.heads, row.cells, strict=True):
        if head.moment == moment or section.columns[head.column].is_base:
            cells[head.column] = cell
    return Headline(table, row, moment, tuple(cells))
