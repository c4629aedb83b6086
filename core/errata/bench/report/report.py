"""A report: runs read, pooled and compared, and shown on a terminal, as a page, text or figures."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.config import BASE
from errata.bench.report.contents import Part, ReportContents
from errata.bench.report.curves import curves
from errata.bench.report.errors_and_costs import costs, error_counts, failures, refusals
from errata.bench.report.grouping import Section, sections
from errata.bench.report.locate_results import read_located
from errata.bench.report.reading import read_run
from errata.bench.report.tables import tables
from errata.errors import ConfigError, MissingExtraError, UnknownNameError

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class Report(ReportContents):
    """What some runs found, and how it is shown."""

    def terminal(self, width: int = 100) -> RenderableType:
        """Return what `errata report` prints, for a rich console of this width."""
        from errata.bench.report.terminal import terminal

        return terminal(self, width)

    def markdown(self) -> str:
        """Return the report as Markdown: GitHub's tables, no HTML."""
        from errata.bench.report.markdown import markdown

        return markdown(self)

    def latex(self) -> str:
        """Return the tables as LaTeX for a paper; they need the package booktabs."""
        from errata.bench.report.latex import latex

        return latex(self)

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
        from errata.bench.report.csv_json import as_csv

        return as_csv(self)

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
