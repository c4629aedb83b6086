"""The history of a ledger: `log`, `show` and `verify`. The first two load no model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import LEDGER, MODEL, command
from errata.cli.edit_view import edit_json
from errata.cli.error_reports import DAMAGED
from errata.cli.session import Session
from errata.edits.ledger.model_note import KIND, model_of
from errata.edits.request import wish_of
from errata.errors import ErrataError, LedgerError, first_few

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.edits.ledger import Event, Ledger

PANEL = "Look back"
SOUND = "sound"
WORDS = {
    "edit": "computed",
    "apply": "put on the model",
    "revert": "taken off the model",
    "outcome": "measured again",
    "supersede": "superseded",
    "rebase": "computed again, as another edit",
    "resolve": "solved again, as another edit",
}


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "log",
        panel=PANEL,
        shared=LEDGER,
        examples="errata log\nerrata log --active --json | jq '.edits[].id'\nerrata log --refused\n"
        "errata log --recover\nerrata log --discard-lost",
    )(log)
    command(app, "show", panel=PANEL, shared=LEDGER, examples="errata show 3f2a")(show)
    command(
        app,
        "verify",
        panel=PANEL,
        shared=MODEL,
        examples="errata verify\nerrata verify --ledger-only --json",
    )(verify)


def log(
    session: Session,
    active: Annotated[bool, typer.Option("--active", help="Only edits on the model.")] = False,
    refused: Annotated[
        bool, typer.Option("--refused", help="Also edits that a guard refused, with the reason.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Only the last N edits.")
    ] = None,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover", help="First take edits whose records were lost back in from their files."
        ),
    ] = False,
    discard_lost: Annotated[
        bool,
        typer.Option(
            "--discard-lost", help="First delete files of edits that the ledger has no record of."
        ),
    ] = False,
) -> None:
    """List the edits of the ledger, and which are on the model.

    In their order, with the edits on the model that each conflicts with (the same fact, another
    target) or overlaps (nearly the same key), and of edits of several models the model. An edit
    whose file is missing or cut off, or that lacks a trained network it needs, is shown so, not as
    on. Loads no model.

    With --recover, edits whose file is there and whose record was lost (with the database, or
    its write-ahead file) are recorded again, after those that are there and off the model: a
    file does not tell whether its edit was reverted since. errata apply ID puts one on. A damaged
    database is renamed, and a new one begun.

    With --discard-lost, files that no record names are deleted for good: what a killed process
    left, and what --recover could take back. With both, what cannot be taken back is deleted.
    """
    if recover:
        _recover(session)
    if discard_lost:
        _discard(session)
    with session.read_ledger() as ledger:
        shown, on = ledger.edits(limit, active=active), set(ledger.active_ids())
        total, stale = len(ledger.ids()), set(ledger.stale_ids())
        refusals = ledger.refused() if refused else []
        refusal_count = ledger.refusals()
        known, models = model_of(ledger), _models(ledger)
    files, lacking = _files(session, shown), _lacking(shown)
    if session.json:
        session.emit(
            {
                "ledger": str(session.ledger),
                "model": known.get("name"),
                "edits": [
                    {
                        **edit_json(edit, edit.id in on),
                        "stale": edit.id in stale,
                        "model": models.get(edit.id),
                        "file": files[edit.id],
                        "lacking": lacking[edit.id],
                    }
                    for edit in shown
                ],
                "refused": [_refusal_json(event) for event in refusals] if refused else None,
            }
        )
        return
    state = f"{render.count(total, 'edit')}, {len(on)} active"
    head = f"{known.get('name', 'model not recorded')} · {state}"
    session.show(render.heading(str(session.ledger), head), "")
    if shown:
        states = {
            edit.id: _state(
                edit.id in on,
                edit.id in stale,
                "damaged" if lacking[edit.id] and files[edit.id] == SOUND else files[edit.id],
            )
            for edit in shown
        }
        several = len({*map(models.get, states), known.get("name")}) > 1
        notes = {
            edit.id: [
                *([Text(f"model: {models.get(edit.id)}", style="muted")] if several else []),
                *(Text(note, style="warn") for note in _notes(edit, on)),
            ]
            for edit in shown
        }
        session.show(_log_table(shown, on, states, notes, render.wide(session.out)))
    else:
        session.show("No edits." if not total else "No edit is active.")
    if refused:
        session.show("", _refusal_table(refusals) if refusals else "No edit was refused.")
    elif refusal_count:
        session.show(Text(f"\n{refusal_count} refused: errata log --refused", style="muted"))
    if stale:
        note = "computed on top of edits that are off; errata rebase computes them again"
        session.show(Text(f"\n{len(stale)} stale: {note}", style="warn"))
    if lost := [edit for edit in shown if files[edit.id] != SOUND or lacking[edit.id]]:
        note = (
            "cannot be on the model until its file is put back, or the artifact it needs into the "
            "cache folder (errata apply FILE brings both, where it was exported); errata revert "
            "ID retires it"
        )
        session.show(
            Text(
                f"\n{render.count(len(lost), 'edit')} damaged or missing: each {note}",
                style="bad",
            )
        )


def _files(session: Session, edits: Sequence[Edit]) -> dict[str, str]:
    """Return edit id → how its file looks: "sound", "missing" or "damaged"."""
    from errata.edits.ledger.files import DeltaFiles

    files = DeltaFiles(session.ledger)
    return {edit.id: files.look(edit.blob) for edit in edits}


def _models(ledger: Ledger) -> dict[str, str]:
    """Return edit id → the model it was made on: the one that the ledger named last before it."""
    found, events = {}, ledger.events()
    name = next((str(event.detail["name"]) for event in events if event.kind == KIND), "")
    for event in events:
        if event.kind == KIND:
            name = str(event.detail["name"])
        elif event.kind == "edit" and event.edit_id and name:
            found[event.edit_id] = name
    return found


def _lacking(edits: Sequence[Edit]) -> dict[str, list[str]]:
    """Return edit id → the artifacts that it needs and the cache folder does not have as such."""
    from errata.model.artifacts import Artifacts

    artifacts = Artifacts()
    needed = {item for edit in edits for item in edit.artifacts.items()}
    lost = {(name, digest) for name, digest in needed if artifacts.digest(name) != digest}
    return {e.id: [item[0] for item in e.artifacts.items() if item in lost] for e in edits}


def _recover(session: Session) -> None:
    """Take edits back in from their files, and say which."""
    from errata.edits.delta_kinds import DeltaKinds
    from errata.edits.ledger import Ledger

    if not session.ledger.is_dir():
        raise LedgerError(f"There is no folder {str(session.ledger)!r}: name one with --ledger.")
    with Ledger.open(session.ledger, kinds=DeltaKinds(), recover=True) as ledger:
        records, refused = ledger.recover()
    for why in refused.values():
        session.say(f"Not taken back: {why}", "warn")
    ids = ", ".join(edit.id for edit in records[-5:])
    more = f" (the last: {ids}); they are off the model: errata apply ID" if records else ""
    session.say(f"{render.count(len(records), 'edit')} taken back from files{more}", "head")


def _discard(session: Session) -> None:
    """Delete the files of edits that no record names, and say how many."""
    from errata.edits.ledger import Ledger

    session.read_ledger().close()  # says what is wrong where there is none
    with Ledger.open(session.ledger) as ledger:
        gone = ledger.discard_lost()
    session.say(f"{render.count(len(gone), 'file')} without a record deleted", "head")


def _log_table(
    edits: list[Edit],
    on: set[str],
    states: Mapping[str, Text],
    notes: Mapping[str, list[Text]],
    wide: bool,
) -> Any:
    """Return the log, notes below each request; in a narrow window the details, too."""
    grid = render.table(
        ("#", {"justify": "right", "no_wrap": True}),
        ("", {"no_wrap": True}),
        ("id", {"no_wrap": True}),
        ("method", {"no_wrap": True}),
        *([("kind", {"no_wrap": True})] if wide else []),
        ("request → target", {"ratio": 1}),
        *([("when", {"no_wrap": True})] if wide else []),
        *([("size", {"justify": "right", "no_wrap": True})] if wide else []),
    )
    for edit in edits:
        is_on = edit.id in on
        kind, size = edit.delta_kind, render.size(edit.nbytes)
        when = render.when(edit.created)[5:]
        request = Text(render.short_request(edit), style="" if is_on else "muted")
        if not wide:
            request.append(f"\n{kind}, {size}, {when}", style="muted")
        request = Text("\n").join([request, *notes[edit.id]])
        grid.add_row(
            str(edit.sequence),
            states[edit.id],
            Text(edit.id, style="accent" if is_on else "muted"),
            edit.method,
            *([kind] if wide else []),
            request,
            *([Text(when, style="muted")] if wide else []),
            *([size] if wide else []),
        )
    return grid


def _state(is_on: bool, stale: bool, file: str) -> Text:
    if file != SOUND:
        return Text(file, style="bad")
    if not is_on:
        return Text("off", style="muted")
    return Text("stale", style="warn") if stale else Text("on", style="good")


def _notes(edit: Edit, on: Collection[str]) -> Iterator[str]:
    """Yield the record's notes about edits on the model that are in its way."""
    for what, ids in (("conflicts", edit.outcome.conflicts), ("overlaps", edit.outcome.overlaps)):
        if found := [name for name in ids if name in on]:
            yield f"{what} {render.names(found)}"


def _refusal_json(event: Event) -> dict[str, Any]:
    return {"time": event.time, **event.detail}


def _refusal_table(events: list[Event]) -> Any:
    grid = render.table(
        ("when", {"no_wrap": True}),
        ("method", {"no_wrap": True}),
        ("request → target", {"ratio": 1}),
        ("reason", {"ratio": 1}),
    )
    for event in events:
        requests = event.detail.get("requests", [])
        first = requests[0] if requests else {}
        text = str(first.get("prompt", "")).replace("{}", str(first.get("subject", "")))
        more = f" (+{len(requests) - 1} more)" if len(requests) > 1 else ""
        grid.add_row(
            Text(render.when(event.time)[5:], style="muted"),
            str(event.detail.get("method", "")),
            f"{render.quoted(text)} → {wish_of(first)}{more}",
            Text(str(event.detail.get("reason", "")), style="warn"),
        )
    return render.titled("Refused", grid)


def show(
    session: Session,
    name: Annotated[str, typer.Argument(metavar="ID", help="Id, or a unique beginning.")],
) -> None:
    """Show everything the ledger holds about one edit.

    Loads no model.
    """
    with session.read_ledger(kinds=True) as ledger:
        edit = ledger.get(name)
        told = _of_delta(ledger, edit)
        is_on = ledger.is_active(edit.id)
        stale = edit.id in ledger.stale_ids()
        events = [event for event in ledger.events() if event.edit_id == edit.id]
    file = _files(session, [edit])[edit.id]
    if session.json:
        history = [{"time": e.time, "kind": e.kind} for e in events]
        record = {**edit_json(edit, is_on), "delta": dict(told)}
        session.emit({**record, "stale": stale, "file": file, "history": history})
        return
    state = "on the model" if is_on else "off the model"
    if file != SOUND:
        state = f"its file is {file}: it cannot be on the model"
    state += ", stale: computed on top of edits that are off" if stale else ""
    session.show(
        render.heading(edit.id, f"{state} · number {edit.sequence}"),
        "",
        render.facts(
            [
                ("method", f"{edit.method} ({edit.made_by})"),
                ("delta", f"{edit.delta_kind}, {render.size(edit.nbytes)}"),
                *told,
                ("made", f"{render.when(edit.created)}, in {render.seconds(edit.seconds)}"),
                ("made with", ", ".join(_networks(edit)) or None),
                ("on top of", _below(edit)),
                ("conflicts", ", ".join(edit.outcome.conflicts) or None),
                ("overlaps", _cosines(edit)),
                ("supersedes", ", ".join(edit.outcome.supersedes) or None),
                ("instead of", edit.outcome.rebases),
            ]
        ),
        "",
        *_request_lines(edit),
    )
    measured = render.outcome(edit)
    if measured:
        session.show("", render.heading("Measured when it was applied"), render.facts(measured))
    settings = [(key, str(value)) for key, value in sorted(edit.config.items())]
    session.show("", render.heading("Hyper-parameters"), render.facts(settings))
    prints = [(key, f"{value[:16]}…") for key, value in edit.fingerprint.items()]
    session.show("", render.heading("Base model", "SHA-256"), render.facts(prints))
    libraries = [(k, v) for k, v in edit.versions.items() if k != "method"]
    session.show("", render.heading("Libraries"), render.facts(libraries))
    session.show(
        "",
        render.heading("History"),
        render.facts([(render.when(e.time), WORDS.get(e.kind, e.kind)) for e in events]),
    )


def _networks(edit: Edit) -> list[str]:
    """Return the trained networks that computed an edit, with the beginning of their digests."""
    return [f"{name} (SHA-256 {digest[:16]}…)" for name, digest in edit.made_with.items()]


def _below(edit: Edit) -> str:
    """Return what an edit was computed on top of, in words."""
    first = [f"{edit.on_top_of} and what that is on top of"] if edit.on_top_of else []
    return first_few([*first, *edit.parents]) or "the base"


def _of_delta(ledger: Ledger, edit: Edit) -> list[tuple[str, str]]:
    """Return what an edit's delta says of itself; nothing where it cannot be read."""
    try:
        facts = list(ledger.delta(edit.id).__rich_repr__())
    except ErrataError:
        return []
    return [fact for fact in facts if isinstance(fact, tuple) and fact[0] != "kind"]


def _cosines(edit: Edit) -> str | None:
    """Return the edits with nearly the same key, and the cosines of the keys."""
    found = edit.outcome.overlaps
    return ", ".join(f"{name} (cosine {cosine:.2f})" for name, cosine in found.items()) or None


def _request_lines(edit: Edit) -> list[Any]:
    grid = render.table("request", "target", ("kind", {"no_wrap": True}), "was")
    for request in edit.requests:
        grid.add_row(request.text, request.wish, request.kind, request.target_true or "–")
    return [grid]


def verify(
    session: Session,
    ledger_only: Annotated[
        bool, typer.Option("--ledger-only", help="Check the ledger without loading the model.")
    ] = False,
) -> None:
    """Check the ledger, and the model against it, bit for bit.

    Every record, event and delta is read and its hash compared; every tensor of the edited model
    is compared with base + active edits, bit for bit, and with all edits off with the base.
    """
    session.verifying = True
    session.read_ledger().close()
    if ledger_only:
        with session.read_ledger(kinds=True) as ledger:
            problems, count, notes = ledger.verify(), len(ledger.ids()), _notes_of(ledger)
        checked = f"{render.count(count, 'edit')} in {session.ledger}"
    else:
        with session.editor() as editor:
            problems = editor.verify()
            with editor.disabled():
                if wrong := editor.model.stack.differing():
                    problems.append(f"with every edit off, {first_few(wrong)}")
            tensors = len(editor.model.parameters) + len(editor.model.buffers)
            count, notes = len(editor.ledger.ids()), _notes_of(editor.ledger)
            checked = (
                f"{render.count(count, 'edit')} in {session.ledger}; {tensors} tensors of "
                f"{editor.model.name}, bit for bit"
            )
    if session.json:
        session.emit(
            {"checked": checked, "problems": problems, "notes": notes, "sound": not problems}
        )
    else:
        for problem in problems:
            session.show(Text.assemble(("Problem: ", "bad"), problem))
        for note in notes:
            session.show(Text.assemble(("Note: ", "warn"), note))
        verdict = f"{render.count(len(problems), 'problem')}." if problems else "Sound."
        session.show(Text.assemble((verdict, "head"), (f" Checked {checked}.", "muted")))
    if problems:
        raise typer.Exit(DAMAGED)


def _notes_of(ledger: Ledger) -> list[str]:
    """Return what is worth knowing of a ledger, and no fault of it."""
    from errata.edits.ledger.recovery import unreported_text

    left = ledger.unreported()
    return [unreported_text(left, ledger.where)] if left else []
