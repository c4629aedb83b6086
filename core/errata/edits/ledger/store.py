"""The store: one folder with a database of records and events, and a file per delta."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.scratch import sweep
from errata.common.storage import make_folder, sha256
from errata.edits.ledger import content, exchange
from errata.edits.ledger.check import problems
from errata.edits.ledger.database import Database
from errata.edits.ledger.files import PRIVATE_FOLDER, make_private, refuse_lost_database
from errata.edits.ledger.names import resolve
from errata.edits.ledger.recovery import lost_edits, lost_text, set_damaged_aside, warn_of_lost
from errata.edits.ledger.schema import KINDS, NOTE_KIND, Event, Row, edit_of, record_text
from errata.edits.staleness import stale_ids
from errata.errors import IntegrityError, LedgerError, PluginError, StorageError, UnknownNameError
from errata.model.artifacts import Artifacts

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request

    Kinds = Mapping[str, type[Delta]]

EDIT_COLUMNS = "sequence, id, active, record, digest"


class Ledger:
    """Edits, deltas and events, on disk or in memory. Made by `Ledger.open`.

    Every change is one transaction. The delta's file is complete and synced before the record
    that names it, so whatever is killed whenever, the ledger holds every edit whose `commit`
    returned; at worst files are left that no record names (`unreported`, `discard_lost`).

    Each change first looks whether another process has changed the edits since this object last
    read them (`head`), and if so raises `LedgerChangedError` and writes nothing.

    Attributes:
        path: the folder it lives in; None in memory.
        kinds: delta kinds by name that can be read back; the mapping may grow meanwhile.
    """

    def __init__(self, database: Database, path: Path | None, kinds: Kinds) -> None:
        """Take an open database; use `Ledger.open`."""
        self.path = path
        self.kinds = kinds
        self.where = database.where
        self._database = database
        self._records: dict[str, tuple[str, Edit]] = {}  # id → (digest, record), once verified

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path | str | None,
        *,
        kinds: Kinds | None = None,
        readonly: bool = False,
        recover: bool = False,
    ) -> Self:
        """Open the ledger in a folder, made when missing; None keeps it in memory.

        Args:
            path: the folder.
            kinds: delta kinds by name; without them only records and events can be read.
            readonly: never write; the ledger must exist.
            recover: begin a new database where it is lost or damaged (that one is renamed);
                `recover` then fills it.

        Raises `IntegrityError` for what is no ledger or a damaged one, `StorageError` when the
        disk refuses, `LedgerError` for one of a newer errata.
        """
        known = {} if kinds is None else kinds
        if path is None:
            return cls(Database(None, readonly), None, known)
        folder = Path(path)
        try:
            is_file = folder.exists() and not folder.is_dir()
        except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
            raise StorageError(f"Cannot open the ledger {str(path)!r}: {error}.") from error
        if is_file:
            raise IntegrityError(f"{folder} is a file; a ledger is a folder. Give another path.")
        if not readonly:
            make_folder(folder, PRIVATE_FOLDER)
        if recover:
            set_damaged_aside(folder)
        else:
            refuse_lost_database(folder)
        opened = cls(Database(folder, readonly), folder, known)
        if not readonly:
            make_private(folder)
            sweep()
        if not recover and (lost := opened.lost()):
            warn_of_lost(lost, opened.where)
        return opened

    @property
    def head(self) -> int:
        """Number of the last event this object has seen."""
        return self._database.head

    def close(self) -> None:
        """Close the ledger; closing twice is fine."""
        self._database.close()

    def __enter__(self) -> Self:
        """Return the ledger; it is closed at the end of the block."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the ledger."""
        self.close()

    # -- changing --------------------------------------------------------------------------------

    def commit(self, entries: Iterable[tuple[Edit, Delta, bool]]) -> list[Edit]:
        """Record edits as (edit, delta, active), all or none, in the order given.

        Returns the records with sequence, blob and bytes filled.
        """
        with self._database.write():
            return [self._insert(edit, delta, active, {}) for edit, delta, active in entries]

    def activate(self, ids: Iterable[str]) -> list[str]:
        """Record that edits are applied; return their ids in ledger order.

        Raises `LedgerError` when one of them is active already.
        """
        return self._switch(ids, active=True)

    def deactivate(self, ids: Iterable[str]) -> list[str]:
        """Record that edits are reverted; return their ids in ledger order.

        Raises `LedgerError` when one of them is not active.
        """
        return self._switch(ids, active=False)

    def refuse(
        self,
        *,
        method: str,
        requests: Sequence[Request],
        config: Mapping[str, Any],
        reason: str,
        measured: Mapping[str, Any],
    ) -> Event:
        """Record an edit that a guard refused, with what it measured."""
        detail = {
            "method": method,
            "requests": [request.model_dump(mode="json") for request in requests],
            "config": config,
            "reason": reason,
            "measured": measured,
        }
        with self._database.write(checked=False):
            return self._database.add_event("refuse", None, detail)

    def note(self, kind: str, detail: Mapping[str, Any], edit_id: str | None = None) -> Event:
        """Record something else that happened, for instance an export."""
        if kind in KINDS or not NOTE_KIND.fullmatch(kind):
            raise LedgerError(
                f"{kind!r} is no kind for a note: use lower-case letters, digits, '-' and '_', "
                f"and none of the ledger's own ({', '.join(KINDS)})."
            )
        with self._database.write(checked=False):
            full = None if edit_id is None else self.resolve(edit_id)
            return self._database.add_event(kind, full, detail)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes within the block one: an exception takes every one of them back."""
        with self._database.write():
            yield

    def refresh(self) -> list[Event]:
        """Move `head` to the present and return the events that were missed."""
        return self._database.missed()

    # -- reading ---------------------------------------------------------------------------------

    def edits(self, last: int | None = None, *, active: bool = False) -> list[Edit]:
        """Return the records in ledger order: all, or the `last` so many; `active`: of those alone.

        What is not returned is not read.
        """
        condition = "active" if active else "1"
        limit = -1 if last is None else min(max(last, 0), 2**62)  # SQLite's integers have 64 bits
        rows = self._rows(f"{condition} ORDER BY sequence DESC LIMIT ?", (limit,))
        return [self._record(row) for row in reversed(rows)]

    def ids(self) -> list[str]:
        """Return the ids of all edits in ledger order."""
        return [row[0] for row in self._database.rows("SELECT id FROM edits ORDER BY sequence")]

    def active_ids(self) -> list[str]:
        """Return the ids of the active edits in ledger order."""
        query = "SELECT id FROM edits WHERE active ORDER BY sequence"
        return [row[0] for row in self._database.rows(query)]

    def stale_ids(self) -> list[str]:
        """Return the ids of active edits computed on top of one that is not, in order."""
        # The canonical JSON shows, unparsed, which records name an edit below.
        below = 'instr(record, \'"parents":[]\') = 0 OR instr(record, \'"on_top_of":"\') > 0'
        rows = self._rows(f"active AND ({below}) ORDER BY sequence")
        return stale_ids(map(self._record, rows), self.active_ids())

    def is_active(self, name: str) -> bool:
        """Say whether an edit is active."""
        query = "SELECT active FROM edits WHERE id = ?"
        return bool(self._database.rows(query, (self.resolve(name),))[0][0])

    @property
    def next_sequence(self) -> int:
        """The sequence number that the next recorded edit gets."""
        query = "SELECT coalesce(max(sequence), 0) + 1 FROM edits"
        return int(self._database.rows(query)[0][0])

    def get(self, name: str) -> Edit:
        """Return the record of an edit by its id or a unique beginning of it."""
        return self._record(self._rows("id = ?", (self.resolve(name),))[0])

    def resolve(self, name: str) -> str:
        """Return the full id for a unique beginning of one, or raise `UnknownNameError`."""
        return resolve(self._database, name)

    def delta(self, name: str) -> Delta:
        """Return the delta of an edit: its hash verified, its parts validated and finite."""
        return self.bound(self.get(name)).delta

    def bound(self, edit: Edit) -> Edit:
        """Return a record with its delta; raises as `delta` does."""
        source = f"The delta of edit {edit.id}"
        return edit.bind(content.build(self._parts(edit), self.kinds, source, edit.made_by))

    def read_active(self, known: Collection[str] = ()) -> tuple[list[Edit], dict[str, str]]:
        """Read the active edits with their deltas, all but those `known` already.

        Returns:
            The edits in ledger order, and id → reason of those that cannot be read.
        """
        edits: list[Edit] = []
        damaged: dict[str, str] = {}
        for row in self._rows("active ORDER BY sequence"):
            if row[1] in known:
                continue
            try:
                edits.append(self.bound(self._record(row)))
            except (IntegrityError, StorageError, UnknownNameError, PluginError) as error:
                damaged[row[1]] = str(error)
        return edits, damaged

    def events(self, limit: int | None = None) -> list[Event]:
        """Return all events in order, or the last `limit` of them."""
        last = 0 if limit is None else max(self._database.last_event() - max(limit, 0), 0)
        return self._database.events(last)

    def last(self, kind: str) -> Event | None:
        """Return the last event of a kind; None where there is none."""
        query = "SELECT coalesce(max(number), 0) FROM events WHERE kind = ?"
        number = int(self._database.rows(query, (kind,))[0][0])
        return self._database.events(number - 1, number)[0] if number else None

    def refusals(self) -> int:
        """Return how many edits were refused."""
        return int(self._database.rows("SELECT count(*) FROM events WHERE kind = 'refuse'")[0][0])

    def refused(self, after: int = 0) -> list[Event]:
        """Return the refusals, of events with a number above `after`, in order.

        Their `detail` has method, requests, reason and measured.
        """
        return [event for event in self._database.events(after) if event.kind == "refuse"]

    def find(self, digests: Iterable[str] | None = None) -> dict[str, list[str]]:
        """Return request digest → ids of the edits that contain it; None asks for all requests."""
        query = (
            "SELECT r.digest, e.id FROM requests r JOIN edits e USING (sequence) {} "
            "ORDER BY e.sequence"
        )
        if digests is None:
            rows = self._database.rows(query.format(""))
        else:
            rows = self._database.rows_of(query.format("WHERE r.digest IN ({})"), digests)
        found: dict[str, list[str]] = {}
        for digest, edit_id in rows:
            found.setdefault(digest, []).append(edit_id)
        return found

    def verify(self) -> list[str]:
        """Read everything and return what is wrong with it, in words; empty when all is sound.

        Files of a killed process (`unreported`) are no damage: their edits were never reported.
        """
        database = self._database
        lost = self.lost()
        found = problems(database.ready(), self.where, database.files.read, self.kinds)
        if misplaced := database.misplaced():
            found.insert(0, misplaced)
        return [*found, lost_text(lost, self.where)] if lost else found

    # -- files without a record ------------------------------------------------------------------

    def lost(self) -> list[str]:
        """Return the SHA-256 of the files whose edits were recorded, and are no longer.

        They are left when the database, or its write-ahead file, is lost.
        """
        return self._database.without_record(reported=True)

    def unreported(self) -> list[str]:
        """Return the SHA-256 of files that a change wrote and never came to record.

        Their process was killed or refused before it reported an edit as done, or is at work.
        """
        return self._database.without_record(reported=False)

    def discard_lost(self) -> list[str]:
        """Delete all files of edits that no record names, for good; return their SHA-256.

        Those of `lost` and those of `unreported`. What `recover` can take back is gone after this.
        """
        with self._database.write(checked=False):
            gone = sorted({*self.lost(), *self.unreported()})
            if gone:
                self._database.add_event("discard", None, {"files": gone})
                self._database.files.delete(gone)
        return gone

    def recover(self) -> tuple[list[Edit], dict[str, str]]:
        """Take edits whose files no record names back into the ledger, in their order, inactive.

        Inactive, because a file does not tell whether its edit was reverted since: `activate`
        them, or `Editor.apply` each. They get new numbers after the edits that are there.

        Returns:
            The records, and the name of each file that cannot be taken back → the reason.
        """
        with self._database.write():
            found = sorted({*self.lost(), *self.unreported()})
            pairs, refused = lost_edits(self._database.files, found, self.kinds)
            here = set(self.ids())
            records = []
            for edit, delta in pairs:
                if edit.id in here:
                    refused[edit.blob] = f"The ledger has another edit {edit.id} already."
                    continue
                here.add(edit.id)
                records.append(self._insert(edit, delta, False, {"recovered": True}, edit.blob))
        return records, refused

    # -- exchange --------------------------------------------------------------------------------

    def export(
        self,
        ids: Iterable[str],
        path: Path | str,
        artifacts: Artifacts | None = None,
        *,
        overwrite: bool = False,
    ) -> Path:
        """Write edits with their deltas to one file, in ledger order; return its path.

        `artifacts` is the cache folder with what the edits need besides.
        """
        edits = {edit.id: edit for edit in (self.get(name) for name in ids)}
        ordered = sorted(edits.values(), key=lambda edit: edit.sequence)
        pairs = [(edit, self._parts(edit)) for edit in ordered]
        return exchange.write_export(
            Path(path), pairs, artifacts or Artifacts(), overwrite=overwrite
        )

    def read_export(
        self, path: Path | str, carried: dict[str, bytes] | None = None
    ) -> list[tuple[Edit, Delta]]:
        """Return what an exported file holds, validated, without importing its edits.

        Artifacts that it carries are put into `carried`, by name.
        """
        return exchange.read_export(Path(path), self.kinds, carried)

    def import_(
        self,
        path: Path | str,
        pairs: Sequence[tuple[Edit, Delta]] | None = None,
        *,
        active: bool = False,
    ) -> list[Edit]:
        """Record the edits of an exported file, all or none, and return their records.

        An edit that is here already with the same content is left as it is, active or not; a file
        that it had and lost is written again. One with the same id and other content raises
        `IntegrityError`. `pairs` is what the file holds, where it was read already.
        """
        pairs = self.read_export(path) if pairs is None else pairs
        detail = {"imported": Path(path).name}
        records: list[Edit] = []
        with self._database.write():
            for edit, delta in pairs:
                if not self._database.rows("SELECT 1 FROM edits WHERE id = ?", (edit.id,)):
                    records.append(self._insert(edit, delta, active, detail))
                    continue
                here = self.get(edit.id)
                parts = content.take(delta)
                if not exchange.same(here, self._parts(here, parts), edit, parts):
                    raise IntegrityError(
                        f"{path} has an edit {edit.id} that differs from the one of this id in the "
                        f"ledger {self.where}. Nothing was imported."
                    )
                records.append(here)
        return records

    # -- how -------------------------------------------------------------------------------------

    def _switch(self, ids: Iterable[str], active: bool) -> list[str]:
        with self._database.write():
            names = list(dict.fromkeys(self.resolve(name) for name in ids))
            for name in names:
                if self.is_active(name) == active:
                    raise LedgerError(
                        f"Edit {name} is {'already' if active else 'not'} active: nothing to "
                        f"{'apply' if active else 'revert'}. Nothing was changed."
                    )
            order = {name: self.get(name).sequence for name in names}
            names.sort(key=order.__getitem__)
            for name in names:
                self._database.rows("UPDATE edits SET active = ? WHERE id = ?", (int(active), name))
                self._database.add_event("apply" if active else "revert", name, {})
            return names

    def _insert(
        self,
        edit: Edit,
        delta: Delta,
        active: bool,
        detail: Mapping[str, Any],
        blob: str | None = None,
    ) -> Edit:
        """Record an edit, after writing its file unless it is there as `blob`."""
        content.check_kind(delta.kind, self.kinds)
        if edit.delta_kind != delta.kind:
            raise LedgerError(
                f"Edit {edit.id} says its delta is {edit.delta_kind!r}; it is {delta.kind!r}."
            )
        if self._database.rows("SELECT 1 FROM edits WHERE id = ?", (edit.id,)):
            raise LedgerError(f"Edit {edit.id} is in the ledger {self.where} already.")
        sequence = self.next_sequence
        filled = edit.model_copy(update={"sequence": sequence, "blob": "", "nbytes": delta.nbytes})
        if blob is None:
            # The file is complete, and synced before the record that names it is committed.
            blob = self._database.files.write(exchange.file_of(filled, content.take(delta)))
        filled = filled.model_copy(update={"blob": blob})
        text = record_text(filled)
        digest = sha256(text.encode())
        requests = [(request.digest, sequence) for request in dict.fromkeys(edit.requests)]
        row = (sequence, edit.id, int(active), text, digest)
        self._database.rows("INSERT INTO edits VALUES (?, ?, ?, ?, ?)", row)
        for request in requests:
            self._database.rows("INSERT OR IGNORE INTO requests VALUES (?, ?)", request)
        self._database.add_event("edit", edit.id, {**detail, "record": digest})
        if active:
            self._database.add_event("apply", edit.id, {})
        return edit_of(row)

    def _rows(self, condition: str, values: tuple[Any, ...] = ()) -> list[Row]:
        return self._database.rows(f"SELECT {EDIT_COLUMNS} FROM edits WHERE {condition}", values)

    def _record(self, row: Row) -> Edit:
        """Return the record of a row, verified once for every content it has."""
        digest, edit = self._records.get(row[1], ("", None))
        if edit is None or digest != row[4]:
            edit = edit_of(row)
            self._records[edit.id] = (row[4], edit)
        return edit

    def _parts(self, edit: Edit, known: content.Parts | None = None) -> content.Parts:
        """Return what an edit's file holds; a lost one is written again if it held `known`."""
        source, files = f"The delta of edit {edit.id}", self._database.files
        data = b"" if known is None else exchange.file_of(edit, known)
        if sha256(data) == edit.blob:
            files.write(data)
        return content.decode(files.read(edit.blob, source), edit.delta_kind, source)
