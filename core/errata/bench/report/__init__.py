"""Reports of finished (or half-finished) runs: tables, curves and every single answer.

>>> import errata.bench.report
>>> report = errata.bench.report.read("runs/first")  # doctest: +SKIP
>>> Path("report.html").write_text(report.html(), encoding="utf-8")  # doctest: +SKIP
"""

from errata.bench.report.grouping import Column, Section
from errata.bench.report.reading import Entry, Run, read_run
from errata.bench.report.report import Report, read
from errata.bench.report.tables import Cell, Head, Row, Table

__all__ = [
    "Cell",
    "Column",
    "Entry",
    "Head",
    "Report",
    "Row",
    "Run",
    "Section",
    "Table",
    "read",
    "read_run",
]
