"""The report on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Group
from rich.text import Text

from errata.bench.report import formatting, run_facts
from errata.bench.report.errors_and_costs import error_types
from errata.cli.render import facts, heading, quoted, table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from errata.bench.report.contents import Part, ReportContents
    from errata.bench.report.errors_and_costs import Incident
    from errata.bench.report.tables import MetricCell, MetricTable

RIGHT: dict[str, Any] = {"justify": "right", "no_wrap": True}
NAME: dict[str, Any] = {"no_wrap": True}
GAP = 2
"""Between two columns: the padding, and the line that is not drawn."""
LISTED = 10
"""Failures and refusals that are listed; the page and --json have them all."""


def terminal(report: ReportContents, width: int) -> RenderableType:
    """Return the whole report for a console of this width."""
    things: list[RenderableType] = []
    for run in report.runs:
        things += [heading(run.name, str(run.path)), facts(run_facts.facts_of(run)), Text()]
    said = run_facts.warnings(report)
    things += [Text.assemble(("Note: ", "warn"), one) for one in said]
    things += [Text()] if said else []
    for part in report.parts:
        things += _part(part, width)
    for one in report.located:
        things += [heading(one.title, str(one.path)), facts([*one.facts, ("how", one.protocol)]),
                   Text()]  # fmt: skip
    return Group(*things)


def summary(report: ReportContents, width: int) -> RenderableType:
    """Return what is shown when a run ends: the numbers to look at first, with intervals."""
    things: list[RenderableType] = []
    for part in report.parts:
        things += [heading(part.section.title, part.section.model), *_summary(part, width), Text()]
    return Group(*things)


def _summary(part: Part, width: int) -> list[RenderableType]:
    labels = [f"{head.row.metric} {formatting.ARROWS[head.row.direction]}" for head in part.summary]
    moments = [formatting.moment(head.moment) for head in part.summary]
    taken = max((len(text) for text in (*labels, *moments)), default=0) + 2 + GAP
    taken += max((len(head.row.n) for head in part.summary), default=0)
    columns = part.section.columns
    texts = [[_cell(head.cells[i]) for head in part.summary] for i in range(len(columns))]
    sizes = [
        max(_width(column.label), *(_width(text.plain) for text in found)) + GAP
        for column, found in zip(columns, texts, strict=True)
    ]
    made: list[RenderableType] = []
    for block in _blocks(sizes, width - taken):
        grid = table(("metric", NAME), *((columns[i].label, RIGHT) for i in block), ("n", RIGHT))
        before = ""
        for place, head in enumerate(part.summary):
            if head.table.protocol != before:
                before = head.table.protocol
                grid.add_row(Text(before, style="muted"))
            name = Text.assemble(f"  {labels[place]}")
            if moments[place]:
                name.append(f"\n  {moments[place]}", style="muted")
            grid.add_row(name, *(texts[i][place] for i in block), head.row.n)
        made.append(grid)
    cells = [cell for head in part.summary for cell in head.cells if cell]
    reference = part.summary[0].table.reference if part.summary else ""
    below = "; ".join(formatting.signs(cells, reference))
    return [*made, Text(below, style="muted")]


def _part(part: Part, width: int) -> list[RenderableType]:
    things: list[RenderableType] = [
        heading(part.section.title, part.section.model),
        Text("─" * min(width, 100), style="muted"),
    ]
    if run_facts.unmatched(part):
        things.append(Text.assemble(("Note: ", "warn"), run_facts.unmatched(part)))
    things += _overview(part, width)
    for one in part.tables:
        things += [*_table(one, width), Text()]
    things += _curves(part, width)
    things += _errors(part)
    things += _costs(part)
    things += _incidents("Failures", "failed", part.failures)
    things += _incidents("Refused edits", "refused", part.refusals)
    return things


def _overview(part: Part, width: int) -> list[RenderableType]:
    """Return a line per column with the metrics to look at first."""
    made: list[RenderableType] = []
    titles = [
        f"{head.table.protocol}\n{_on_lines(head.row.metric)} "
        f"{formatting.ARROWS[head.row.direction]}\n{formatting.moment(head.moment)}".rstrip()
        for head in part.overview
    ]
    sizes = [
        max(_width(title), *(_width(_short(cell).plain) for cell in head.cells)) + GAP
        for title, head in zip(titles, part.overview, strict=True)
    ]
    labels = max(6, *(cell_len(column.label) for column in part.section.columns)) + GAP
    for block in _blocks(sizes, width - labels, keep=False):
        grid = table(("column", NAME), *((titles[i], RIGHT) for i in block))
        for place, column in enumerate(part.section.columns):
            cells = [part.overview[i].cells[place] for i in block]
            grid.add_row(column.label, *(_short(cell) for cell in cells))
        made.append(grid)
    if not made:
        return []
    note = Text("How each was measured, intervals and n: in the tables below.", style="muted")
    return [heading("At a glance"), *made, note, Text()]


def _on_lines(metric: str) -> str:
    """Return a metric's name on two lines, broken at its last underscore."""
    first, sign, last = metric.rpartition("_")
    return f"{first}{sign}\n{last}" if sign else metric


def _short(cell: MetricCell | None) -> Text:
    if cell is None:
        return Text(formatting.DASH, style="muted")
    star = f"{formatting.BEST} " if cell.best else ""
    return Text.assemble(
        (star, "accent"), (formatting.value(cell.measurement), "new" if star else "")
    )


def _table(one: MetricTable, width: int) -> list[RenderableType]:
    """Return a protocol's table; in blocks of columns where they do not fit side by side."""
    how = [" ".join(f"[{k}]" for k in one.numbers(row)) for row in one.rows]
    taken = max(len(row.metric) for row in one.rows) + 2 + GAP
    taken += max(len(row.n) for row in one.rows) + GAP + max(4, *map(len, how))
    texts = [[_cell(row.cells[i]) for row in one.rows] for i in range(len(one.heads))]
    titles = [f"{head.label}\n{formatting.moment_in(one, head)}".rstrip("\n") for head in one.heads]
    sizes = [
        max(_width(title), *(_width(text.plain) for text in column)) + GAP
        for title, column in zip(titles, texts, strict=True)
    ]
    whole = [head.column for head in one.heads]
    things: list[RenderableType] = [heading(one.protocol, formatting.ends(one))]
    for block in _blocks(sizes, width - taken, groups=whole):
        made = table(
            ("metric", NAME),
            *((titles[i], RIGHT) for i in block),
            ("n", RIGHT),
            ("how", {"min_width": 4}),
        )
        for place, row in enumerate(one.rows):
            made.add_row(
                Text.assemble(row.metric, (f" {formatting.ARROWS[row.direction]}", "muted")),
                *(texts[i][place] for i in block),
                row.n,
                Text(how[place], style="muted"),
            )
        things.append(made)
    below = [f"[{place}] {text}" for place, text in enumerate(one.notes, start=1)]
    things += [Text(text, style="muted") for text in [*below, *formatting.legend(one)]]
    return things


def _blocks(
    sizes: Sequence[int], room: int, *, keep: bool = True, groups: Sequence[int] = ()
) -> list[list[int]]:
    """Return which columns stand side by side.

    Args:
        sizes: width of each column.
        room: width there is.
        keep: whether the first column (the base) stands in every block.
        groups: columns of one group are not torn apart.
    """
    whole: dict[int, list[int]] = {}
    for i in range(len(sizes)):
        whole.setdefault(groups[i] if groups else i, []).append(i)
    units = list(whole.values())
    first = units.pop(0) if keep and units else []
    blocks: list[list[int]] = [list(first)]
    for unit in units:
        used = sum(sizes[i] for i in blocks[-1])
        if used + sum(sizes[i] for i in unit) > room and blocks[-1] != first:
            blocks.append(list(first))
        blocks[-1] += unit
    return [block for block in blocks if block]


def _width(text: str) -> int:
    return max(cell_len(line) for line in text.split("\n"))


def _cell(cell: MetricCell | None) -> Text:
    if cell is None:
        return Text(f"{formatting.DASH} ", style="muted")
    one = cell.measurement
    text = Text.assemble(
        (f"{formatting.BEST} " if cell.best else "", "accent"),
        (formatting.value(one), "new" if cell.best else ""),
        formatting.DIFFERS if cell.differs else " ",
    )
    spread = formatting.interval(one.interval, one.unit)
    return text.append(f"\n{spread} ", style="muted") if spread else text


def _curves(part: Part, width: int) -> list[RenderableType]:
    """Return the overview's metrics after each number of edits."""
    things: list[RenderableType] = []
    for curve in part.first_curves:
        steps = sorted({point.step for line in curve.lines for point in line.points})
        steps = _thinned(steps, max(2, (width - 24) // 8))
        made = table(("edits so far", NAME), *((str(step), RIGHT) for step in steps))
        if curve.base:
            base = formatting.amount(curve.base.value, curve.unit)
            made.add_row("base", *[Text(base, style="muted") for _ in steps])
        for line in curve.lines:
            values = {p.step: formatting.amount(p.value, curve.unit) for p in line.points}
            made.add_row(line.label, *(values.get(step, formatting.DASH) for step in steps))
        how = Text(f"{curve.what}; {curve.protocol}", style="muted")
        things += [heading(f"{curve.metric} as edits pile up"), made, how, Text()]
    return things


def _thinned(steps: Sequence[int], most: int) -> list[int]:
    if len(steps) <= most:
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _errors(part: Part) -> list[RenderableType]:
    if not part.errors:
        return []
    kinds = error_types(part.errors)
    moments = len({one.moment for one in part.errors}) > 1
    made = table(
        ("metric", NAME),
        ("column", NAME),
        *([("when", NAME)] if moments else []),
        *((formatting.kind(kind).replace(" ", "\n", 1), RIGHT) for kind in kinds),
        ("answers", RIGHT),
    )
    before = ""
    for one in part.errors:
        made.add_row(
            one.metric if one.metric != before else "",
            one.label,
            *([formatting.moment(one.moment)] if moments else []),
            *(formatting.share(one.counts.get(kind, 0), one.total) for kind in kinds),
            str(one.total),
        )
        before = one.metric
    return [heading("Error types"), made, Text(formatting.ERRORS_NOTE, style="muted"), Text()]


def _costs(part: Part) -> list[RenderableType]:
    if not part.costs:
        return []
    titles = [
        name.replace(" per", "\nper").replace("peak ", "peak\n") for name in formatting.COST_COLUMNS
    ]
    made = table(("column", NAME), *((title, RIGHT) for title in titles))
    for cost in part.costs:
        made.add_row(cost.label, *(t.replace(" (", "\n(") for t in formatting.cost_row(cost)))
    return [heading("Cost"), made, Text(formatting.COST_NOTE, style="muted"), Text()]


def _incidents(title: str, what: str, found: Sequence[Incident]) -> list[RenderableType]:
    if not found:
        return []
    made = table(("column", NAME), "case", ("request", {"ratio": 1}), ("why", {"ratio": 1}))
    for one in found[:LISTED]:
        made.add_row(
            Text(one.label), Text(one.case_id), Text(quoted(one.request, 80)),
            Text(quoted(one.reason, 160)),
        )  # fmt: skip
    things: list[RenderableType] = [heading(title, run_facts.counted(found, what)), made]
    if len(found) > LISTED:
        more = f"… and {len(found) - LISTED} more: --json or --html FILE lists all."
        things.append(Text(more, style="muted"))
    return [*things, Text()]
