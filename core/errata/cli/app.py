"""All commands in one application."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from errata import __version__
from errata.cli import (
    bench,
    check_facts,
    datasets,
    demo,
    diff,
    doctor,
    edits,
    export,
    history,
    hub,
    measure,
    methods,
    on_and_off,
    prepare,
    report,
    serve,
    zoo,
)
from errata.cli.render import console, visible
from errata.cli.session import CLOSING, EXIT_CODES


class Commands(TyperGroup):
    """The group: lists commands in the order they were added, and the exit codes below them."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        """Read the command line; errors show control characters, as all other output does."""
        with _visible_errors():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with the same care."""
        with _visible_errors():
            return super().invoke(ctx)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help and what the exit codes mean."""
        super().format_help(ctx, formatter)
        out = console()
        out.print(" Exit codes", style="head")
        for code, meaning in EXIT_CODES.items():
            out.print(f" {code:>4}  {meaning}", highlight=False)
        out.print(f"\n {CLOSING}\n", style="muted", highlight=False)


@contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = visible(message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    name="errata",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"errata {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Knowledge editing of language models: edits that can be measured, shipped and taken back."""
    del version


# The order of the help page: from the first look to shipping.
demo.add(app)
edits.add(app)
on_and_off.add(app)
history.add(app)
prepare.add(app)
measure.add(app)
check_facts.add(app)
diff.add(app)
bench.add(app)
report.add(app)
export.add(app)
hub.add(app)
serve.add(app)
methods.add(app)
datasets.add(app)
zoo.add(app)
doctor.add(app)
