"""Figures for papers: retention curves and bars with intervals, each as PNG and SVG."""

from __future__ import annotations

import math
import re
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.report import formatting
from errata.bench.report.errors_and_costs import error_order, error_types
from errata.bench.report.grouping import FINAL
from errata.edits.outputs import PNG, SVG, write_file
from errata.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from errata.bench.report.contents import ReportContents
    from errata.bench.report.curves import Curve
    from errata.bench.report.errors_and_costs import ErrorCounts
    from errata.bench.report.tables import ColumnHead, MetricTable

COLOURS = (
    "#0072b2", "#d55e00", "#007a5a", "#a8467f", "#8a6d00", "#3c8dbc", "#6b4fa0", "#4d4d4d",
)  # fmt: skip
ERROR_COLOURS = ("#007a5a", "#6b4fa0", "#8a6d00", "#3c8dbc", "#b8bcc2", "#4d4d4d")
"""One for each entry of `error_order`."""
MARKERS = "osD^vP*X"
DASHES = ("-", "--", ":", "-.")
WIDTH, HEIGHT = 4.2, 2.9
"""Inches: a column of a two-column page, with room for a legend."""
MADE_BY = {"png": {"Software": "errata"}, "svg": {"Date": None, "Creator": "errata"}}
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "errata",  # the same figure is the same file
    "savefig.bbox": "tight",
    "savefig.dpi": 200,
}


def draw(report: ReportContents, folder: Path) -> list[Path]:
    """Draw every curve, and bars per protocol and of error types; return the files.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("Drawing plots", "matplotlib", "report") from error

    written: list[Path] = []
    taken: set[str] = set()

    def save(figure: Any, *names: str) -> None:
        stem = free = _slug(*names)
        number = 1
        while free in taken:
            number += 1
            free = f"{stem}-{number}"
        taken.add(free)
        for suffix in ("png", "svg"):
            path = folder / f"{free}.{suffix}"
            buffer = BytesIO()
            figure.savefig(buffer, format=suffix, metadata=MADE_BY[suffix])
            written.append(write_file(path, buffer.getvalue(), SVG if suffix == "svg" else PNG))

    def new(height: float = HEIGHT, panels: int = 1) -> tuple[Any, Any]:
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasAgg(figure)
        return figure, figure.subplots(panels, sharex=True, squeeze=False)[:, 0]

    with matplotlib.rc_context(STYLE):
        for part in report.parts:
            about = (part.section.dataset, part.section.regime)
            for curve in part.curves:
                figure, (axes,) = new()
                _curve(axes, curve)
                save(figure, *about, "curve", curve.metric)
            for table in part.tables:
                rows = _share_rows(table)
                if rows:
                    figure, (axes,) = new(0.9 + 0.16 * len(rows) * len(_drawn(table)))
                    _bars(axes, table, rows)
                    save(figure, *about, "bars", table.protocol)
            for moment in dict.fromkeys(one.moment for one in part.errors):
                counts = [one for one in part.errors if one.moment == moment]
                labels = list(dict.fromkeys(one.label for one in counts))
                metrics = list(dict.fromkeys(one.metric for one in counts))
                height = (0.7 + 0.16 * len(labels)) * len(metrics)
                figure, panels = new(height, len(metrics))
                for axes, metric in zip(panels, metrics, strict=True):
                    _errors(axes, [one for one in counts if one.metric == metric], labels)
                _name_errors(panels[0], error_types(counts))
                panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
                panels[-1].set_xlabel("share of answers")
                figure.tight_layout()
                save(figure, *about, "errors", "" if moment == FINAL else moment)
    return written


def _errors(axes: Any, counts: Sequence[ErrorCounts], labels: Sequence[str]) -> None:
    """Draw one stacked bar per column: how many answers are right, and what is wrong with others.

    The figure of Zhang et al. 2024 ("A Comprehensive Study of Knowledge Editing").
    """
    for one in counts:
        at, left = labels.index(one.label), 0.0
        for kind, colour in zip(error_order(), ERROR_COLOURS, strict=True):
            share = one.counts.get(kind, 0) / one.total
            axes.barh(at, share, left=left, height=0.72, color=colour, linewidth=0)
            left += share
    axes.set_title(f"{counts[0].metric} (n = {counts[0].total})", fontsize=8, loc="left")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")


def _name_errors(axes: Any, kinds: Sequence[str]) -> None:
    """Give the legend of one panel an entry for each kind of answer of any."""
    colours = dict(zip(error_order(), ERROR_COLOURS, strict=True))
    for kind in kinds:
        axes.barh(0, 0, color=colours[kind], label=formatting.kind(kind))


def _curve(axes: Any, curve: Curve) -> None:
    values = [point.value for line in curve.lines for point in line.points]
    steps = sorted({point.step for line in curve.lines for point in line.points})
    if curve.base is not None:
        axes.axhline(curve.base.value, color="#767b84", linestyle=(0, (4, 4)), linewidth=1,
                     label="base")  # fmt: skip
    for line in curve.lines:
        style = _style(line.column)
        at = [point.step for point in line.points]
        axes.plot(at, [point.value for point in line.points], label=line.label, linewidth=1.4,
                  markersize=4, **style)  # fmt: skip
        there = [(p.step, p.interval) for p in line.points if p.interval]
        axes.fill_between(
            [step for step, _ in there],
            [low for _, (low, _) in there],
            [high for _, (_, high) in there],
            color=style["color"],
            alpha=0.13,
            linewidth=0,
        )
    finite = [value for value in values if math.isfinite(value)]
    if curve.unit == "share" and finite and min(finite) >= 0 and max(finite) <= 1:
        axes.set_ylim(-0.02, 1.02)
    elif finite and min(finite) > 0 and max(finite) / min(finite) >= 50:
        axes.set_yscale("log")
    if steps[0] > 0 and steps[-1] / steps[0] >= 50:
        axes.set_xscale("log")
    elif len(steps) <= 8:
        axes.set_xticks(steps)
    axes.set_xlabel("edits so far")
    axes.set_ylabel(f"{curve.metric} {formatting.ARROWS[curve.direction]}".strip())
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bars(axes: Any, table: MetricTable, rows: Sequence[int]) -> None:
    """Draw a group of bars per metric, a bar per column, the interval as a line on it."""
    drawn = _drawn(table)
    size = 0.8 / len(drawn)
    for place, i in enumerate(drawn):
        head = table.heads[i]
        at = [group - 0.4 + (place + 0.5) * size for group in range(len(rows))]
        cells = [table.rows[number].cells[i] for number in rows]
        axes.barh(
            at,
            [cell.measurement.value if cell else 0.0 for cell in cells],
            height=size * 0.9,
            label=" ".join(filter(None, (head.label, formatting.moment(head.moment)))),
            **_fill(head),
        )
        for where, cell in zip(at, cells, strict=True):
            if cell and cell.measurement.interval:
                axes.plot(cell.measurement.interval, (where, where), color="#222222", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [table.rows[number].metric for number in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{table.protocol}, with 95 % intervals")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _fill(head: ColumnHead) -> dict[str, Any]:
    """Return how a column's bars are filled: hatched where they show the end of a stream."""
    colour = "#b8bcc2" if head.column == 0 else COLOURS[(head.column - 1) % len(COLOURS)]
    if head.moment != FINAL:
        return {"color": colour, "linewidth": 0}
    return {"color": colour, "alpha": 0.55, "hatch": "////", "edgecolor": "white", "linewidth": 0}


def _share_rows(table: MetricTable) -> list[int]:
    """Return which rows are shares: these can stand on one axis."""
    return [
        i
        for i, row in enumerate(table.rows)
        if row.unit == "share"
        and all(0 <= cell.measurement.value <= 1 for cell in row.cells if cell)
    ]


def _drawn(table: MetricTable) -> list[int]:
    """Return the columns that hold anything."""
    return [i for i in range(len(table.heads)) if any(row.cells[i] for row in table.rows)]


def _style(column: int) -> dict[str, Any]:
    place = column - 1
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": DASHES[place % len(DASHES)],
    }


def _slug(*names: str) -> str:
    """Return a file name without anything that a file system or a shell minds."""
    joined = "-".join(name for name in names if name)
    return re.sub(r"[^a-z0-9._]+", "-", joined.lower()).strip("-.")[:120] or "plot"
