"""The datasets: `datasets` lists what can be read, `datasets NAME PATH` shows what a file holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import OUTPUT, command
from errata.cli.name_values import pairs
from errata.cli.session import Session

if TYPE_CHECKING:
    from errata.datasets import Dataset, DatasetReader
    from errata.edits.request import Request

PANEL = "Catalogue and environment"
PROBES = ("neighbourhood", "locality", "portability", "attribute")
PROMPTS = ("paraphrases", "generation", "examples", "counterexamples")
ROOM = 140
"""Columns that the list takes as a table; in fewer, each dataset gets three lines."""
SHOWN = 5
"""Bad records that are listed one by one."""


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "datasets",
        panel=PANEL,
        shared=OUTPUT,
        examples=(
            "errata datasets\n"
            "errata datasets atlas --limit 3\n"
            "errata datasets counterfact counterfact.json\n"
            "errata datasets knowedit zjunlp/KnowEdit/benchmark/WikiBio/wikibio-test-all.json\n"
            "errata datasets rake counterfact.json --set pararel=pararel/ --skip-bad --json"
        ),
    )(datasets)


def datasets(
    session: Session,
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this dataset's format.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Argument(metavar="PATH", help="File, folder or hub id: show what it holds."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only the first N cases.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="train, test …, where there are several.")
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave out bad records and say which they are.")
    ] = False,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the format (repeatable)."),
    ] = None,
) -> None:
    """List the datasets that can be read, or check a file and show what it holds."""
    from errata.datasets import READERS, load

    if name is None:
        _list(session)
        return
    reader = READERS[name]
    if path is None and reader.needs_path:
        _format(session, reader)
        return
    with session.status(f"Reading {path or name}"):
        data = load(
            name,
            path,
            split=split,
            limit=limit,
            skip_bad=skip_bad,
            **pairs(values or (), "--set"),
        )
        counts = _counts(data)
    _contents(session, data, counts)


# -- what can be read ------------------------------------------------------------------------------


def _list(session: Session) -> None:
    from errata.datasets import READERS
    from errata.errors import PluginError

    rows: list[dict[str, Any]] = []
    for name in READERS:
        try:
            rows.append(_described(READERS[name]))
        except PluginError as error:  # one broken package must not hide the others
            session.say(f"Warning: {error}", style="warn")
    if session.json:
        session.emit({"datasets": rows})
        return
    if session.out.width < ROOM:
        for row in rows:
            measured = ", ".join(row["protocols"])
            session.show(
                Text.assemble((row["name"], "accent"), f"  {row['summary']}"),
                Text(f"    {row['source']}; licence: {row['licence']}", style="muted"),
                Text(f"    measured by default: {measured}", style="muted"),
            )
        return
    grid = render.table(
        ("name", {"no_wrap": True}), ("what it is", {"ratio": 3}), ("published", {"ratio": 3}),
        ("licence", {"ratio": 1}), ("measured by default", {"ratio": 2}),
    )  # fmt: skip
    for row in rows:
        grid.add_row(
            Text(row["name"], style="accent"),
            row["summary"],
            Text(row["source"], style="muted"),
            row["licence"],
            ", ".join(row["protocols"]),
        )
    session.show(grid)
    session.say("errata datasets NAME PATH checks a file and shows what it holds.")


def _described(reader: DatasetReader) -> dict[str, Any]:
    return {
        "name": reader.name,
        "summary": reader.summary,
        "source": reader.source,
        "licence": reader.licence,
        "protocols": list(reader.protocols),
        "options": dict(reader.options),
        "needs_path": reader.needs_path,
    }


def _format(session: Session, reader: DatasetReader) -> None:
    if session.json:
        session.emit(_described(reader))
        return
    session.show(
        render.heading(reader.name, reader.summary),
        render.facts(
            [
                ("published", reader.source),
                ("licence", reader.licence),
                ("measured by default", ", ".join(reader.protocols)),
                *((f"--set {name}=", text or None) for name, text in reader.options.items()),
            ]
        ),
        Text(f"\ncheck a file: errata datasets {reader.name} PATH", style="muted"),
    )


# -- what a file holds -----------------------------------------------------------------------------


def _counts(data: Dataset) -> dict[str, dict[str, int]]:
    """Return how many requests of each kind, and how many probes of each field and type."""
    found: dict[str, Counter[str]] = {"kinds": Counter()}
    for request in data:
        found["kinds"][request.kind] += 1
        for field in PROBES:
            for probe in getattr(request, field):
                found.setdefault(field, Counter())[probe.type or "untyped"] += 1
        for field in PROMPTS:
            if number := len(getattr(request, field)):
                found.setdefault(field, Counter())["prompts"] += number
        if request.relation_view is not None:
            found.setdefault("relation view", Counter())["requests"] += 1
            for probe in request.relation_view.specificity:
                found.setdefault("relation specificity", Counter())[probe.type] += 1
    return {field: dict(counter.most_common()) for field, counter in found.items()}


def _contents(session: Session, data: Dataset, counts: dict[str, dict[str, int]]) -> None:
    first = next(iter(data))
    if session.json:
        session.emit(
            {
                "name": data.name,
                "source": data.source,
                "digest": data.digest,
                "cases": data.case_count,
                "requests": data.size,
                "skipped": data.skipped,
                "problems": [
                    {"index": bad.index, "field": bad.field, "problem": bad.problem}
                    for bad in data.problems
                ],
                "retain": len(data.retain),
                "protocols": list(data.protocols),
                "counts": counts,
                "first": first.model_dump(mode="json"),
            }
        )
        return
    rest = [(field, _sum(found)) for field, found in counts.items() if field != "kinds"]
    session.show(
        render.heading(data.name, Path(data.source).name),
        render.facts(
            [
                ("cases", f"{data.case_count}"),
                ("requests", f"{data.size} ({_sum(counts['kinds'])})"),
                ("left out", str(data.skipped)),
                *rest,
                ("retained probes", str(len(data.retain)) if data.retain else None),
                ("measured by default", ", ".join(data.protocols)),
                ("SHA-256", data.digest),
            ]
        ),
    )
    if data.problems:
        session.show(Text("\nLeft out", style="head"))
        for bad in data.problems[:SHOWN]:
            place = ", ".join(filter(None, [f"record {bad.index}", bad.field]))
            session.show(Text(f"  {place}: {bad.problem}", style="warn"))
        if data.skipped > SHOWN:
            session.show(Text(f"  and {data.skipped - SHOWN} more (--json lists all)"))
    session.show(Text("\nFirst request", style="head"), _pretty(first))


def _sum(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in found.items())


def _pretty(request: Request) -> Text:
    """Return a request as JSON, long lists cut after their second item."""
    fields = request.model_dump(mode="json", exclude_defaults=True)
    return Text(json.dumps(_shortened(fields), indent=2, ensure_ascii=False))


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        short = [_shortened(item) for item in value[:2]]
        return [*short, f"… {len(value) - 2} more"] if len(value) > 2 else short
    return render.quoted(value, 300) if isinstance(value, str) else value
