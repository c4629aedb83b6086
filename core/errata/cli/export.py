"""Moving edits and models: `export`, `import` and `merge`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.edit_view import edit_json
from errata.cli.prechecks import check_exports, check_model
from errata.cli.session import Session
from errata.edits.formats import EXPORTS, MERGES, writer
from errata.errors import LedgerError

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit

PANEL = "Ship"
BASE = typer.Option(
    "--base", metavar="FILE", help="gguf: the base's own GGUF file, to compare with and copy from."
)


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "export",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata export --out all.errata\n"
            "errata export 3f2a 91bc --out two.errata\n"
            "errata export --format peft --out adapter/\n"
            "errata export 3f2a --format peft --error 0.01 --out small-adapter/\n"
            "errata export 3f2a --format gguf --out edit.gguf"
        ),
    )(export)
    command(
        app,
        "import",
        panel=PANEL,
        shared=MODEL,
        examples="errata import two.errata\nerrata import two.errata --apply --model atlas-gpt2",
    )(import_)
    command(
        app,
        "merge",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata merge --out edited/\n"
            "errata merge --format gguf --type f16 --out edited.gguf\n"
            "errata merge --format gguf --base base.gguf --out edited.gguf"
        ),
    )(merge)


def export(
    session: Session,
    out: Annotated[Path, typer.Option("--out", "-o", help="File or folder to write.")],
    ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="ID", help="Which edits; by default the active ones."),
    ] = None,
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="errata: one file for `errata apply`; peft: a LoRA adapter for PeftModel; gguf: "
            "one for llama.cpp.",
        ),
    ] = "errata",
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", help="At most this many directions per weight."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            "--error", metavar="E", help="As few directions as leave this relative error."
        ),
    ] = None,
    base: Annotated[Path | None, BASE] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what errata wrote there earlier.")
    ] = False,
) -> None:
    """Write edits to one file, or as one LoRA adapter.

    errata applies the file to the same base anywhere. The adapter holds edits that change weights
    of linear modules, from any method; plain PeftModel or llama.cpp loads it. Others are refused.
    """
    from errata.edits.factors import check_factors

    options = given(rank=rank, error=error, base=base)
    if format == "errata" and not options:  # needs no model
        with session.read_ledger(kinds=True) as ledger:
            chosen = [ledger.resolve(name) for name in ids or ()] or ledger.active_ids()
            if not chosen:
                raise LedgerError(
                    "There is nothing to export: no edit is active and none was named."
                )
            path = ledger.export(chosen, out, overwrite=overwrite)
    else:
        writer(EXPORTS, format, options)
        session.check_ids(ids or ())
        _check_kinds(session, ids or (), check_factors if format in ("peft", "gguf") else None)
        with session.editor() as editor:
            chosen = [editor.ledger.resolve(name) for name in ids or editor.model.stack.ids]
            path = editor.export(out, *chosen, format=format, overwrite=overwrite, **options)
    size = sum(f.stat().st_size for f in path.rglob("*")) if path.is_dir() else path.stat().st_size
    if session.json:
        session.emit({"path": str(path), "format": format, "edits": chosen, "bytes": size})
        return
    session.show(
        Text.assemble(
            (str(path), "head"), f"  {render.count(len(chosen), 'edit')}, {render.size(size)}"
        ),
        Text(f"format {format}: {', '.join(chosen)}", style="muted"),
    )


def import_(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file from `errata export`.")],
    apply: Annotated[bool, typer.Option("--apply", help="Put them on the model too.")] = False,
) -> None:
    """Take the edits of a file into the ledger.

    Edits of another model are refused.
    """
    if not file.is_file():
        raise LedgerError(f"There is no file {str(file)!r} to import.")
    check_model(session.model_name())
    check_exports([file])
    with session.editor(create=True, writes=True) as editor:
        show_imported(session, editor, editor.import_(file), apply)


def show_imported(session: Session, editor: Editor, edits: Sequence[Edit], apply: bool) -> None:
    """Put edits that came into the ledger on the model where that is wanted, and show them."""
    if apply:
        active = set(editor.model.stack.ids)
        editor.apply(*(edit for edit in edits if edit.id not in active))
    on = set(editor.model.stack.ids)
    if session.json:
        session.emit(
            {
                "ledger": str(session.ledger),
                "edits": [edit_json(edit, edit.id in on) for edit in edits],
            }
        )
        return
    for edit in edits:
        state = "on the model" if edit.id in on else "off the model"
        session.show(Text.assemble((edit.id, "accent"), f"  {state}  ", render.short_request(edit)))
    session.show(Text(f"{render.count(len(edits), 'edit')} in {session.ledger}", style="muted"))


def merge(
    session: Session,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            "--format", help="checkpoint: a folder for transformers; gguf: a file for llama.cpp."
        ),
    ] = "checkpoint",
    base: Annotated[Path | None, BASE] = None,
    type: Annotated[
        str | None,
        typer.Option("--type", metavar="TYPE", help="gguf: f32, f16, q8_0, q4_1 … of matrices."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what errata wrote there earlier.")
    ] = False,
) -> None:
    """Write the edited model as a Hugging Face checkpoint or a GGUF file.

    The tokenizer is included, and in a folder a model card; transformers or llama.cpp loads it
    without errata. Edits that act while the model runs (a codebook) cannot be merged.
    """
    from errata.model.loading import auto_class
    from errata.ship.hugging_face import check_mergeable

    options = given(base=base, type=type)
    writer(MERGES, format, options)
    _check_kinds(session, None, check_mergeable)
    with session.editor() as editor:
        active = editor.model.stack.ids
        path = editor.merge(out, overwrite=overwrite, format=format, **options)
        loader = auto_class(editor.model.config, editor.model.name).__name__
    if session.json:
        session.emit({"path": str(path), "edits": active})
        return
    session.show(
        Text.assemble((str(path), "head"), f"  {render.count(len(active), 'edit')} merged"),
        Text(
            f'load it with {loader}.from_pretrained("{path}")'
            if path.is_dir()
            else f"load it with llama-cli --model {path}",
            style="muted",
        ),
    )


def _check_kinds(
    session: Session,
    ids: Sequence[str] | None,
    check: Callable[[str, type[Delta]], None] | None,
) -> None:
    """Raise, before a model is loaded, for an edit that cannot leave as it was asked.

    Args:
        session: whose ledger.
        ids: edits to be written, by default the active ones, one at least; None: the active ones,
            if any.
        check: raises for an edit's id and the class of its kind; None: nothing is known of those.
    """
    with session.read_ledger(kinds=True) as ledger:
        chosen = [ledger.resolve(name) for name in ids or ()] or ledger.active_ids()
        if not chosen and ids is not None:
            raise LedgerError("There is nothing to export: no edit is active and none was named.")
        for edit in map(ledger.get, chosen):
            if check is not None and edit.delta_kind in ledger.kinds:
                check(edit.id, ledger.kinds[edit.delta_kind])


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}
