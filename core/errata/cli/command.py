"""How a function becomes a command: shared options, examples on its help page, error reports."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from rich.text import Text
from typer.core import TyperCommand

from errata.cli.error_reports import reporting
from errata.cli.render import console
from errata.cli.session import DEFAULT_LEDGER, Session

Shared = {
    "ledger": (
        Annotated[
            Path,
            typer.Option("--ledger", "-l", envvar="ERRATA_LEDGER", metavar="FOLDER",
                         help="Where edits are kept.", rich_help_panel="Shared options"),
        ],
        DEFAULT_LEDGER,
    ),
    "model": (
        Annotated[
            str | None,
            typer.Option("--model", "-m", envvar="ERRATA_MODEL", metavar="NAME|FOLDER",
                         help="Zoo name, checkpoint folder or hub name; by default the one that "
                              "the ledger belongs to.",
                         rich_help_panel="Shared options"),
        ],
        None,
    ),
    "device": (
        Annotated[
            str | None,
            typer.Option("--device", metavar="DEVICE", envvar="ERRATA_DEVICE",
                         help="cpu, cuda, cuda:1 …", rich_help_panel="Shared options"),
        ],
        None,
    ),
    "dtype": (
        Annotated[
            str | None,
            typer.Option("--dtype", metavar="DTYPE",
                         help="fp32, bf16 …; by default the checkpoint's.",
                         rich_help_panel="Shared options"),
        ],
        None,
    ),
    "trust_remote_code": (
        Annotated[
            bool,
            typer.Option("--trust-remote-code",
                         help="Run Python code that comes with the model. It can do whatever you "
                              "can: only for code that you have read.",
                         rich_help_panel="Shared options"),
        ],
        False,
    ),
    "json": (
        Annotated[
            bool,
            typer.Option("--json", help="Print one JSON object instead of tables.",
                         rich_help_panel="Shared options"),
        ],
        False,
    ),
    "quiet": (
        Annotated[
            bool,
            typer.Option("--quiet", "-q", help="No progress and no warnings.",
                         rich_help_panel="Shared options"),
        ],
        False,
    ),
    "debug": (
        Annotated[
            bool,
            typer.Option("--debug", envvar="ERRATA_DEBUG",
                         help="Show log messages, and the traceback of an error.",
                         rich_help_panel="Shared options"),
        ],
        False,
    ),
}  # fmt: skip
METAVARS: dict[Any, str] = {bool: "", str: "TEXT", int: "N", float: "X", Path: "PATH"}
OUTPUT = ("json", "quiet", "debug")
LEDGER = ("ledger", *OUTPUT)
MODEL = ("ledger", "model", "device", "dtype", "trust_remote_code", *OUTPUT)


class Command(TyperCommand):
    """A command whose help page ends with examples, and which takes no option for a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; refuse an option where another one's value should stand.

        The parser takes it for that value: `--target --dry-run` would make the edit.
        """
        names: set[str] = set()
        valued: dict[str, str] = {}  # name of an option with a value → its long name
        for option in self.get_params(ctx):
            if option.param_type_name == "option":
                own = [*option.opts, *option.secondary_opts]
                names.update(own)
                if not getattr(option, "is_flag", False):
                    valued |= dict.fromkeys(own, max(own, key=len))
        for name, value in pairwise(args[: args.index("--")] if "--" in args else args):
            if name in valued and value in names:
                ctx.fail(
                    f"Option {name!r} has no value: the option {value!r} follows. If that is the "
                    f"value, write {valued[name]}={value}."
                )
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help and the examples."""
        examples, self.epilog = self.epilog, None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.epilog = examples
        if examples:
            out = console()
            out.print(" Examples", style="head")
            for line in examples.splitlines():
                out.print(Text(f"   {line}"), soft_wrap=True)
            out.print()


def command(
    app: typer.Typer, name: str, *, panel: str, shared: Sequence[str], examples: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function `f(session, **options)` as a command with the shared options.

    Args:
        app: where.
        name: of the command.
        panel: heading it stands under on the help page.
        shared: names of the shared options it has.
        examples: command lines for its help page, one a line.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = list(inspect.signature(function).parameters.values())[1:]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(annotation=_with_metavar(hints[p.name]), kind=keyword) for p in own]
        for key in shared:
            annotation, default = Shared[key]
            parameters.append(
                inspect.Parameter(
                    key, keyword, default=default, annotation=_with_metavar(annotation)
                )
            )

        def run(**values: Any) -> None:
            session = Session(**{key: values.pop(key) for key in shared})
            with reporting(session):
                function(session, **values)

        run.__name__ = function.__name__
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        app.command(
            name, cls=Command, help=_help(function), epilog=examples, rich_help_panel=panel
        )(run)
        return function

    return register


def _help(function: Callable[..., None]) -> str:
    """Return a docstring with each paragraph on one line, square brackets shown as they are."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(lines.split()) for lines in paragraphs).replace("[", "\\[")


def _with_metavar(annotation: Any) -> Any:
    """Name what an option takes: versions of typer differ in what they show by themselves."""
    kind, *metadata = get_args(annotation)
    inner = {kind, *get_args(kind)}  # `list[str] | None` has two layers
    inner |= {part for item in tuple(inner) for part in get_args(item)}
    name = next((METAVARS[k] for k in METAVARS if k in inner), None)
    named = []
    for item in metadata:
        if getattr(item, "metavar", "") is None and name is not None:
            item = copy(item)
            item.metavar = name
        named.append(item)
    return Annotated[(kind, *named)]
