"""The report's tables for a paper: LaTeX with booktabs, a table per protocol of each section."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING

from errata.bench.report import formatting

if TYPE_CHECKING:
    from errata.bench.report.contents import Part, ReportContents
    from errata.bench.report.tables import ColumnHead, MetricCell, MetricTable

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "−": "$-$",
    "–": "--",
    "·": r"\textperiodcentered{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "…": r"\dots{}",
}
_ARROWS = {"higher": r" $\uparrow$", "lower": r" $\downarrow$", "": ""}
SIDE_BY_SIDE = 8
"""Metrics that stand beside each other."""
HEAD = """% Made by `errata report`
% It needs \\usepackage{booktabs}. Each table stands alone: copy what the paper shows.
"""


def latex(report: ReportContents) -> str:
    """Return the tables of a report as LaTeX to be copied or included in a paper."""
    tables = [_table(part, table) for part in report.parts for table in part.tables]
    return "\n".join([HEAD, *tables])


def text(plain: str) -> str:
    """Return plain text so that LaTeX prints it as it is, on one line."""
    return "".join(_SPECIAL.get(sign, sign) for sign in " ".join(plain.split()))


def _table(part: Part, table: MetricTable) -> str:
    """Return one table, with n in the caption.

    A line per column of the report, metrics side by side; or the other way round where so many
    metrics are wider than a page.
    """
    metrics = [f"{text(row.metric)}{_ARROWS[row.direction]}" for row in table.rows]
    columns = [_name(table, head) for head in table.heads]
    cells = [[_cell(row.cells[place]) for row in table.rows] for place in range(len(columns))]
    if len(metrics) > SIDE_BY_SIDE:
        metrics, columns, cells = columns, metrics, [list(row) for row in zip(*cells, strict=True)]
    lines = [" & ".join([name, *row]) for name, row in zip(columns, cells, strict=True)]
    said = [
        f"On {text(part.section.model)}: {text(part.section.title)}, {text(table.protocol)}",
        *([text(formatting.ends(table))] if formatting.ends(table) else []),
        *_legend(table),
        _sizes(table),
    ]
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{part.section.title} {table.protocol}").strip("-")
    body = " \\\\\n".join(lines)
    return f"""\\begin{{table}}
\\centering
\\caption{{{". ".join(one[:1].upper() + one[1:] for one in said)}.}}
\\label{{tab:{label.lower()}}}
\\begin{{tabular}}{{l{"r" * len(metrics)}}}
\\toprule
{" & ".join(["", *metrics])} \\\\
\\midrule
{body} \\\\
\\bottomrule
\\end{{tabular}}
\\end{{table}}
"""


def _sizes(table: MetricTable) -> str:
    """Return the number of cases: the most frequent one, and which metrics have another."""
    usual, _ = Counter(row.n for row in table.rows).most_common(1)[0]
    others: dict[str, list[str]] = {}
    for row in table.rows:
        if row.n != usual:
            others.setdefault(row.n, []).append(row.metric)
    rest = "; ".join(f"{n} for {', '.join(metrics)}" for n, metrics in others.items())
    return f"$n$ = {text(usual)}" + (text(f", but {rest}") if rest else "")


def _name(table: MetricTable, head: ColumnHead) -> str:
    when = formatting.moment_in(table, head)
    return text(f"{head.label}, {when}" if when else head.label)


def _cell(cell: MetricCell | None) -> str:
    """Return a number: the best in bold, a dagger where it differs, its interval small."""
    if cell is None:
        return "--"
    one = cell.measurement
    value = text(formatting.value(one))
    shown = rf"\textbf{{{value}}}" if cell.best else value
    sign = r"$^\dagger$" if cell.differs else ""
    spread = formatting.interval(one.interval, one.unit)
    return f"{shown}{sign}" + (rf" {{\scriptsize ({text(spread)})}}" if spread else "")


def _legend(table: MetricTable) -> list[str]:
    """Return what the signs mean, in those that LaTeX has."""
    said = [text(one) for one in formatting.legend(table)]
    signs = ((f"{formatting.BEST} ", "Bold: "), (formatting.DIFFERS, r"$^\dagger$"))
    for sign, shown in signs:
        said = [one.replace(sign, shown) for one in said]
    return said
