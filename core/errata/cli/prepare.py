"""`errata prepare`: what a method needs of the base, computed before the first edit."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.checks import check_model, check_settings
from errata.cli.edits import check_method, pairs
from errata.cli.requests import read_dataset
from errata.cli.session import MODEL, Session, command


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "prepare",
        panel="Edit",
        shared=MODEL,
        examples=(
            "errata prepare memit --model atlas-gpt2\n"
            "errata prepare rome --model smollm2-135m --set layer=5"
        ),
    )(prepare)


def prepare(
    session: Session,
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of an installed method.")],
    training: Annotated[
        list[str] | None,
        typer.Option(
            "--training",
            metavar="NAME=PATH",
            help="Requests to train on, as a dataset and its file; may be repeated. A method that "
            "is trained is never asked to edit a fact that is among them.",
        ),
    ] = None,
    start: Annotated[
        int, typer.Option("--start", min=0, help="Leave out the first N cases of each dataset.")
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="At most N cases of each dataset, after --start."),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter."),
    ] = None,
) -> None:
    """Compute what a method needs of the base: statistics, contexts, a trained network.

    `errata edit` does the same before the first edit, where it can. The results are kept in the
    cache folder under the model's fingerprint; every later command on that model uses them.
    """
    check_method(method)
    overrides = pairs(values or (), "--set")
    check_model(session.model_name())
    check_settings(method, overrides, session.model_name())
    requests = [
        request
        for given in training or ()
        for request in read_dataset(given, limit, start=start, option="--training").requests()
    ]
    with session.editor(durable=False, training=requests or None) as editor:
        started = time.monotonic()
        editor.prepare(method, overrides)
        seconds = time.monotonic() - started
        folder = editor.model.artifacts.directory
        if session.json:
            session.emit(
                {
                    "method": method,
                    "model": editor.model.name,
                    "training": len(requests),
                    "seconds": seconds,
                    "artifacts": str(folder),
                }
            )
            return
        trained = f", trained on {render.count(len(requests), 'request')}" if requests else ""
        session.show(
            Text(f"{method} is ready for {editor.model.name}{trained} ({render.seconds(seconds)})"),
            Text(f"kept in {folder}", style="muted"),
        )
