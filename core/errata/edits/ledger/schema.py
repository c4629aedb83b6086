"""The database of a ledger: its tables, how it is opened, and how its rows are believed."""

from __future__ import annotations

import math
import re
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from errata.common.storage import canonical, parse_json, sha256, sync_folder
from errata.edits.edit import Edit, check_id
from errata.errors import ErrataError, IntegrityError, LedgerBusyError, LedgerError, StorageError

DATABASE = "ledger.sqlite"
APPLICATION = 0x65727261  # "erra": SQLite's application_id, which tells our files from others
VERSION = 1
NONE = "There is no ledger at {}: check the path, or create it."
TIMEOUT = 10.0
"""Seconds to wait for another process that writes."""
RECOVER = "`errata log --recover`, or `Ledger.open(folder, recover=True)` and its `recover`"
"""What brings back edits whose files are there and whose records are not."""
DISCARD = "`errata log --discard-lost`, or `Ledger.discard_lost`"
"""What deletes such files."""

# Rows are only ever added. What changes are `active` (a cache of the last apply or revert) and
# the outcome inside `record`; both changes are events too, and `verify` compares.
TABLES = (
    """CREATE TABLE edits (
  sequence INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  active INTEGER NOT NULL,
  record TEXT NOT NULL,
  digest TEXT NOT NULL
)""",
    """CREATE TABLE requests (
  digest TEXT NOT NULL,
  sequence INTEGER NOT NULL REFERENCES edits (sequence),
  PRIMARY KEY (digest, sequence)
) WITHOUT ROWID""",
    """CREATE TABLE events (
  number INTEGER PRIMARY KEY,
  time TEXT NOT NULL,
  kind TEXT NOT NULL,
  edit_id TEXT,
  detail TEXT NOT NULL,
  digest TEXT NOT NULL
)""",
)

STATE_KINDS = ("edit", "apply", "revert")
"""Events that change which edits there are or which are active."""
KINDS = (*STATE_KINDS, "outcome", "refuse")
"""Events that the ledger writes itself; notes are of any other kind."""
NOTE_KIND = re.compile(r"[a-z][a-z0-9_-]{0,31}")
DIGEST = re.compile(r"[0-9a-f]{64}")

Row = tuple[Any, ...]
VERIFIED = {"verified": True}
"""Marks a warning about what `verify` says as well (`extra` of a log record)."""


@dataclass(frozen=True)
class Event:
    """One thing that happened, in order: `edit`, `apply`, `revert`, `outcome`, `refuse` or a note.

    Attributes:
        number: 1, 2, 3 … without gaps.
        time: UTC, ISO 8601.
        kind: what happened.
        edit_id: the edit it happened to, if any.
        detail: plain JSON; for `refuse` the method, requests, config, reason and measured values.
    """

    number: int
    time: str
    kind: str
    edit_id: str | None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def link(self, previous: str) -> str:
        """Return the digest that ties this event to the one before it."""
        parts = [previous, self.number, self.time, self.kind, self.edit_id, dict(self.detail)]
        return sha256(canonical(parts).encode())


# -- errors ----------------------------------------------------------------------------------------


@contextmanager
def translated(where: str) -> Iterator[None]:
    """Turn SQLite's errors into errata's own."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, where) from error
    except OverflowError:
        raise IntegrityError(
            f"The ledger {where} is damaged: one of its numbers is too large to be one that errata "
            f"gave. Restore {DATABASE} from a copy."
        ) from None
    except UnicodeError as error:
        raise LedgerError(f"Text that is not valid Unicode cannot be stored: {error}") from None


def _translate(error: sqlite3.Error, where: str) -> ErrataError:
    # Messages, not codes: Python 3.10 does not carry SQLite's code on the exception.
    text = str(error).lower()
    if "locked" in text or "busy" in text:
        return LedgerBusyError(
            f"Another process is writing to the ledger {where} and was not done after "
            f"{TIMEOUT:g} s. Nothing was written: try again."
        )
    if any(words in text for words in ("full", "readonly", "unable to open", "disk i/o")):
        return StorageError(
            f"The disk refused the ledger {where}: {error}. Nothing was written: check free "
            "space and permissions."
        )
    return IntegrityError(
        f"The ledger {where} is damaged or is no ledger: {error}. Restore {DATABASE} from a copy, "
        f"or take the edits back in from their files ({RECOVER})."
    )


# -- opening ---------------------------------------------------------------------------------------


def connect(folder: Path | None, readonly: bool) -> sqlite3.Connection:
    """Open, check and where necessary create the database of a ledger's folder (None: memory)."""
    where = str(folder) if folder is not None else "in memory"
    if folder is None:
        connection = _open(":memory:")
    else:
        file = folder / DATABASE
        if readonly:
            connection = _open_readonly(file)
        else:
            with translated(where):
                connection = _open(file.absolute().as_uri() + "?mode=rwc")
    try:
        with translated(where):
            _configure(connection, folder is not None and readonly)
            _check(connection, where, create=folder is None or not readonly)
        if folder is not None and not readonly:
            try:
                sync_folder(folder)
            except OSError as error:
                raise StorageError(f"The disk refused the ledger {where}: {error}.") from error
    except BaseException:
        connection.close()
        raise
    return connection


def holds_ledger(folder: Path) -> bool:
    """Say whether a folder holds a ledger, sound or not; one with an empty database holds none.

    Who is killed, or meets a full disk, while it makes a ledger leaves such a database.
    """
    file = folder / DATABASE
    try:
        if not file.is_file():
            return False
        with closing(_open_readonly(file)) as connection:
            return not _is_empty(connection)
    except (ErrataError, sqlite3.Error, OSError):
        return True  # whoever opens it says what is wrong


def _open(target: str) -> sqlite3.Connection:
    return sqlite3.connect(
        target, uri=True, timeout=TIMEOUT, isolation_level=None, check_same_thread=False
    )


def _open_readonly(file: Path) -> sqlite3.Connection:
    if not file.is_file():
        raise LedgerError(NONE.format(file.parent))
    uri = file.absolute().as_uri()
    with translated(str(file.parent)):
        connection = _open(uri + "?mode=ro")
        try:
            connection.execute("SELECT 1 FROM sqlite_master").fetchone()
            return connection
        except sqlite3.OperationalError:
            connection.close()
            wal = file.with_name(file.name + "-wal")
            if wal.exists() and wal.stat().st_size:
                raise
        # WAL needs a shared-memory file; on a read-only medium nobody can create it, and nobody
        # can write the database either, so it is safe to read it as it is.
        return _open(uri + "?immutable=1")


def _configure(connection: sqlite3.Connection, readonly: bool) -> None:
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA foreign_keys = ON")
    if readonly:
        connection.execute("PRAGMA query_only = ON")
        return
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            # Two processes that create one ledger at once: SQLite does not wait here by itself.
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = FULL")


def _check(connection: sqlite3.Connection, where: str, create: bool) -> None:
    """Refuse any database that is not exactly ours; create the tables in an empty one.

    The comparison with the text of our tables also keeps out triggers and views, the only
    things in a database file that SQLite would run.
    """
    if _is_empty(connection):
        if not create:
            raise LedgerError(NONE.format(where))
        connection.execute("BEGIN IMMEDIATE")
        try:
            if _is_empty(connection):
                for statement in TABLES:
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application != APPLICATION:
        raise IntegrityError(
            f"{where}/{DATABASE} is a SQLite database, but not a ledger. Give another folder."
        )
    if version > VERSION:
        raise LedgerError(
            f"The ledger {where} has format {version}; this errata reads up to {VERSION}. "
            "Upgrade errata."
        )
    found = connection.execute(
        "SELECT sql FROM sqlite_master WHERE name NOT LIKE 'sqlite\\_%' ESCAPE '\\'"
    )
    if version != VERSION or sorted(str(row[0]) for row in found) != sorted(TABLES):
        raise IntegrityError(
            f"{where}/{DATABASE} does not have the tables of a ledger: it is damaged or was "
            "changed by another program. Restore it from a copy, or take the edits back in from "
            f"their files ({RECOVER})."
        )


def _is_empty(connection: sqlite3.Connection) -> bool:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    return bool(application == 0 and objects == 0)


# -- rows ------------------------------------------------------------------------------------------


def plain(value: Any, where: str) -> Any:
    """Return a value as plain JSON; NaN and infinities become the words "nan", "inf", "-inf".

    Those words parse back to the same floats, and a refused edit's perplexity may well be one.
    Raises `LedgerError` naming the place of anything that JSON cannot say.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value) if isinstance(value, (set, frozenset)) else value
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(items)]
    raise LedgerError(
        f"{where} is a {type(value).__name__}, which a ledger cannot record: give numbers, text, "
        "lists and mappings."
    )


def record_text(edit: Edit) -> str:
    """Return the canonical JSON of a record, or raise `LedgerError` when it has none."""
    clean = edit.model_copy(update={"config": plain(edit.config, "config")})
    try:
        return canonical(plain(clean.model_dump(mode="json"), "edit"))
    except (ErrataError, ValueError) as error:
        raise LedgerError(f"Edit {edit.id} cannot be recorded: {error}") from None


def parse_record(data: Any, source: str) -> Edit:
    """Return a record from parsed JSON, or raise `IntegrityError` saying what does not fit."""
    try:
        edit = Edit.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{source} is no sound record: {where}: {first['msg']}") from None
    if not math.isfinite(edit.seconds):
        raise IntegrityError(f"{source} is no sound record: seconds is not finite")
    if not DIGEST.fullmatch(edit.blob):
        raise IntegrityError(f"{source} is no sound record: {edit.blob!r} is no SHA-256")
    return edit


def edit_of(row: Row) -> Edit:
    """Return the record of a row (sequence, id, active, record, digest), verified."""
    sequence, name, active, text, digest = row
    source = f"The ledger's record {sequence}"
    if not isinstance(text, str) or sha256(text.encode()) != digest:
        raise IntegrityError(f"{source} is damaged: its content does not have its SHA-256.")
    edit = parse_record(parse_json(text, source), source)
    if (edit.sequence, edit.id) != (sequence, name) or active not in (0, 1):
        raise IntegrityError(f"{source} is damaged: it is filed under {name!r}, not {edit.id!r}.")
    return edit


def events_of(rows: Sequence[Row], previous: str) -> list[Event]:
    """Return the events of consecutive rows (number, …, digest), each tied to the one before."""
    events: list[Event] = []
    number = rows[0][0] if rows else 0
    for row in rows:
        source = f"The ledger's event {row[0]}"
        detail = parse_json(row[4], source)
        event = Event(row[0], row[1], row[2], row[3], detail)
        sound = (
            isinstance(detail, dict)
            and isinstance(event.time, str)
            and isinstance(event.kind, str)
            and NOTE_KIND.fullmatch(event.kind) is not None
            and event.number == number
        )
        if not sound or event.link(previous) != row[5]:
            raise IntegrityError(
                f"{source} is damaged, or one before it is missing: its digest does not follow."
            )
        if event.edit_id is not None:
            check_id(event.edit_id)
        events.append(event)
        previous = row[5]
        number += 1
    return events
