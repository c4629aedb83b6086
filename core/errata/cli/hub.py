"""Edits on the Hugging Face hub: `push` and `pull`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from errata.cli.command import MODEL, command
from errata.cli.export import show_imported
from errata.cli.session import Session

PANEL = "Ship"


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "push",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata push me/corrections --base HuggingFaceTB/SmolLM2-135M-Instruct\n"
            "errata push me/adapter 3f2a --format peft --base HuggingFaceTB/SmolLM2-135M-Instruct"
        ),
    )(push)
    command(
        app,
        "pull",
        panel=PANEL,
        shared=MODEL,
        examples="errata pull me/corrections --apply --model smollm2-135m",
    )(pull)


def push(
    session: Session,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub.")],
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Which edits; by default the active ones."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="errata: for `errata pull`; peft, gguf: a LoRA adapter; checkpoint: the model.",
        ),
    ] = "errata",
    base: Annotated[
        str, typer.Option("--base", metavar="OWNER/NAME", help="What the base is called there.")
    ] = "",
    public: Annotated[
        bool, typer.Option("--public", help="Make a new repository that everybody can read.")
    ] = False,
    message: Annotated[str, typer.Option("--message", help="Of the commit.")] = "",
) -> None:
    """Upload edits, or the edited model, to the Hugging Face hub.

    A card goes with them: base, every edit with its measured outcome, how to take it out. Log in
    first with `hf auth login`, or set HF_TOKEN. A new repository is private.
    """
    from errata.ship import hub

    session.read_ledger().close()
    session.check_ids(ids or ())
    with session.editor() as editor:
        address = hub.push(
            editor, repository, *ids or (),
            format=format, base=base, private=not public, message=message,
        )  # fmt: skip
    if session.json:
        session.emit({"repository": repository, "format": format, "url": address})
        return
    session.show(Text.assemble((address, "head"), f"  format {format}"))


def pull(
    session: Session,
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the hub.")],
    revision: Annotated[
        str | None, typer.Option("--revision", help="Branch, tag or commit; by default the newest.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Put them on the model too.")] = False,
) -> None:
    """Take edits from the Hugging Face hub into the ledger.

    They are checked as any file is: edits of another model are refused, nothing is run.
    """
    from errata.ship import hub

    with session.editor(create=True, writes=True) as editor:
        show_imported(session, editor, hub.pull(editor, repository, revision=revision), apply)
