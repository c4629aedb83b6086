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
from errata.cli.error_reports import CLOSING, EXIT_CODES, USAGE
from errata.cli.render import console, json_text, visible

_JSON = "--json"


class Commands(TyperGroup):
    """The group: lists commands in the order they were added, and the exit codes below them."""

    def make_context(self, info_name: Any, args: list[str], *rest: Any, **extra: Any) -> Any:
        """Read the command line; errors show control characters, as all other output does.

        With --json a wrong command line is said as one JSON object, as every other error is.
        """
        as_json = _JSON in (args[: args.index("--")] if "--" in args else args)
        with _usage_errors(as_json):
            context = super().make_context(info_name, args, *rest, **extra)
        context.meta[_JSON] = as_json
        return context

    def invoke(self, ctx: Any) -> Any:
        """Run the command, with the same care."""
        with _usage_errors(ctx.meta.get(_JSON, False)):
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
def _usage_errors(as_json: bool) -> Iterator[None]:
    try:
        yield
    except typer.Exit:
        raise
    except Exception as error:
        if isinstance(message := getattr(error, "message", None), str):
            error.message = visible(message)  # type: ignore[attr-defined]
        # Only errors of click can say themselves so; which click it is, typer decides.
        if not as_json or not hasattr(error, "format_message"):
            raise
        data = {"error": {"type": "UsageError", "message": error.format_message()}}
        typer.echo(json_text(data), err=True)
        raise typer.Exit(USAGE) from None


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
