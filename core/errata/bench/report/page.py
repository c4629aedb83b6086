"""The report as one page that needs nothing else: styles, script and data are inside it."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, Any

from errata.bench.report import charts, formatting, run_facts
from errata.bench.report.cases import browser, safe_json
from errata.bench.report.errors_and_costs import error_order, error_types
from errata.cli.render import count
from errata.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from errata.bench.report.contents import ReportContents
    from errata.bench.report.tables import MetricCell

TEMPLATES = "templates"


def page(report: ReportContents, cases: int | None = None) -> str:
    """Return the page's HTML.

    Args:
        report: what to show.
        cases: at most so many cases of each section in the browser of cases; None for all.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("The HTML report", "jinja2", "report") from error
    from errata import __version__

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("errata.bench.report", TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    data = browser([part.section for part in report.parts], cases)
    return environment.get_template("page.html").render(
        report=report,
        formatting=formatting,
        run_facts=run_facts,
        count=count,
        mark=lambda column: Markup(charts.mark(column)),
        colour=charts.colour,
        chart=lambda curve: Markup(charts.curve(curve)),
        whisker=whisker,
        error_types=error_types,
        error_place=error_place,
        zip=zip,
        shares=shares,
        style=Markup(_own("page.css")),
        script=Markup(_own("page.js")),
        data=Markup(safe_json(data)),
        results=len(data["rows"]),
        left_out=data["left_out"],
        version=__version__,
    )


def whisker(cell: MetricCell) -> dict[str, float] | None:
    """Return where a share and its interval lie, in per cent; None for other numbers."""
    one = cell.measurement
    if one.unit != "share" or not 0 <= one.value <= 1:
        return None
    low, high = one.interval or (one.value, one.value)
    return {"at": 100 * one.value, "low": 100 * low, "width": 100 * (high - low)}


def shares(counts: Mapping[str, int], kinds: Sequence[str], total: int) -> list[dict[str, Any]]:
    """Return the parts of a stacked bar: what, how many, per cent, and the number of its colour."""
    return [
        {
            "kind": kind,
            "count": counts[kind],
            "share": 100 * counts[kind] / total,
            "place": error_place(kind),
        }
        for kind in kinds
        if counts.get(kind)
    ]


def error_place(kind: str) -> int:
    """Return the number of an error type's colour, the same on every page."""
    known = error_order()
    return known.index(kind) if kind in known else len(known) - 1


def _own(name: str) -> str:
    """Return a file of the package as it is: it is ours, nothing in it is anybody's input."""
    return (resources.files("errata.bench.report") / TEMPLATES / name).read_text(encoding="utf-8")
