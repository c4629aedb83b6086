"""The report as Markdown: GitHub's tables, nothing that needs HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from errata.bench.report import formatting, run_facts
from errata.bench.report.errors_and_costs import error_types
from errata.cli.render import count

if TYPE_CHECKING:
    from errata.bench.report.contents import Part, ReportContents
    from errata.bench.report.errors_and_costs import Incident
    from errata.bench.report.tables import MetricCell, MetricTable

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~#&])")


def markdown(report: ReportContents) -> str:
    """Return the report as one Markdown document."""
    blocks = ["# Report", "Made by `errata report`."]
    for run in report.runs:
        blocks.append(_grid(("", run.name), run_facts.facts_of(run)[1:], align="--"))
    blocks += [f"> **Note.** {text(one)}" for one in run_facts.warnings(report)]
    for part in report.parts:
        blocks += _part(part)
    for one in report.located:
        rows = [*one.facts, ("how", one.protocol), ("file", str(one.path))]
        blocks += [f"## {text(one.title)}", _grid(("", ""), rows, align="--")]
    if report.runs:
        blocks.append("## How to repeat it")
    for run in report.runs:
        rows = [(name, f"`{value}`") for name, value in run_facts.identities(run)]
        blocks += [
            f"**{text(run.name)}**: `{run_facts.repeat(run)}` with `run.yaml` holding",
            fenced(run_facts.as_yaml(run), "yaml"),
            _grid(("identity", "digest"), rows, align="--", raw=True),
            _grid(("versions and machine", ""), run_facts.surroundings(run), align="--"),
        ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _part(part: Part) -> list[str]:
    blocks = [f"## {text(part.section.title)}", f"Model: {text(part.section.model)}."]
    if run_facts.unmatched(part):
        blocks.append(f"> **Note.** {text(run_facts.unmatched(part))}")
    blocks += _overview(part)
    for table in part.tables:
        blocks += _table(table)
    blocks += _curves(part)
    blocks += _errors(part)
    if part.costs:
        rows = [(cost.label, *formatting.cost_row(cost)) for cost in part.costs]
        blocks += [
            "### Cost",
            _grid(("column", *formatting.COST_COLUMNS), rows),
            formatting.COST_NOTE,
        ]
    blocks += _incidents("Failures", "failed", part.failures)
    blocks += _incidents("Refused edits", "refused", part.refusals)
    return blocks


def _overview(part: Part) -> list[str]:
    if not part.overview:
        return []
    titles = [
        " ".join(
            [
                h.table.protocol,
                h.row.metric,
                formatting.ARROWS[h.row.direction],
                formatting.moment(h.moment),
            ]
        ).strip()
        for h in part.overview
    ]
    rows = [
        (text(column.label), *(_short(head.cells[i]) for head in part.overview))
        for i, column in enumerate(part.section.columns)
    ]
    note = "How each was measured, intervals and n: in the tables below."
    return ["### At a glance", _grid(("column", *titles), rows, raw=True), note]


def _short(cell: MetricCell | None) -> str:
    if cell is None:
        return formatting.DASH
    value = formatting.value(cell.measurement)
    return f"**{value}** {formatting.BEST}" if cell.best else value


def _table(table: MetricTable) -> list[str]:
    titles = [
        " ".join(filter(None, (h.label, formatting.moment_in(table, h)))) for h in table.heads
    ]
    rows = []
    for row in table.rows:
        how = " ".join(f"\\[{k}\\]" for k in table.numbers(row))
        name = f"{text(row.metric)} {formatting.ARROWS[row.direction]}".strip()
        rows.append((name, *map(_cell, row.cells), row.n, how))
    notes = [f"{k}. {text(note)}" for k, note in enumerate(table.notes, start=1)]
    legend = "; ".join(text(one) for one in formatting.legend(table))
    return [
        f"### {text(table.protocol)}",
        f"{text(formatting.ends(table))}." if formatting.ends(table) else "",
        _grid(("metric", *titles, "n", "how"), rows, raw=True),
        "\n".join(notes),
        f"{legend}." if legend else "",
    ]


def _cell(cell: MetricCell | None) -> str:
    if cell is None:
        return formatting.DASH
    spread = formatting.interval(cell.measurement.interval, cell.measurement.unit)
    sign = formatting.DIFFERS if cell.differs else ""
    return _short(cell) + sign + (f" ({spread})" if spread else "")


def _curves(part: Part) -> list[str]:
    blocks: list[str] = []
    for curve in part.first_curves:
        steps = sorted({point.step for line in curve.lines for point in line.points})
        rows = []
        if curve.base:
            base = formatting.amount(curve.base.value, curve.unit)
            rows.append(("base", *(base for _ in steps)))
        for line in curve.lines:
            found = {
                p.step: " ".join(
                    filter(None, (formatting.amount(p.value, curve.unit), _brackets(p.interval)))
                )
                for p in line.points
            }
            rows.append((line.label, *(found.get(step, formatting.DASH) for step in steps)))
        blocks += [
            f"#### {text(curve.metric)}",
            _grid(("edits so far", *map(str, steps)), rows),
            f"{text(curve.what)}; {text(curve.protocol)}.",
        ]
    left = len(part.curves) - len(part.first_curves)
    if left:
        blocks.append(f"{count(left, 'more curve')}: in the page and in the CSV.")
    return ["### As edits pile up", *blocks] if blocks else []


def _brackets(interval: tuple[float, float] | None) -> str:
    spread = formatting.interval(interval)
    return f"({spread})" if spread else ""


def _errors(part: Part) -> list[str]:
    if not part.errors:
        return []
    kinds = error_types(part.errors)
    rows = [
        (
            one.metric,
            " ".join(filter(None, (one.label, formatting.moment(one.moment)))),
            *(formatting.share(one.counts.get(kind, 0), one.total) for kind in kinds),
            str(one.total),
        )
        for one in part.errors
    ]
    head = ("metric", "column", *map(formatting.kind, kinds), "answers")
    return ["### Error types", _grid(head, rows), formatting.ERRORS_NOTE]


def _incidents(title: str, what: str, found: Sequence[Incident]) -> list[str]:
    if not found:
        return []
    rows = [(one.label, str(one.seed), one.case_id, one.request, one.reason) for one in found]
    head = ("column", "seed", "case", "request", "why")
    return [f"### {title}", f"{run_facts.counted(found, what)}.", _grid(head, rows, align="-----")]


def _grid(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, align: str = "", raw: bool = False
) -> str:
    """Return a table; numbers stand to the right of their column unless `align` is given.

    Args:
        head: the first row, always taken as plain text.
        rows: the others.
        align: a sign per column, "-" for the left.
        raw: the rows are Markdown already.
    """
    rule = ["---" if i == 0 or (align and align[i] == "-") else "--:" for i in range(len(head))]
    lines = [[text(cell) for cell in head], rule]
    lines += [[cell if raw else text(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(plain: str) -> str:
    """Return plain text so that Markdown shows it as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(plain.split()))


def fenced(content: str, language: str) -> str:
    """Return a code block that its content cannot end."""
    fence = "```"
    while fence in content:
        fence += "`"
    return f"{fence}{language}\n{content.rstrip()}\n{fence}"
