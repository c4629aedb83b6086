"""Reports of finished (or half-finished) runs: tables, curves and every single answer.

>>> import errata.bench.report
>>> report = errata.bench.report.read("runs/first")  # doctest: +SKIP
>>> Path("report.html").write_text(report.html(), encoding="utf-8")  # doctest: +SKIP
"""

from errata.bench.report.grouping import Column, Section
from errata.bench.report.reading import ResultEntry, RunResults, read_run
from errata.bench.report.report import Report, read
from errata.bench.report.tables import ColumnHead, MetricCell, MetricRow, MetricTable

__all__ = [
    "Column",
    "ColumnHead",
    "MetricCell",
    "MetricRow",
    "MetricTable",
    "Report",
    "ResultEntry",
    "RunResults",
    "Section",
    "read",
    "read_run",
]
