"""How a command ends: exit codes, what is said of errors, and the library's warnings."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from errata.cli.render import json_text
from errata.cli.wording import in_options
from errata.errors import EditRefused, ErrataError, PluginError, UnknownNameError

if TYPE_CHECKING:
    from errata.cli.session import Session

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


@contextmanager
def reporting(session: Session) -> Iterator[None]:
    """Turn errors into one message and an exit code; show the library's warnings.

    With --json what anyone else prints (a plugin, say) goes to standard error.
    """
    session.stdout = sys.stdout
    handler = _Warnings(session)
    logger = logging.getLogger("errata")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if session.debug else logging.WARNING)
    try:
        elsewhere = redirect_stdout(sys.stderr) if session.json else nullcontext()
        with warnings.catch_warnings(), elsewhere:
            if not session.debug and not sys.warnoptions:
                warnings.simplefilter("ignore")
            yield
    except ErrataError as error:
        _fail(session, error)
        raise typer.Exit(REFUSED if isinstance(error, EditRefused) else FAILED) from None
    except KeyboardInterrupt:
        session.err.print(
            "Interrupted. The model and the ledger are as after the last finished step."
        )
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError):  # `errata log | head`: nobody reads any more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(OK) from None
        _fail(session, error)
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # a bug, here or in a plugin
        _fail(session, error)
        raise typer.Exit(FAILED) from None
    except SystemExit as error:  # no command exits so: code that is not errata's does
        _fail(session, PluginError(f"A plugin or library called sys.exit({error.code!r})."))
        raise typer.Exit(FAILED) from None
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _fail(session: Session, error: Exception) -> None:
    if session.debug:
        session.err.print_exception(show_locals=False)
    if session.json:
        typer.echo(json_text({"error": describe(error)}), err=True)
        return
    label, message = "Error: ", in_options(str(error))
    if isinstance(error, EditRefused):
        label = "Refused: "
        kept = "; the refusal is in the ledger (errata log --refused)" * error.recorded
        message = (
            f"{error.reason}. Nothing of it is on the model{kept}. Accept it {_accepting(error)}."
        )
    elif not isinstance(error, (ErrataError, OSError)):
        label = f"Unexpected {type(error).__name__}: "
        message += " (a bug in errata or in a plugin; --debug shows where)"
    session.err.print(Text.assemble((label, "bad"), message))


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
