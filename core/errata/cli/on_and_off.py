"""Which edits are on the model: `revert`, `apply`, `rebase` and `resolve`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.edits import PANEL
from errata.cli.name_values import pairs
from errata.cli.prechecks import check_exports, check_model
from errata.cli.session import Session
from errata.common.arguments import names_file
from errata.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.edit import Edit

REPLACES = ("rebased", "resolved")


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "revert",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata revert 3f2a9c01d7e4\nerrata revert 3f2a 91bc\n"
            "errata revert 3f2a --restore\nerrata revert --all"
        ),
    )(revert)
    command(
        app,
        "apply",
        panel=PANEL,
        shared=MODEL,
        examples="errata apply 3f2a\nerrata apply capital.errata --model atlas-gpt2",
    )(apply)
    command(
        app,
        "rebase",
        panel=PANEL,
        shared=MODEL,
        examples="errata rebase\nerrata rebase 3f2a",
    )(rebase)
    command(
        app,
        "resolve",
        panel=PANEL,
        shared=MODEL,
        examples="errata resolve --set second_moment_weight=1500\n"
        "errata resolve --set relative_weight=1\n"
        "errata resolve --set tokens=50000",
    )(resolve)


def revert(
    session: Session,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="ID", help="Ids, or unique beginnings.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every active edit.")] = False,
    restore: Annotated[
        bool, typer.Option("--restore", help="Put back on what these edits had superseded.")
    ] = False,
) -> None:
    """Take edits off the model, in any order.

    The others stay bit for bit as they are. The edits stay in the ledger: `errata apply` puts
    them on again.
    """
    if bool(ids) == everything:
        raise LedgerError("Say which edits to revert: their ids, or --all.")
    _need_ledger(session)
    session.check_ids(ids or (), active=True)
    with session.editor(writes=True) as editor:
        wanted = list(ids or editor.ledger.active_ids())  # those not on the model, too
        before = set(editor.model.stack.ids)
        taken = editor.revert(*wanted, restore=restore) if wanted else []
        back = [edit for edit in editor.model.stack.entries if edit.id not in before]
        _changed(session, editor, {"reverted": taken, **({"restored": back} if restore else {})})


def apply(
    session: Session,
    what: Annotated[
        list[str], typer.Argument(metavar="ID|FILE", help="Ids of recorded edits, or files.")
    ],
) -> None:
    """Put recorded edits, or those of a file, on the model."""
    files = [Path(item) for item in what if names_file(item)]
    if not files:
        _need_ledger(session)
        session.check_ids(what, active=False)
    check_model(session.model_name())
    check_exports(files)
    with session.editor(create=bool(files), writes=True) as editor:
        _changed(session, editor, {"applied": editor.apply(*what)})


def rebase(
    session: Session,
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Ids, or unique beginnings; by default all stale edits."),
    ] = None,
) -> None:
    """Compute edits again on top of what is on the model now.

    Use it for edits that `errata log` calls stale: they were made on top of one that is now off.
    They, and what was made on top of them, are taken off and made again, in their order, from the
    same requests and hyper-parameters, all or nothing; the old records stay in the ledger.
    """
    _need_ledger(session)
    session.check_ids(ids or (), active=True)
    with session.editor(writes=True) as editor:
        made = editor.rebase(*(ids or ()))
        if not made and not session.json:
            session.show("Nothing is stale.")
        _changed(session, editor, {"rebased": made})


def resolve(
    session: Session,
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID", help="Ids, or unique beginnings; by default all edits that can be."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter (repeatable)."),
    ] = None,
) -> None:
    """Solve edits again with another λ, null space or C, without computing their values anew.

    Joint edits (memit, emmet, pmet, alphaedit) store what they want at which keys; λ decides how
    far ordinary text holds them back. A stream of thousands wants another λ than ten edits: this
    changes it in seconds. `tokens` takes C from more text. All or nothing; the old records stay in
    the ledger.
    """
    _need_ledger(session)
    session.check_ids(ids or (), active=True)
    given = pairs(settings or (), "--set")
    if not given:
        raise ConfigError("Say what to solve with, for example --set second_moment_weight=1500.")
    with session.editor(writes=True) as editor:
        made = editor.resolve(*(ids or ()), **given)
        if not made and not session.json:
            session.show("No active edit can be solved again with that.")
        _changed(session, editor, {"resolved": made})


def _need_ledger(session: Session) -> None:
    session.read_ledger().close()


def _changed(session: Session, editor: Editor, done: Mapping[str, Sequence[Edit]]) -> None:
    """Say what was done ("reverted" …) to which edits, and how many are active now."""
    active = editor.model.stack.ids
    if session.json:
        ids = {what: [e.id for e in edits] for what, edits in done.items()}
        replaced = {e.id: e.outcome.rebases for what in REPLACES for e in done.get(what, ())}
        extra = {"replaces": replaced} if replaced else {}
        session.emit({**ids, **extra, "active": active, "model": editor.model.name})
        return
    for what, edits in done.items():
        for one in edits:
            instead = f", was {one.outcome.rebases}" if what in REPLACES else ""
            line = f"  {what}{instead}  "
            session.show(Text.assemble((one.id, "accent"), line, render.short_request(one)))
    state = (
        render.count(len(active), "active edit")
        if active
        else "no edit active: the model is the base again"
    )
    session.show(Text(f"{editor.model.name}: {state}", style="muted"))
