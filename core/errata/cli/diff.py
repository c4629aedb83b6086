"""`errata diff`: what lies between two states of a stack, weight by weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.pictures import beside, check_plot, say_pictures
from errata.cli.session import Session
from errata.errors import ConfigError, LedgerError, UnknownNameError, first_few

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.edit import Edit
    from errata.edits.ledger import Ledger
    from errata.locate.weights import WeightChange, WeightDiff

PANEL = "Look"
GROUPS = ("edits", "methods")


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "diff",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata diff\n"
            "errata diff base 3f2a\n"
            "errata diff 3f2a 3f2a,91bc --json\n"
            "errata diff base all --overlap methods\n"
            "errata diff --overlap edits --plot change.png"
        ),
    )(diff)


def diff(
    session: Session,
    before: Annotated[
        str,
        typer.Argument(
            metavar="STATE",
            help="base, now, all (every edit of the ledger), a method's name (all edits by it), "
            "or ids of edits, separated by commas.",
        ),
    ] = "base",
    after: Annotated[
        str, typer.Argument(metavar="STATE", help="The other state, in the same way.")
    ] = "now",
    overlap: Annotated[
        str,
        typer.Option("--overlap", help="Also compare the changes of single edits, or methods."),
    ] = "",
    top: Annotated[
        int, typer.Option("--top", min=1, help="Singular directions of W to compare with.")
    ] = 10,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
) -> None:
    """Compare two states of the model's stack, weight by weight.

    For every parameter that differs: how large the change is, its rank and spectrum, and whether
    it lies in the base weight's main directions. With --overlap, each edit (or method) is also
    looked at alone, and compared with the others. Nothing is applied or reverted, and edits need
    not be on the model: `errata edit --no-apply` records some to compare.
    """
    if overlap and overlap not in GROUPS:
        raise UnknownNameError("grouping of edits", overlap, GROUPS)
    if plot is not None:
        check_plot(plot)
    with session.read_ledger() as ledger:
        for text in (before, after):
            _named(ledger, text)
    with session.editor() as editor:
        from errata.locate.weights import weight_diff

        states = _state(editor, before), _state(editor, after)
        ids = dict.fromkeys(edit.id for state in states for edit in state)
        groups = _groups(editor, list(ids), overlap)
        found = weight_diff(editor.model, *states, names=(before, after), groups=groups, top=top)
        name = editor.model.name
    drawn: list[Path] = []
    if plot is not None:
        from errata import plots

        drawn.append(plots.save(plots.weight_changes(found), plot))
        if found.groups and overlap == "methods":
            drawn.append(plots.save(plots.method_changes(found), beside(plot, "methods")))
        if found.overlaps:
            drawn.append(plots.save(plots.overlap_map(found), beside(plot, "overlap")))
    if session.json:
        pictures = [str(path) for path in drawn]
        session.emit({"model": name, "top": top, **found.as_json(), "pictures": pictures})
        return
    session.show(*_shown(name, found, top))
    say_pictures(session, drawn)


def _state(editor: Editor, text: str) -> Sequence[Edit]:
    """Return the entries of a state: base, now, or named edits."""
    if text == "base":
        return ()
    if text == "now":
        return editor.model.stack.entries
    with editor.only(*_named(editor.ledger, text)):
        return editor.model.stack.entries


def _named(ledger: Ledger, text: str) -> list[str]:
    """Return the ids of a state's edits by what names them; none of base and now."""
    if text in ("base", "now"):
        return []
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if not ids:
        raise ConfigError(
            f"{text!r} is no state: give base, now, all, a method, or ids of edits (3f2a,91bc)."
        )
    made: dict[str, list[str]] = {}
    for edit in ledger.edits():
        for name in {"all", edit.method, _label(edit)}:
            made.setdefault(name, []).append(edit.id)
    return [id_ for part in ids for id_ in made.get(part) or [ledger.resolve(part)]]


def _groups(editor: Editor, ids: Sequence[str], overlap: str) -> Mapping[str, list[Edit]]:
    if not overlap:
        return {}
    if len(ids) < 2:
        raise LedgerError(f"An overlap needs at least two edits; the two states have {len(ids)}.")
    groups: dict[str, list[Edit]] = {}
    with editor.only(*ids):
        for edit in editor.model.stack.entries:
            groups.setdefault(_label(edit) if overlap == "methods" else edit.id, []).append(edit)
    return groups


def _label(edit: Edit) -> str:
    """Return a method's variant where it has any, else its name."""
    return str(edit.config.get("variant") or edit.method)


def _shown(model: str, found: WeightDiff, top: int) -> list[Any]:
    parts: list[Any] = [render.heading(f"{found.before} → {found.after}", model)]
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    if found.changes:
        parts.append(_table([("", change) for change in found.changes]))
        directions = {len(cosines) for one in found.changes for cosines in one.cosines.values()}
        least, most = min(directions, default=top), max(directions, default=top)
        number = str(most) if least == most else f"{least} to {most}"
        note = (
            f"top: share of ΔW's energy in the first {number} singular directions of W "
            "(in brackets: a random direction's)"
        )
        parts.append(Text(note, style="muted"))
    else:
        parts.append(Text("no weight differs", style="muted"))
    if found.runtime:
        parts.append(
            Text(f"at run time, no weight changed: {first_few(found.runtime, 6)}", style="muted")
        )
    if found.groups:
        rows = [(label, change) for label, changes in found.groups.items() for change in changes]
        none = [label for label, changes in found.groups.items() if not changes]
        parts += ["", Text("each alone, from the base:", style="head"), _table(rows)]
        if none:
            parts.append(Text(f"no weight changed: {', '.join(none)}", style="muted"))
    if found.overlaps:
        grid = render.table(
            ("parameter", {"ratio": 1}), "one", "other", ("read alike", right),
            ("write alike", right), ("cosine", right),
        )  # fmt: skip
        for one in found.overlaps:
            grid.add_row(
                one.name, one.one, one.other, render.number(one.rows),
                render.number(one.columns), render.number(one.cosine),
            )  # fmt: skip
        note = "alike: mean squared cosine of the principal angles between the two spaces"
        parts += ["", grid, Text(note, style="muted")]
    return parts


def _table(rows: Sequence[tuple[str, WeightChange]]) -> Any:
    """Return a table of changes, each with what it belongs to."""
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    named = any(label for label, _ in rows)
    grid = render.table(
        *(["of"] if named else []), ("parameter", {"ratio": 1}), ("‖ΔW‖", right), ("/ ‖W‖", right),
        ("σ1", right), ("rank", right), ("stable", right), ("writes in top", right),
        ("reads in top", right),
    )  # fmt: skip
    for label, change in rows:
        grid.add_row(
            *([label] if named else []),
            change.name if change.layer is None or not named else f"{change.layer} {change.part}",
            render.number(change.norm),
            Text(render.number(change.relative), style="new"),
            render.number(change.spectral),
            str(change.rank),
            render.number(change.stable_rank),
            *(_energy(change.energy, change.chance, side) for side in ("output", "input")),
        )
    return grid


def _energy(energy: Mapping[str, float], chance: Mapping[str, float], side: str) -> str:
    if side not in energy:
        return "–"
    return f"{render.number(energy[side])} ({render.number(chance[side])})"
