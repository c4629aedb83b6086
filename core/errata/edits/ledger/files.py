"""The files of a ledger's deltas: named by their content, written whole, or kept in memory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from errata.common.scratch import unfinished
from errata.common.storage import (
    check_length,
    make_folder,
    read_bytes,
    replace_whole,
    sha256,
    sync_folder,
)
from errata.edits.ledger.schema import DATABASE, DIGEST, RECOVER, holds_ledger
from errata.errors import IntegrityError, StorageError, disk

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600
"""A ledger is its owner's: requests may hold what nobody else should read."""
LOCK = ".lock"
"""Held by the command that changes a ledger."""
OWN = {DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm", LOCK, "blobs", "tmp"}
"""What a ledger's folder holds."""
BEGUN = "begun-"
"""How the lists in `tmp` begin: of the files that a change has written and not yet recorded."""


class DeltaFiles:
    """Bytes by their SHA-256, as `blobs/ab/abcd….safetensors` in a folder; None keeps them here.

    Written only under the ledger's write lock, so that while it is held every file in `tmp` is
    a killed process's, and what a transaction added can be taken away again when it fails.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}
        self._fresh: list[str] = []  # first written by the transaction in progress
        self._unsynced: set[Path] = set()  # folders with renames that may not be on disk yet
        self._begun: Path | None = None  # names what the transaction in progress has written

    def write(self, data: bytes) -> str:
        """Store bytes, durably once flushed; return their SHA-256. A file there is replaced.

        (It may be damaged, or left by a killed process whose rename never reached the disk.)
        """
        digest = sha256(data)
        if self._folder is None:
            if digest not in self._memory:
                self._fresh.append(digest)
            self._memory[digest] = data
            return digest
        path = self._path(self._folder, digest)
        scratch = self._folder / "tmp"
        for needed in (scratch, self._folder / "blobs", path.parent):
            make_folder(needed, PRIVATE_FOLDER)
        if not path.exists():
            self._fresh.append(digest)
        self._unsynced.add(path.parent)
        self._begin(scratch, digest)
        # Its own orphans are swept under the write lock: no note of each of thousands is needed.
        replace_whole(path, data, unfinished(path, scratch), sync_parent=False, mode=PRIVATE_FILE)
        return digest

    def flush(self) -> None:
        """Make every written file durable: each folder is synced once for the whole change."""
        for folder in sorted(self._unsynced):
            with disk(f"write {folder}"):
                sync_folder(folder)

    def read(self, digest: str, source: str) -> bytes:
        """Return the bytes of a SHA-256, verified; raise `IntegrityError` naming `source`."""
        if self._folder is None:
            data = self._memory.get(digest)
            if data is None:
                raise IntegrityError(f"{source} is missing.")
            return data
        path = self._path(self._folder, digest)
        try:
            return read_bytes(path, digest)
        except StorageError:
            if path.is_file():
                raise
            raise IntegrityError(f"{source} is missing: put {path} back.") from None

    def look(self, digest: str) -> str:
        """Return "sound", "missing" or "damaged" by a file's presence, header and length.

        Its tensors are not read. How long the file should be is what its header says: a kind's
        `nbytes` may count texts as well, which stand in the header.
        """
        if self._folder is None:
            return "sound" if digest in self._memory else "missing"
        try:
            check_length(self._path(self._folder, digest))
        except (IntegrityError, StorageError) as error:
            return "missing" if isinstance(error.__cause__, FileNotFoundError) else "damaged"
        return "sound"

    def settle(self) -> None:
        """Keep what the transaction in progress wrote."""
        self._fresh.clear()
        self._unsynced.clear()
        begun, self._begun = self._begun, None
        if begun is not None:
            with suppress(OSError):
                begun.unlink(missing_ok=True)

    def leave_unreported(self) -> None:
        """Keep what the transaction in progress wrote, and listed: it may be recorded, or not."""
        self._begun = None

    @property
    def written(self) -> int:
        """How many new files the transaction in progress has."""
        return len(self._fresh)

    def discard(self, since: int = 0, kept: Collection[str] = ()) -> None:
        """Take away what a failed transaction wrote, or its part since so many were `written`.

        Files `kept` stay: another process has recorded them since. A file left over would do no
        harm, but would be named as one without a record.
        """
        gone, self._fresh = self._fresh[since:], self._fresh[:since]
        for digest in gone:
            if digest in kept:
                continue
            if self._folder is None:
                self._memory.pop(digest, None)
            else:
                with suppress(OSError):
                    self._path(self._folder, digest).unlink(missing_ok=True)

    def digests(self) -> set[str]:
        """Return the SHA-256, by their names, of all files that are there."""
        if self._folder is None:
            return set(self._memory)
        names = (path.stem for path in (self._folder / "blobs").glob("*/*.safetensors"))
        return {name for name in names if DIGEST.fullmatch(name)}

    def delete(self, digests: Iterable[str]) -> None:
        """Delete files for good. Raises `StorageError` when the disk refuses."""
        for digest in digests:
            if self._folder is None:
                self._memory.pop(digest, None)
                continue
            path = self._path(self._folder, digest)
            with disk(f"delete {path}"):
                path.unlink(missing_ok=True)

    def begun(self) -> set[str]:
        """Return the SHA-256 of the files of changes that did not end: killed, or going on."""
        return {digest for path in self._lists() for digest in _lines(path)}

    def leftovers(self) -> list[Path]:
        """Return what killed processes leave in `tmp`; all of it only while the lock is held."""
        if self._folder is None:
            return []
        return [*sorted((self._folder / "tmp").glob(".*.tmp")), *self._lists()]

    def sweep(self, recorded: Collection[str]) -> None:
        """Delete half-written files, and lists of files that are recorded or gone by now."""
        unknown = self.digests() - set(recorded)
        lists = set(self._lists())
        for path in self.leftovers():
            if path not in lists or unknown.isdisjoint(_lines(path)):
                path.unlink(missing_ok=True)

    def _begin(self, scratch: Path, digest: str) -> None:
        """List a file before it is written: were the process killed, its edit was not reported.

        Without the list (a disk may refuse it) the file would count as one whose record was lost.
        """
        if self._begun is None:
            self._begun = scratch / f"{BEGUN}{os.getpid()}-{secrets.token_hex(4)}"
        with suppress(OSError), self._begun.open("a", encoding="ascii") as handle:
            handle.write(f"{digest}\n")

    def _lists(self) -> list[Path]:
        return sorted((self._folder / "tmp").glob(f"{BEGUN}*")) if self._folder else []

    @staticmethod
    def _path(folder: Path, digest: str) -> Path:
        return folder / f"blobs/{digest[:2]}/{digest}.safetensors"


def _lines(path: Path) -> set[str]:
    try:
        return {line for line in path.read_text("ascii").split("\n") if DIGEST.fullmatch(line)}
    except (OSError, UnicodeError):  # its process has ended it just now, or it is not ours
        return set()


SMALLEST = 512
"""Bytes of the smallest page, and so of the smallest file, that SQLite writes."""


def refuse_lost_database(folder: Path) -> None:
    """Never start an empty ledger over the deltas of one whose database is gone."""
    database = folder / DATABASE
    if database.exists() and not database.is_file():
        raise IntegrityError(f"{database} is not a file: {folder} is no ledger.")
    size = database.stat().st_size if database.exists() else 0
    if 0 < size < SMALLEST:  # SQLite takes such a stump for a new, empty database
        raise IntegrityError(
            f"{database} was cut off: restore that file from a copy, or take the edits back in "
            f"from their files ({RECOVER})."
        )
    if any((folder / "blobs").glob("*/*.safetensors")) and not holds_ledger(folder):
        raise IntegrityError(
            f"{folder} has deltas but no {DATABASE}, or an empty one: restore that file from a "
            f"copy, take the edits back in from their files ({RECOVER}), or give another folder."
        )


def make_private(folder: Path) -> None:
    """Let only its owner read a ledger, also an old one, or one in a folder that existed.

    The folder itself is closed only when it holds nothing but the ledger: it may be a project's.
    What belongs to somebody else stays as it is.
    """
    with suppress(OSError):
        inside = {path.name for path in folder.iterdir()}
        open_blobs = (folder / "blobs").is_dir() and _close(folder / "blobs")
        for name in OWN & inside:
            _close(folder / name)
        if open_blobs:  # once: from then on nobody else gets in
            for path in (folder / "blobs").rglob("*"):
                _close(path)
        if inside <= OWN:
            _close(folder)


def _close(path: Path) -> bool:
    """Take every right of others away; say whether they had any."""
    with suppress(OSError):
        mode = path.stat().st_mode
        if mode & 0o077:
            path.chmod(mode & 0o700)
            return True
    return False
