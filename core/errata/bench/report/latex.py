"""The report's tables for a paper: LaTeX with booktabs, a table per protocol of each section."""

from __future__ import annotations

import re
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
    """Return one table: a line per column of the report, metrics side by side, n in the caption."""
    metrics = [f"{text(row.metric)}{_ARROWS[row.direction]}" for row in table.rows]
    lines = [
        " & ".join([_name(table, head), *(_cell(row.cells[place]) for row in table.rows)])
        for place, head in enumerate(table.heads)
    ]
    sizes = "; ".join(f"{text(row.metric)} {text(row.n)}" for row in table.rows)
    said = [
        f"{text(part.section.model)}, {text(part.section.title)}, {text(table.protocol)}",
        *([text(formatting.ends(table))] if formatting.ends(table) else []),
        *_legend(table),
        f"n: {sizes}",
    ]
    label = re.sub(r"[^A-Za-z0-9]+", "-", f"{part.section.title} {table.protocol}").strip("-")
    body = " \\\\\n".join(lines)
    return f"""\\begin{{table}}
\\centering
\\caption{{{". ".join(said)}.}}
\\label{{tab:{label.lower()}}}
\\begin{{tabular}}{{l{"r" * len(table.rows)}}}
\\toprule
{" & ".join(["", *metrics])} \\\\
\\midrule
{body} \\\\
\\bottomrule
\\end{{tabular}}
\\end{{table}}
"""


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
