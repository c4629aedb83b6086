"""Reading a ledger through and saying, in words, what is wrong with it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from errata.edits.ledger import content
from errata.edits.ledger.schema import edit_of, events_of, translated
from errata.errors import ErrataError

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.ledger.schema import Event


def problems(
    connection: sqlite3.Connection,
    where: str,
    read_blob: Callable[[str, str], bytes],
    kinds: Mapping[str, type[Delta]],
) -> list[str]:
    """Return every problem of the database, its records, events and blobs; empty when sound."""
    try:
        with translated(where):
            found = [
                f"The database is damaged: {row[0]}"
                for row in connection.execute("PRAGMA integrity_check(20)")
                if row[0] != "ok"
            ]
            if found:
                return found  # what would follow reads the same broken pages
            # One read transaction: another process may write meanwhile.
            own = not connection.in_transaction
            if own:
                connection.execute("BEGIN")
            try:
                edits, active, record_digests, found = _edits(connection)
                found += _requests(connection, edits)
                found += _events(connection, edits, active, record_digests)
            finally:
                if own:
                    connection.execute("ROLLBACK")
    except ErrataError as error:
        return [str(error)]
    return found + _blobs(edits, read_blob, kinds)


def _edits(
    connection: sqlite3.Connection,
) -> tuple[list[Edit], dict[str, bool], dict[str, str], list[str]]:
    """Return the sound records, which are active, the digest of each, and what is wrong."""
    edits: list[Edit] = []
    active: dict[str, bool] = {}
    digests: dict[str, str] = {}
    found: list[str] = []
    rows = connection.execute("SELECT sequence, id, active, record, digest FROM edits ORDER BY 1")
    expected = 1
    for row in rows:
        if row[0] != expected:
            found.append(f"The ledger lacks edit number {expected}; the next it has is {row[0]}.")
        expected = row[0] + 1
        active[row[1]], digests[row[1]] = bool(row[2]), row[4]
        try:
            edits.append(edit_of(row))
        except ErrataError as error:
            found.append(str(error))
    return edits, active, digests, found


def _requests(connection: sqlite3.Connection, edits: list[Edit]) -> list[str]:
    indexed: dict[int, set[str]] = {}
    for digest, sequence in connection.execute("SELECT digest, sequence FROM requests"):
        indexed.setdefault(sequence, set()).add(digest)
    return [
        f"The index of requests is wrong for edit {edit.id}."
        for edit in edits
        if indexed.get(edit.sequence) != {request.digest for request in edit.requests}
    ]


def _events(
    connection: sqlite3.Connection,
    edits: list[Edit],
    active: Mapping[str, bool],
    digests: Mapping[str, str],
) -> list[str]:
    """Replay the history and compare it with the records and their active flags."""
    rows = connection.execute(
        "SELECT number, time, kind, edit_id, detail, digest FROM events ORDER BY 1"
    ).fetchall()
    try:
        events = events_of(rows, "")
    except ErrataError as error:
        return [str(error)]
    found = []
    if events and events[0].number != 1:
        found.append("The first events are missing from the ledger.")
    state: dict[str, bool] = {}
    recorded: dict[str, str] = {}
    for event in events:
        found += _step(event, state, recorded)
    for name in sorted(set(state) | set(active)):
        if name not in state:
            found.append(f"Edit {name} has no event that recorded it.")
        elif name not in active:
            found.append(f"Edit {name} was recorded, and its record is gone.")
        elif state[name] != active[name]:
            said, is_now = ("active", "not") if state[name] else ("not active", "so")
            found.append(f"By its events edit {name} is {said}; its record is {is_now}.")
    found += [
        f"The record of edit {edit.id} is not the one that its events name."
        for edit in edits
        if recorded.get(edit.id) != digests[edit.id]
    ]
    return found


def _step(event: Event, state: dict[str, bool], recorded: dict[str, str]) -> list[str]:
    """Advance the replay by one event; return what is impossible about it."""
    name = event.edit_id
    if event.kind in ("edit", "outcome") and name is not None:
        recorded[name] = str(event.detail.get("record"))
    if event.kind == "edit" and name is not None:
        again = name in state
        state[name] = False
        return [f"Event {event.number} records edit {name} a second time."] if again else []
    if event.kind in ("apply", "revert"):
        wanted = event.kind == "apply"
        if name is None or state.get(name) is not (not wanted):
            return [f"Event {event.number} cannot be: {event.kind} of edit {name}."]
        state[name] = wanted
    return []


def _blobs(
    edits: list[Edit], read_blob: Callable[[str, str], bytes], kinds: Mapping[str, type[Delta]]
) -> list[str]:
    found = []
    for edit in edits:
        source = f"The delta of edit {edit.id}"
        try:
            parts = content.decode(read_blob(edit.blob, source), edit.delta_kind, source)
            content.delta_of(edit, parts, kinds, source)
        except ErrataError as error:
            text = str(error)
            found.append(text if text.startswith(source) else f"{source}: {text}")
    return found
