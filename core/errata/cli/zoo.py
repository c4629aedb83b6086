"""The models that come with errata: `zoo list`, `zoo path` and `zoo train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.session import OUTPUT, Session, command

PANEL = "Catalogue and environment"


def add(app: typer.Typer) -> None:
    """Add the group of commands of this module."""
    group = typer.Typer(
        help="List, find or train the small models that come with errata.",
        no_args_is_help=True,
        rich_markup_mode="rich",
    )
    command(group, "list", panel="Commands", shared=OUTPUT, examples="errata zoo list")(list_)
    command(group, "path", panel="Commands", shared=OUTPUT, examples="errata zoo path atlas-gpt2")(
        path
    )
    command(
        group,
        "train",
        panel="Commands",
        shared=OUTPUT,
        examples=(
            "errata zoo train gpt2 --out my-model/\n"
            "errata zoo train llama --out my-llama/ --steps 600 --seed 1 --device cuda"
        ),
    )(train)
    app.add_typer(group, name="zoo", rich_help_panel=PANEL)


def list_(session: Session) -> None:
    """List the models of the zoo and where they are."""
    from errata import zoo

    rows = [_row(name) for name in zoo.MODELS]
    if session.json:
        session.emit({"models": rows})
        return
    grid = render.table(
        ("model", {"no_wrap": True}), ("architecture", {"no_wrap": True}),
        ("what it is", {"ratio": 1}), ("size", {"justify": "right", "no_wrap": True}),
    )  # fmt: skip
    for row in rows:
        grid.add_row(
            Text(row["name"], style="accent"),
            row["architecture"],
            row["description"],
            render.size(row["bytes"]) if row["present"] else "not here",
        )
    session.show(grid)
    absent = [row for row in rows if not row["present"]]
    for row in absent:
        session.show(
            Text(
                f"\n{row['name']} is not in this checkout: errata zoo train {row['architecture']} "
                f"--out FOLDER, then --model FOLDER",
                style="muted",
            )
        )


def _row(name: str) -> dict[str, Any]:
    from errata import zoo

    model = zoo.MODELS[name]
    files = [file for file in model.path.rglob("*") if file.is_file()]
    return {
        "name": name,
        "architecture": model.architecture,
        "description": model.description,
        "bytes": sum(file.stat().st_size for file in files),
        "path": str(model.path),
        "present": model.is_present,
    }


def path(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A model of `errata zoo list`.")],
) -> None:
    """Print the folder of a model, for scripts."""
    from errata import zoo

    where = str(zoo.model_path(name))
    if session.json:
        session.emit({"name": name, "path": where})
    else:
        typer.echo(where)


def train(
    session: Session,
    architecture: Annotated[str, typer.Argument(metavar="ARCHITECTURE", help="gpt2 or llama.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Training steps; by default the recipe's.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of world and training.")] = 0,
    device: Annotated[
        str | None, typer.Option("--device", help="cpu or cuda; by default a GPU if there is one.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again instead of going on where it stopped.")
    ] = False,
) -> None:
    """Train a zoo model from the code and text in this package; nothing is downloaded.

    Interrupt it at any time: the same command goes on where it stopped.
    """
    from errata.zoo.train import train as run

    meter = _TrainingMeter(session)
    try:
        where = run(
            architecture,  # type: ignore[arg-type]  # checked there, with a suggestion
            out,
            steps=steps,
            seed=seed,
            device=device,
            resume=not fresh,
            progress=meter,
        )
    finally:
        meter.close()
    if session.json:
        session.emit({"path": str(where), "steps": meter.step, "loss": meter.loss})
        return
    session.show(
        Text.assemble((str(where), "head"), f"  {meter.step} steps, last loss {meter.loss:.3f}"),
        Text(f'use it: errata edit … --model "{where}"', style="muted"),
    )


class _TrainingMeter:
    """Shows training: a bar on a terminal, a line every hundred steps elsewhere."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._bar: Any = None
        self.step = 0
        self.loss = float("nan")

    def __call__(self, step: int, steps: int, loss: float) -> None:
        """Take note of one step."""
        self.step, self.loss = step, loss
        if self._session.quiet:
            return
        if not self._session.err.is_terminal:
            if step % 100 == 0 or step in (1, steps):
                self._session.say(f"step {step} of {steps}, loss {loss:.3f}")
            return
        if self._bar is None:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("Training, loss {task.fields[loss]:.3f}"),
                progress.BarColumn(bar_width=24, complete_style="accent"),
                progress.MofNCompleteColumn(),
                progress.TimeRemainingColumn(),
                console=self._session.err,
                transient=True,
            )
            self._task = self._bar.add_task("", total=steps, loss=loss)
            self._bar.start()
        self._bar.update(self._task, completed=step, loss=loss)

    def close(self) -> None:
        """Take the bar off the terminal."""
        if self._bar is not None:
            self._bar.stop()
