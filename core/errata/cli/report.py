"""Reading what `errata bench` wrote: `report`. It needs no model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from errata.cli.command import OUTPUT, command
from errata.cli.render import count
from errata.cli.session import Session
from errata.edits.outputs import OwnSign, check_file, write_file
from errata.errors import ConfigError

PANEL = "Measure"
HTML = OwnSign(b"", b'<meta name="generator" content="errata ')
MARKDOWN = OwnSign(b"# Report", b"Made by `errata report`")
LATEX = OwnSign(b"% Made by `errata report`")
CSV = OwnSign(b"model,dataset,regime,column,method,runs,seeds,moment,")


def add(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "report",
        panel=PANEL,
        shared=OUTPUT,
        examples=(
            "errata report runs/first\n"
            "errata report runs/seed-0 runs/seed-1 --html report.html\n"
            "errata report runs/* --reference r-rome --markdown report.md --plots figures\n"
            "errata report runs/first --locate trace.json --locate sweep.json --html report.html"
        ),
    )(report)


def report(
    session: Session,
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Folders of runs.")
    ] = None,
    locate: Annotated[
        list[Path] | None,
        typer.Option(
            "--locate",
            metavar="FILE",
            help="What `errata locate --json` or `errata diff --json` wrote (repeatable).",
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page that works alone.")
    ] = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Write the tables as Markdown."),
    ] = None,
    latex: Annotated[
        Path | None,
        typer.Option("--latex", metavar="FILE", help="Write the tables for a paper (booktabs)."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Write every number as a row.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option("--plots", metavar="FOLDER", help="Draw curves and bars as PNG and SVG."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            "--reference", metavar="COLUMN", help="Test differences from it; by default the base."
        ),
    ] = None,
    cases: Annotated[
        int | None,
        typer.Option("--cases", min=0, help="With --html: at most N cases of each table."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave damaged lines out; the report names them.")
    ] = False,
) -> None:
    """Show what runs of `errata bench` found, and where knowledge lies: tables, a page, figures.

    Runs of one configuration with different seeds are pooled; different configurations stand side
    by side. An unfinished run is reported as far as it got.
    """
    from errata.bench.report import read

    for target, sign in ((html, HTML), (markdown, MARKDOWN), (latex, LATEX), (csv, CSV)):
        if target is not None:
            check_file(target, sign)
    if cases is not None and html is None:
        raise ConfigError("--cases says how many cases the page holds: give --html FILE too.")
    with session.status("Reading the results"):
        found = read(*runs or (), reference=reference, skip_bad=skip_bad, located=locate or ())
    written: list[Path] = []
    with session.status("Writing the report"):
        for target, text, sign in (
            (html, html and found.html(cases=cases), HTML),
            (markdown, markdown and found.markdown(), MARKDOWN),
            (latex, latex and found.latex(), LATEX),
            (csv, csv and found.csv(), CSV),
        ):
            if target is not None:
                written.append(write_file(target, str(text).encode(), sign))
        if plots is not None:
            written += found.plots(plots)
    if session.json:
        session.emit({**found.as_json(), "written": [str(path) for path in written]})
        return
    if not written:
        session.show(found.terminal(session.out.width))
        return
    for target in written[: 8 if len(written) > 9 else None]:
        session.show(Text(str(target)))
    if len(written) > 9:
        session.show(Text(f"… {count(len(written), 'file')} in all", style="muted"))
