"""What every command shares: its options, where errors go, and the model of a ledger."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer
from rich.text import Text
from typer.core import TyperCommand

from errata.cli.checks import check_opening
from errata.cli.one_writer import one_writer
from errata.cli.progress import ConsoleProgress
from errata.cli.render import console, json_text
from errata.cli.wording import in_options
from errata.edits.ledger.model_note import model_of
from errata.errors import (
    ConfigError,
    EditRefused,
    ErrataError,
    LedgerError,
    PluginError,
    UnknownNameError,
    first_few,
)
from errata.model.json_numbers import finite

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from errata.editor import Editor
    from errata.edits.ledger import Ledger

OK, FAILED, USAGE, REFUSED, DAMAGED, NO_EFFECT, UNTRUE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130
EXIT_CODES = {
    OK: "done",
    FAILED: "an error: what was asked cannot be done; the message says why",
    USAGE: "the command line itself is wrong",
    REFUSED: "a guard refused an edit; nothing of it is on the model",
    DAMAGED: "verification found a problem",
    NO_EFFECT: "an edit was made, but the model does not give the new answer",
    UNTRUE: "a file of facts does not hold (errata check, errata edit --check)",
    INTERRUPTED: "interrupted; everything is as after the last finished step",
}
CLOSING = "Each command has examples: errata COMMAND --help. Documentation: docs/cli.md"

DEFAULT_LEDGER = Path("errata-ledger")

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


@dataclass
class Session:
    """One run of one command: its shared options and its two consoles."""

    ledger: Path = DEFAULT_LEDGER
    model: str | None = None
    device: str | None = None
    dtype: str | None = None
    trust_remote_code: bool = False
    json: bool = False
    quiet: bool = False
    debug: bool = False
    verifying: bool = False  # the command names every problem, so no warning need say it before
    _notes: dict[str, Any] = field(default_factory=dict)
    _stdout: TextIO | None = None

    # -- output ----------------------------------------------------------------------------------

    @cached_property
    def out(self) -> Console:
        """Standard output: results."""
        return console()

    @cached_property
    def err(self) -> Console:
        """Standard error: progress, warnings and errors."""
        return console(stderr=True)

    @cached_property
    def progress(self) -> ConsoleProgress:
        """Where the library reports how far it is."""
        return ConsoleProgress(self.err, self.quiet)

    def emit(self, data: Any) -> None:
        """Print the JSON of a result."""
        typer.echo(json_text(_finite(data), indent=2), file=self._stdout)

    def show(self, *things: Any) -> None:
        """Print text and tables for people, unless JSON was asked for."""
        if not self.json:
            for thing in things:
                self.out.print(thing)

    def say(self, text: str, style: str = "muted") -> None:
        """Print one remark on standard error."""
        if not self.quiet:
            self.err.print(Text(text, style=style))

    # -- ledger and model ------------------------------------------------------------------------

    def has_ledger(self) -> bool:
        """Say whether there is a ledger in the folder."""
        from errata.edits.ledger.schema import DATABASE

        return (self.ledger / DATABASE).is_file()

    def read_ledger(self, kinds: bool = False) -> Ledger:
        """Open the ledger for reading, without a model; deltas can be read only with `kinds`."""
        from errata.edits.ledger import Ledger

        if not self.has_ledger():
            from errata.edits.ledger.files import refuse_lost_database

            refuse_lost_database(self.ledger)
            raise LedgerError(
                f"There is no ledger in {str(self.ledger)!r}: the first `errata edit` makes one; "
                "name another folder with --ledger or the environment variable ERRATA_LEDGER."
            )
        from errata.edits.delta_kinds import DeltaKinds

        return Ledger.open(self.ledger, kinds=DeltaKinds() if kinds else {}, readonly=True)

    def check_ids(self, ids: Sequence[str], *, active: bool | None = None) -> None:
        """Raise, without a model, for an id that is not in the ledger or not as it must be.

        Args:
            ids: as given: whole ids, or their beginnings.
            active: True: they must be on the model; False: they must not; None: either.
        """
        if not ids:
            return
        with self.read_ledger() as ledger:
            found = [ledger.resolve(name) for name in ids]
            on = ledger.active_ids()
        wrong = [name for name in found if active is not None and (name in on) is not active]
        if wrong:
            state = "not active" if active else "already active"
            there = first_few(on) or "none"
            raise LedgerError(f"{first_few(wrong)}: {state}. Active now: {there}.")

    def remembered(self) -> dict[str, Any]:
        """Return what the ledger says about its model: name and dtype; empty if nothing."""
        if not self.has_ledger():
            return {}
        with self.read_ledger() as ledger:
            return model_of(ledger)

    def model_name(self) -> str:
        """Return the model to load: the one asked for, else the ledger's."""
        known = self.remembered()
        name = self.model or known.get("name")
        if not name:
            made = f"{self.ledger} does not name its model. " if self.has_ledger() else ""
            raise ConfigError(
                f"{made}Which model? Give --model (atlas-gpt2 ships with errata; or a checkpoint "
                "folder or hub name), or set ERRATA_MODEL."
            )
        if self.dtype is None and name == known.get("name"):
            self.dtype = known.get("dtype")
        return str(name)

    @contextmanager
    def editor(
        self,
        *,
        create: bool = False,
        durable: bool = True,
        writes: bool = False,
        guards: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Iterator[Editor]:
        """Open the editor on the ledger; without a ledger there, in memory unless `create`.

        Args:
            create: make the ledger when there is none.
            durable: False keeps everything in memory even if there is a ledger.
            writes: the ledger will be changed: wait for other commands that change it.
            guards: passed on.
            **options: other arguments of `errata.Editor`.
        """
        name = self.model_name()
        check_opening(name, self.device, self.dtype)
        folder = self.ledger if durable and (create or self.has_ledger()) else None
        with one_writer(folder, self.status) if folder and writes else nullcontext():
            with self.status(f"Loading {name}"):
                calm_transformers()
                from errata.editor import Editor

                editor = Editor(
                    name,
                    ledger=folder,
                    device=self.device,
                    dtype=self.dtype,
                    guards=guards,
                    progress=self.progress,
                    trust_remote_code=self.trust_remote_code,
                    **options,
                )
            with editor:
                yield editor

    def status(self, text: str) -> AbstractContextManager[None]:
        """Show what is going on while a block without countable steps runs."""
        return self.progress.busy(text)

    # -- errors ----------------------------------------------------------------------------------

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Turn errors into one message and an exit code; show the library's warnings.

        With --json what anyone else prints (a plugin, say) goes to standard error.
        """
        self._stdout = sys.stdout
        handler = _Warnings(self)
        logger = logging.getLogger("errata")
        level = logger.level
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if self.debug else logging.WARNING)
        try:
            elsewhere = redirect_stdout(sys.stderr) if self.json else nullcontext()
            with warnings.catch_warnings(), elsewhere:
                if not self.debug and not sys.warnoptions:
                    warnings.simplefilter("ignore")
                yield
        except ErrataError as error:
            self._fail(error)
            raise typer.Exit(REFUSED if isinstance(error, EditRefused) else FAILED) from None
        except KeyboardInterrupt:
            self.err.print(
                "Interrupted. The model and the ledger are as after the last finished step."
            )
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            if isinstance(error, BrokenPipeError):  # `errata log | head`: nobody reads any more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(OK) from None
            self._fail(error)
            raise typer.Exit(FAILED) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # a bug, here or in a plugin
            self._fail(error)
            raise typer.Exit(FAILED) from None
        except SystemExit as error:  # no command exits so: code that is not errata's does
            self._fail(PluginError(f"A plugin or library called sys.exit({error.code!r})."))
            raise typer.Exit(FAILED) from None
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def _fail(self, error: Exception) -> None:
        if self.debug:
            self.err.print_exception(show_locals=False)
        if self.json:
            typer.echo(json_text(_finite({"error": describe(error)})), err=True)
            return
        label, message = "Error: ", in_options(str(error))
        if isinstance(error, EditRefused):
            label = "Refused: "
            kept = "; the refusal is in the ledger (errata log --refused)" * error.recorded
            message = (
                f"{error.reason}. Nothing of it is on the model{kept}. "
                f"Accept it {_accepting(error)}."
            )
        elif not isinstance(error, (ErrataError, OSError)):
            label = f"Unexpected {type(error).__name__}: "
            message += " (a bug in errata or in a plugin; --debug shows where)"
        self.err.print(Text.assemble((label, "bad"), message))


def _accepting(error: EditRefused) -> str:
    """Return how to keep an edit that was refused: by the guard that measured it."""
    if "facts" in error.measured:
        return "without --refuse"
    guards = {"relative_norm": "norm", **{n: n for n in ("finite", "efficacy", "perplexity")}}
    name = next((guards[key] for key in error.measured if key in guards), "NAME")
    return f"with --guard {name}=warn"


def describe(error: Exception) -> dict[str, Any]:
    """Return an error as JSON data: type, message, and what the type carries besides."""
    data: dict[str, Any] = {"type": type(error).__name__, "message": in_options(str(error))}
    if isinstance(error, UnknownNameError):
        data.update(what=error.what, name=error.name, known=error.known)
    if isinstance(error, EditRefused):
        data.update(reason=error.reason, measured=error.measured)
    done = getattr(error, "done", None)
    if done:
        data["done"] = [edit.id for edit in done]
    return data


def calm_transformers() -> None:
    """Keep transformers' loading bars and advice off the terminal of this process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()


# -- commands --------------------------------------------------------------------------------------


class Command(TyperCommand):
    """A command whose help page ends with examples, one a line."""

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
            with session.reporting():
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


class _Warnings(logging.Handler):
    """Shows the library's warnings (with --debug everything) on standard error."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        if self._session.quiet and record.levelno < logging.ERROR:
            return
        if self._session.verifying and getattr(record, "verified", False):
            return
        style = "warn" if record.levelno >= logging.WARNING else "muted"
        label = f"{record.levelname.capitalize()}: "
        self._session.err.print(Text.assemble((label, style), in_options(record.getMessage())))


def _finite(value: Any) -> Any:
    """Return JSON data in which NaN and infinities are null: strict parsers refuse them."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return finite(value) if isinstance(value, float) else value
