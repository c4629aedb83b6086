"""The files of a ledger's deltas: named by their content, written whole, or kept in memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from errata.edits.ledger.schema import DATABASE
from errata.errors import IntegrityError, StorageError
from errata.model.storage import make_folder, read_bytes, sha256, sync_folder, write_bytes


class DeltaFiles:
    """Bytes by their SHA-256, as `blobs/ab/abcd….safetensors` in a folder; None keeps them here.

    Written only under the ledger's write lock, so that while it is held every file in `tmp` is
    an orphan, and what a transaction added can be taken away again when it fails.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._memory: dict[str, bytes] = {}
        self._fresh: list[str] = []  # first written by the transaction in progress
        self._unsynced: set[Path] = set()  # folders with renames that may not be on disk yet

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
            make_folder(needed)
        if not path.exists():
            self._fresh.append(digest)
        self._unsynced.add(path.parent)
        write_bytes(path, data, scratch, sync_parent=False)
        return digest

    def flush(self) -> None:
        """Make every written file durable: each folder is synced once for the whole change."""
        for folder in sorted(self._unsynced):
            try:
                sync_folder(folder)
            except OSError as error:
                raise StorageError(f"Cannot write {folder}: {error.strerror or error}.") from error

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
            raise IntegrityError(f"{source} is missing: {path} is not there. Restore it.") from None

    def settle(self) -> None:
        """Keep what the transaction in progress wrote."""
        self._fresh.clear()
        self._unsynced.clear()

    def discard(self) -> None:
        """Take away what a failed transaction wrote; a file left over would do no harm."""
        for digest in self._fresh:
            if self._folder is None:
                self._memory.pop(digest, None)
            else:
                with suppress(OSError):
                    self._path(self._folder, digest).unlink(missing_ok=True)
        self.settle()

    def orphans(self) -> list[Path]:
        """Return the half-written files; theirs are orphans only while the write lock is held."""
        if self._folder is None:
            return []
        return sorted((self._folder / "tmp").glob(".*.tmp"))

    @staticmethod
    def _path(folder: Path, digest: str) -> Path:
        return folder / f"blobs/{digest[:2]}/{digest}.safetensors"


SMALLEST = 512
"""Bytes of the smallest page, and so of the smallest file, that SQLite writes."""


def refuse_lost_database(folder: Path) -> None:
    """Never start an empty ledger over the deltas of one whose database is gone."""
    database = folder / DATABASE
    if database.exists() and not database.is_file():
        raise IntegrityError(f"{database} is not a file: {folder} is no ledger.")
    size = database.stat().st_size if database.exists() else 0
    if 0 < size < SMALLEST:  # SQLite takes such a stump for a new, empty database
        raise IntegrityError(f"{database} was cut off: restore that file from a copy.")
    if not size and any((folder / "blobs").glob("*/*.safetensors")):
        raise IntegrityError(
            f"{folder} has deltas but no {DATABASE}: restore that file from a copy, or give "
            "another folder."
        )
