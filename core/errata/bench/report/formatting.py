"""How a report's numbers and tables are worded, the same on every medium."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.bench.report.tables import MOMENT_NAMES
from errata.cli.render import number, seconds, size

if TYPE_CHECKING:
    from errata.bench.report.errors_and_costs import ColumnCost
    from errata.bench.report.tables import ColumnHead, MetricCell, MetricTable
    from errata.evaluate import Measurement

ARROWS = {"higher": "↑", "lower": "↓", "": ""}
BETTER = {"higher": "higher is better", "lower": "lower is better", "": ""}
BEST, DIFFERS, DASH = "★", "†", "–"


def value(one: Measurement) -> str:
    """Return a measurement's value for people."""
    return amount(one.value, one.unit)


def amount(found: float, unit: str) -> str:
    """Return a number in its unit for people."""
    return size(found) if unit == "bytes" and found == found else plain(found)


def interval(ends: tuple[float, float] | None, unit: str = "") -> str:
    """Return an interval for people; "" without one.

    >>> interval((0.25, 0.5)), interval((-0.25, 0.5))
    ('0.250–0.500', '−0.250 to 0.500')
    """
    if ends is None:
        return ""
    low, high = (size(end) if unit == "bytes" else plain(end) for end in ends)
    return f"{low} to {high}" if ends[0] < 0 else f"{low}{DASH}{high}"


def plain(value: float) -> str:
    """Return a number with a true minus sign."""
    return number(value).replace("-", "−", 1) if value < 0 else number(value)


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return ("+" if value > 0 else "−" if value < 0 else "±") + number(abs(value))


def probability(p: float) -> str:
    """Return a p-value for people."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def kind(error: str) -> str:
    """Return an error type as it is read: "missing tokens"."""
    return error.replace("_", " ")


def moment(name: str) -> str:
    """Return a moment in words: "right after", "at the end"."""
    return MOMENT_NAMES.get(name, name)


def moment_in(table: MetricTable, head: ColumnHead) -> str:
    """Return a column's moment in words; with the number of edits where columns differ in it."""
    return head.when if len(table.ends) > 1 else moment(head.moment)


def ends(table: MetricTable) -> str:
    """Return after how many edits a table's columns end; "" outside streams."""
    if not table.ends:
        return ""
    if len(table.ends) == 1:
        return f"at the end: after {table.ends[0]} edits"
    return "at the end: after different numbers of edits, so no column is called the best there"


def share(found: int, total: int) -> str:
    """Return a share in per cent."""
    return f"{100 * found / total:.0f} %" if total else DASH


def seeds(found: Sequence[int]) -> str:
    """Return which seeds, for people.

    >>> seeds([0]), seeds([0, 1, 2, 3])
    ('seed 0', 'seeds 0, 1, 2, 3')
    """
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))}"


def legend(table: MetricTable) -> list[str]:
    """Return what the signs of a table mean, and how its differences were tested."""
    return signs([cell for row in table.rows for cell in row.cells if cell], table.reference)


def signs(cells: Sequence[MetricCell], reference: str) -> list[str]:
    """Return what the signs beside some numbers mean, and how differences were tested.

    Args:
        cells: the numbers.
        reference: label of the column that they were compared with.
    """
    said = []
    if any(cell.best for cell in cells):
        said.append(f"{BEST} best of the edited columns")
    if any(cell.measurement.interval for cell in cells):
        said.append("ranges are 95 % intervals")
    tests = sorted({cell.difference.test for cell in cells if cell.difference})
    if tests:
        shown = (
            f"{DIFFERS} differs from" if any(c.differs for c in cells) else "nothing differs from"
        )
        said.append(
            f"{shown} {reference} at p < 0.05: paired by case, {' or '.join(tests)}, "
            "adjusted for the number of columns (Holm)"
        )
    return said


def cost_row(cost: ColumnCost) -> list[str]:
    """Return a cost as texts, in the order of `COST_COLUMNS`."""
    spread = cost.seconds and cost.seconds.interval
    return [
        str(cost.cases),
        str(cost.edits),
        f"{seconds(cost.seconds.value)}"
        + (f" ({seconds(spread[0])}{DASH}{seconds(spread[1])})" if spread else "")
        if cost.seconds
        else DASH,
        seconds(cost.median) if cost.median is not None else DASH,
        size(cost.size.value) if cost.size else DASH,
        size(cost.peak) if cost.peak is not None else DASH,
        seconds(cost.measuring) if cost.measuring else DASH,
    ]


ERRORS_NOTE = (
    "Share of all single answers (not of cases). The error types are those of Zhang et al. 2024, "
    "told apart by rule: docs/protocols.md."
)
COST_COLUMNS = (
    "cases", "edits", "time per case", "median", "size per case", "peak memory", "measuring",
)  # fmt: skip
COST_NOTE = (
    "Time per case: wall-clock time of computing its edit on the machine named in this report (its "
    "share, where several were edited at once), mean with 95 % interval over edits, those of the "
    "same cases with several seeds averaged first; size: its share of the stored edit; peak "
    "memory: the highest that was recorded; measuring: time spent on questions, in all."
)
