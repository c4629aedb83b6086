"""Every number as data: comma-separated rows, and plain JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from errata.bench.report import run_facts

if TYPE_CHECKING:
    from errata.bench.report.contents import Part, ReportContents
    from errata.bench.report.curves import Curve
    from errata.bench.report.errors_and_costs import ColumnCost
    from errata.bench.report.tables import MetricRow, MetricTable

FIELDS = (
    "model", "dataset", "regime", "column", "method", "runs", "seeds", "moment", "after_edits",
    "protocol", "metric", "value", "low", "high", "n", "unit", "direction", "best", "reference",
    "difference", "difference_low", "difference_high", "p", "test", "how",
)  # fmt: skip


def as_csv(report: ReportContents) -> str:
    """Return a table with a header: one row per number, the points of curves after the tables."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, lineterminator="\n")
    writer.writeheader()
    for part in report.parts:
        for row in _rows(part):
            writer.writerow({key: _cell(value) for key, value in row.items()})
    return out.getvalue()


def as_json(report: ReportContents) -> dict[str, Any]:
    """Return the report's tables as plain JSON data; single answers stay in the runs."""
    return {
        "runs": [
            {
                "path": str(run.path),
                "name": run.name,
                "seeds": list(run.seeds),
                "done": progress.done,
                "planned": progress.planned,
                "complete": progress.is_complete,
                "damaged": list(run.damaged),
                "info": dict(run.info),
            }
            for run, progress in zip(report.runs, report.progress, strict=True)
        ],
        "reference": report.reference,
        "warnings": run_facts.warnings(report),
        "sections": [_section(part) for part in report.parts],
        "located": [one.as_json() for one in report.located],
    }


def _rows(part: Part) -> Iterator[dict[str, Any]]:
    for table in part.tables:
        for row in table.rows:
            for head, cell in zip(table.heads, row.cells, strict=True):
                if cell is None:
                    continue
                one, difference = cell.measurement, cell.difference
                yield {
                    **_about(part, head.column),
                    "moment": head.moment,
                    "after_edits": head.steps,
                    "protocol": table.protocol,
                    "metric": row.metric,
                    "value": one.value,
                    **_ends("", one.interval),
                    "n": one.n,
                    "unit": row.unit,
                    "direction": row.direction,
                    "best": cell.best,
                    "reference": table.reference if difference else "",
                    "difference": difference.difference if difference else None,
                    **_ends("difference_", difference.interval if difference else None),
                    "p": cell.p,
                    "test": difference.test if difference else "",
                    "how": row.protocol,
                }
    for curve in part.curves:
        for line in curve.lines:
            for point in line.points:
                yield {
                    **_about(part, line.column),
                    "moment": "checkpoint",
                    "after_edits": point.step,
                    "protocol": curve.protocol.partition(":")[0],
                    "metric": curve.metric,
                    "value": point.value,
                    **_ends("", point.interval),
                    "n": point.n,
                    "unit": curve.unit,
                    "direction": curve.direction,
                    "how": curve.protocol,
                }


def _about(part: Part, index: int) -> dict[str, Any]:
    section = part.section
    column = section.columns[index]
    return {
        "model": section.model,
        "dataset": section.dataset,
        "regime": section.regime,
        "column": column.label,
        "method": column.method,
        "runs": " ".join(column.runs),
        "seeds": " ".join(map(str, column.seeds)),
    }


def _ends(prefix: str, interval: tuple[float, float] | None) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {f"{prefix}low": low, f"{prefix}high": high}


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return int(value)
    return repr(value) if isinstance(value, float) else value


def _section(part: Part) -> dict[str, Any]:
    section = part.section
    return {
        "model": section.model,
        "dataset": section.dataset,
        "regime": section.regime,
        "columns": [
            {
                "label": column.label,
                "method": column.method,
                "variant": column.variant,
                "runs": list(column.runs),
                "seeds": list(column.seeds),
                "cases": column.cases,
                "settings": dict(column.settings),
            }
            for column in section.columns
        ],
        "tables": [_table(table) for table in part.tables],
        "curves": [_curve(curve) for curve in part.curves],
        "errors": [asdict(one) for one in part.errors],
        "costs": [_cost(cost) for cost in part.costs],
        "failures": [asdict(one) for one in part.failures],
        "refusals": [asdict(one) for one in part.refusals],
    }


def _table(table: MetricTable) -> dict[str, Any]:
    return {
        "protocol": table.protocol,
        "reference": table.reference,
        "heads": [asdict(head) for head in table.heads],
        "rows": [_row(row) for row in table.rows],
    }


def _row(row: MetricRow) -> dict[str, Any]:
    return {
        "metric": row.metric,
        "protocol": row.protocol,
        "unit": row.unit,
        "direction": row.direction,
        "cells": [
            {
                **cell.measurement.as_json(cases=False),
                "best": cell.best,
                "difference": cell.difference.as_json() if cell.difference else None,
            }
            if cell
            else None
            for cell in row.cells
        ],
    }


def _curve(curve: Curve) -> dict[str, Any]:
    return {
        "metric": curve.metric,
        "protocol": curve.protocol,
        "unit": curve.unit,
        "direction": curve.direction,
        "of_state": curve.of_state,
        "base": asdict(curve.base) if curve.base else None,
        "lines": [
            {"label": line.label, "points": [asdict(point) for point in line.points]}
            for line in curve.lines
        ],
    }


def _cost(cost: ColumnCost) -> dict[str, Any]:
    return {
        "label": cost.label,
        "edits": cost.edits,
        "cases": cost.cases,
        "seconds": cost.seconds.as_json(cases=False) if cost.seconds else None,
        "median_seconds": cost.median,
        "bytes": cost.size.as_json(cases=False) if cost.size else None,
        "peak_memory": cost.peak,
        "measuring_seconds": cost.measuring,
    }
