"""The transactions of a ledger: one writer at a time, and never over what it has not seen."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from errata.common.storage import canonical
from errata.edits.ledger.files import DeltaFiles
from errata.edits.ledger.schema import (
    DATABASE,
    STATE_KINDS,
    Event,
    Row,
    connect,
    events_of,
    plain,
    translated,
)
from errata.errors import (
    ErrataError,
    IntegrityError,
    LedgerChangedError,
    LedgerError,
    StorageError,
    first_few,
)

BATCH = 500  # SQLite limits how many variables a statement has
EVENT_COLUMNS = "number, time, kind, edit_id, detail, digest"


class Database:
    """A ledger's connection: reading rows, writing under the lock, and the chain of events.

    Attributes:
        where: the folder, for messages.
        files: the deltas' bytes, which follow the transactions.
        head: number of the last event this object has seen.
    """

    def __init__(self, folder: Path | None, readonly: bool) -> None:
        self.where = str(folder) if folder is not None else "in memory"
        self.files = DeltaFiles(folder)
        self._readonly = readonly
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._depth = 0
        self._last, self._tip = 0, ""  # number and digest of the newest event, while writing
        self._path = None if folder is None else (folder / DATABASE).absolute()
        self._connection: sqlite3.Connection | None = connect(folder, readonly)
        try:
            self._opened = self._identity()
            self.head = self.last_event()
            if folder is not None and not readonly:
                self._sweep()
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        if hasattr(self, "_connection"):
            self.close()

    def close(self) -> None:
        """Close the connection; closing twice is fine."""
        with self._lock:
            connection, self._connection = self._connection, None
            if connection is not None and self._process == os.getpid():
                with suppress(sqlite3.Error):  # everything that was reported is safe already
                    connection.close()

    # -- reading ---------------------------------------------------------------------------------

    def ready(self) -> sqlite3.Connection:
        """Return the open connection, or raise `LedgerError`."""
        if self._connection is None:
            raise LedgerError(f"The ledger {self.where} is closed: open it again.")
        if self._process != os.getpid():
            raise LedgerError(
                f"The ledger {self.where} was opened in another process, and SQLite must not be "
                "carried across a fork: open it again in this one."
            )
        return self._connection

    def rows(self, query: str, values: Row = ()) -> list[Row]:
        """Return all rows of a query; run a statement."""
        with self._lock, translated(self.where):
            return self.ready().execute(query, values).fetchall()

    def rows_of(self, query: str, values: Iterable[str]) -> list[Row]:
        """Return all rows of a query that has `IN ({})`, for each of the values once."""
        wanted = list(dict.fromkeys(values))
        found: list[Row] = []
        for start in range(0, len(wanted), BATCH):
            part = tuple(wanted[start : start + BATCH])
            found += self.rows(query.format(",".join("?" * len(part))), part)
        return found

    def events(self, after: int, last: int | None = None) -> list[Event]:
        """Return the events with a number above `after` (up to `last`), the digests verified."""
        with self._lock:
            query = (
                f"SELECT {EVENT_COLUMNS} FROM events WHERE number > ? AND number <= ? ORDER BY 1"
            )
            found = self.rows(query, (after, 2**62 if last is None else last))
            return events_of(found, self._link(found[0][0] - 1)) if found else []

    def missed(self) -> list[Event]:
        """Return the events after `head` and move it there."""
        with self._lock:
            events = self.events(self.head)
            self.head = events[-1].number if events else self.head
            return events

    def last_event(self) -> int:
        """Return the number of the last event; 0 when there is none."""
        return int(self.rows("SELECT coalesce(max(number), 0) FROM events")[0][0])

    def misplaced(self) -> str:
        """Return, in words, that the file that is open is no longer at its path; "" where it is.

        SQLite writes on to a file that was deleted, moved or replaced, and reports no error.
        """
        now = self._identity()
        if now == self._opened:
            return ""
        what = "is gone: it was deleted or moved" if now is None else "was replaced by another file"
        return (
            f"{self._path} {what} while the ledger was open, so nothing can be recorded in it: put "
            "the file back, or open the ledger again."
        )

    def _identity(self) -> tuple[int, int] | None:
        """Return device and inode of the file at the database's path; None where there is none.

        The file is not opened for it: closing it again would drop SQLite's locks (POSIX).
        """
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _check_place(self) -> None:
        if text := self.misplaced():
            raise StorageError(text)

    def _link(self, number: int) -> str:
        found = self.rows("SELECT digest FROM events WHERE number = ?", (number,))
        return str(found[0][0]) if found else ""

    # -- writing ---------------------------------------------------------------------------------

    @contextmanager
    def write(self, checked: bool = True) -> Iterator[None]:
        """Hold the write lock for a block: all of it is stored, or nothing.

        Nested blocks are savepoints of the outer one. `checked` blocks raise
        `LedgerChangedError` when edits were changed by others after `head`.
        """
        with self._lock:
            connection = self.ready()
            if self._readonly:
                raise LedgerError(f"The ledger {self.where} was opened for reading only.")
            if self._depth:
                with self._savepoint(connection):
                    yield
                return
            if connection.in_transaction:  # left by an interrupt at an unlucky moment
                connection.execute("ROLLBACK")
            self._depth = 1
            try:
                self._check_place()
                self.rows("BEGIN IMMEDIATE")
                seen = self._see(checked)
                yield
                self.files.flush()
                self._check_place()
            except BaseException:
                self._give_up(connection)
                raise
            else:
                # From here on the record may be on disk even when an error is reported or Ctrl-C
                # arrives, so its files stay unless it cannot be, and the database says what is so.
                try:
                    self._commit(connection)
                    self._check_place()
                finally:
                    self._roll_back(connection)
                    if seen and self._link(self._last) == self._tip:
                        self.head = self._last
            finally:
                self._depth = 0
                self.files.settle()

    def add_event(self, kind: str, edit_id: str | None, detail: Mapping[str, Any]) -> Event:
        """Append one event, tied to the one before it, inside a `write` block."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        event = Event(self._last + 1, now, kind, edit_id, plain(detail, "detail"))
        values = (event.number, now, kind, edit_id, canonical(event.detail))
        link = event.link(self._tip)
        self.rows("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?)", (*values, link))
        self._last, self._tip = event.number, link
        return event

    @contextmanager
    def _savepoint(self, connection: sqlite3.Connection) -> Iterator[None]:
        before, written = (self._last, self._tip), self.files.written
        self.rows("SAVEPOINT inner_change")
        try:
            yield
        except BaseException:
            if connection.in_transaction:  # not after an error at which SQLite took all of it back
                self.rows("ROLLBACK TO inner_change")
                self.rows("RELEASE inner_change")
                self.files.discard(written)
            self._last, self._tip = before
            raise
        self.rows("RELEASE inner_change")

    def _commit(self, connection: sqlite3.Connection) -> None:
        """Record the change; take it back where the disk refuses it, if it can be."""
        try:
            self.rows("COMMIT")
        except ErrataError as error:
            if not (_never_written(error) or self._empty_log(connection)):
                self.files.leave_unreported()
                raise StorageError(
                    f"The disk refused the ledger {self.where}: {error.__cause__}. The change may "
                    "have been written, or not: check free space and permissions, and open the "
                    "ledger again to see."
                ) from error
            self._give_up(connection)
            raise
        except BaseException:
            if connection.in_transaction:  # an interrupt that came before
                self._give_up(connection)
            raise

    def _empty_log(self, connection: sqlite3.Connection) -> bool:
        """Empty the write-ahead file of a change whose COMMIT failed; say whether it is empty.

        The pages of the change may stand there whole, and SQLite would take them for recorded when
        it opens the ledger after a crash.
        """
        self._roll_back(connection)
        with suppress(ErrataError):
            return not self.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]
        return False

    def _give_up(self, connection: sqlite3.Connection) -> None:
        """Take back a change that is not recorded, and the files that it wrote.

        A file left would be offered as an edit whose record was lost.
        """
        if connection.in_transaction:
            self.files.discard()  # before the lock goes: another may write the same file
        elif self.files.written:
            # It was rolled back before (by SQLite, on a full disk): the lock is gone with that.
            try:
                self.rows("BEGIN IMMEDIATE")
                self.files.discard(kept=self.recorded())
            except ErrataError:
                self.files.leave_unreported()
        self._roll_back(connection)

    def recorded(self) -> set[str]:
        """Return the SHA-256 of the files that records name."""
        query = 'SELECT substr(record, instr(record, \'"blob":"\') + 8, 64) FROM edits'
        return {str(row[0]) for row in self.rows(query)}

    def without_record(self, *, reported: bool) -> list[str]:
        """Return the SHA-256 of files that no record names: of changes that ended, or did not."""
        # Read in this order, a file that another process records meanwhile counts as neither.
        there, begun = self.files.digests(), self.files.begun()
        left = there - self.recorded()
        return sorted(left - begun if reported else left & begun)

    @staticmethod
    def _roll_back(connection: sqlite3.Connection) -> None:
        if connection.in_transaction:
            with suppress(sqlite3.Error):  # on some errors SQLite has done it by itself
                connection.execute("ROLLBACK")

    def _see(self, checked: bool) -> bool:
        """Compare `head` with the database; say whether it may move to this change's events."""
        self._last = self.last_event()
        self._tip = self._link(self._last)
        if self._last < self.head:
            raise IntegrityError(
                f"The ledger {self.where} was replaced by an older copy while it was open: open "
                "it again."
            )
        marks = ",".join("?" * len(STATE_KINDS))
        missed = self.rows(
            f"SELECT kind, edit_id FROM events WHERE number > ? AND kind IN ({marks})",
            (self.head, *STATE_KINDS),
        )
        if missed and checked:
            said = {"edit": "new edits", "apply": "applied", "revert": "reverted"}
            lists = {kind: [str(row[1]) for row in missed if row[0] == kind] for kind in said}
            changes = "; ".join(f"{said[k]}: {first_few(ids)}" for k, ids in lists.items() if ids)
            raise LedgerChangedError(
                f"Another process changed the ledger {self.where} since it was last read here "
                f"({changes}). Nothing was written: refresh, and try again."
            )
        return not missed

    def _sweep(self) -> None:
        """Delete what killed processes left in `tmp`, unless another one is writing now."""
        connection = self.ready()
        if not self.files.leftovers():
            return
        with suppress(OSError, sqlite3.Error, ErrataError):
            ((patience,),) = connection.execute("PRAGMA busy_timeout").fetchall()
            connection.execute("PRAGMA busy_timeout = 0")
            try:
                connection.execute("BEGIN IMMEDIATE")
                self.files.sweep(self.recorded())
            finally:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                connection.execute(f"PRAGMA busy_timeout = {patience}")


def _never_written(error: ErrataError) -> bool:
    """Say whether an error of COMMIT means that nothing of the change is on disk.

    Space runs out before the last page, the one that makes a change count, is whole. Any other
    error may come after it, a failed sync for instance.
    """
    text = str(error.__cause__).lower()
    return "full" in text or "no transaction" in text
