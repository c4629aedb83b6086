"""`errata prepare`: what a method needs of the base, computed before the first edit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.name_values import pairs
from errata.cli.prechecks import check_method, check_model, check_settings
from errata.cli.requests import SkipBad, read_dataset
from errata.cli.session import Session

if TYPE_CHECKING:
    from errata.model.model import Model


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
    skip_bad: SkipBad = False,
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
        for request in read_dataset(
            given, limit, start=start, option="--training", skip_bad=skip_bad
        ).requests()
    ]
    with session.editor(durable=False, training=requests or None) as editor:
        started = time.monotonic()
        editor.prepare(method, overrides)
        seconds = time.monotonic() - started
        folder = editor.model.artifacts.directory
        told = [(name, _numbers(about)) for name, about in editor.model.told_of_base()]
        told = [(name, numbers) for name, numbers in told if numbers]
        if session.json:
            session.emit(
                {
                    "method": method,
                    "model": editor.model.name,
                    "training": len(requests),
                    "seconds": seconds,
                    "artifacts": str(folder),
                    "found": [{"name": name, **numbers} for name, numbers in told],
                    "trained": _training(editor.model, method),
                }
            )
            return
        trained = f", trained on {render.count(len(requests), 'request')}" if requests else ""
        session.show(
            Text(f"{method} is ready for {editor.model.name}{trained} ({render.seconds(seconds)})"),
            render.facts([(name, _said(numbers)) for name, numbers in told]),
            Text(f"kept in {folder}", style="muted"),
        )
        if report := _training(editor.model, method):
            session.show("", *_curve(report))


def _numbers(about: Mapping[str, Any]) -> dict[str, int | float]:
    return {name: value for name, value in about.items() if type(value) in (int, float)}


def _said(numbers: Mapping[str, int | float]) -> str:
    """Return numbers with their names in one line."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value if isinstance(value, int) else f'{value:.3f}'}"
        for name, value in sorted(numbers.items())
    )


_ROWS = 10  # validations that are shown; --json has all


def _training(model: Model, method: str) -> dict[str, Any] | None:
    """Return `best` (a step) and `curve` (an entry per validation) of the method's network.

    Both are kept with the network, trained now or earlier; None where there is none.
    """
    for name, about in model.told_of_base():
        if name == method and "curve" in about:
            pairs = ({"step": x[0], "loss": x[1]} if isinstance(x, list) else x
                     for x in about["curve"])  # fmt: skip
            curve = list(pairs)
            best = about.get("best") or min(curve, key=lambda entry: entry["loss"])["step"]
            return {"best": best, "curve": curve}
    return None


def _curve(report: dict[str, Any]) -> list[Any]:
    """Return the last validations and the best one as a table."""
    curve, best = report["curve"], report["best"]
    shown = [e for n, e in enumerate(curve) if n >= len(curve) - _ROWS or e["step"] == best]
    names = ["step", *sorted(shown[0].keys() - {"step"})]  # stored or not, in one order
    left = f", {len(shown)} of {len(curve)} validations" if len(shown) < len(curve) else ""
    table = render.table(*(name.replace("_", " ") for name in names))
    for entry in shown:
        style = "accent" if entry["step"] == best else ""
        cells = [str(entry[n]) if n == "step" else f"{entry[n]:.3f}" for n in names]
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return [render.heading("Training", f"kept: the network after step {best}{left}"), table]
