"""What a command works with: its shared options, two consoles, the ledger and its model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.text import Text

from errata.cli.one_writer import one_writer
from errata.cli.prechecks import check_opening
from errata.cli.progress import ConsoleProgress
from errata.cli.render import console, json_text
from errata.edits.ledger.model_note import model_of
from errata.errors import ConfigError, LedgerError, first_few

if TYPE_CHECKING:
    from typing import TextIO

    from rich.console import Console

    from errata.editor import Editor
    from errata.edits.ledger import Ledger

DEFAULT_LEDGER = Path("errata-ledger")


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
    stdout: TextIO | None = None  # where results go while standard output is redirected

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
        typer.echo(json_text(data, indent=2), file=self.stdout)

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
        from errata.edits.ledger.schema import holds_ledger

        return holds_ledger(self.ledger)

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
        """Raise, without a model, for an unknown id, or one in the wrong state (active or not).

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


def calm_transformers() -> None:
    """Keep transformers' loading bars and advice off the terminal of this process."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import transformers

    transformers.utils.logging.disable_progress_bar()
