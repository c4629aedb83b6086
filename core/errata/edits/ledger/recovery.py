"""Edits whose files are there and whose records are not: found, read and checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from errata.edits.ledger import content
from errata.edits.ledger.files import SMALLEST, DeltaFiles
from errata.edits.ledger.schema import (
    APPLICATION,
    DATABASE,
    DISCARD,
    RECOVER,
    VERIFIED,
    connect,
    parse_record,
    translated,
)
from errata.errors import ErrataError, IntegrityError, disk, first_few

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit

logger = logging.getLogger("errata")
MAGIC, APPLICATION_AT = b"SQLite format 3\0", slice(68, 72)
"""How a database begins, and where its header says whose it is."""


def set_damaged_aside(folder: Path) -> None:
    """Rename a ledger's database that SQLite cannot read whole, so that a new one is begun.

    Nothing is deleted. What names the files of deltas is lost with it; they name their edits.

    Raises `IntegrityError` for another program's database and `StorageError` when the disk
    refuses.
    """
    file = folder / DATABASE
    if not file.is_file():
        return
    try:
        why = _damage(folder)
    except IntegrityError as error:
        with file.open("rb") as opened:
            header = opened.read(100)
        if header.startswith(MAGIC) and header[APPLICATION_AT] not in (
            APPLICATION.to_bytes(4, "big"),
            bytes(4),
        ):
            raise
        why = str(error)
    if not why:
        return
    logger.debug("%s: %s", file, why)
    aside = _free(file)
    with disk(f"rename {file}"):
        for end in ("-wal", "-shm", ""):  # the database last: it is what the next look finds
            part = file.with_name(file.name + end)
            if part.exists():
                part.rename(aside.with_name(aside.name + end))
    logger.warning("%s is damaged: it is %s now, and a new one is begun.", file, aside.name)


def _damage(folder: Path) -> str:
    """Return the first thing that is wrong with a ledger's database; "" for nothing."""
    if 0 < (folder / DATABASE).stat().st_size < SMALLEST:
        return "it was cut off"  # SQLite would take it for a new one, and write over it
    with closing(connect(folder, readonly=False)) as connection:
        with translated(str(folder)):
            (found,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    return "" if found == "ok" else str(found)


def _free(file: Path) -> Path:
    """Return a name beside a file that nothing has."""
    number = 1
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    return aside


def lost_text(lost: Sequence[str], where: str) -> str:
    """Say which files have lost their record, and what to do about it."""
    return (
        f"The ledger {where} has no record of {len(lost)} of the files in its blobs "
        f"({_names(lost)}): part of its database was lost. Take the edits back in with "
        f"{RECOVER}; or delete the files with {DISCARD}."
    )


def unreported_text(left: Sequence[str], where: str) -> str:
    """Say which files a killed process left, and what can be done with them."""
    return (
        f"{len(left)} of the files in the blobs of {where} are of edits that no call reported as "
        f"done ({_names(left)}): their process was killed before, or is at work, or the disk "
        f"refused the record. They do no harm. Delete them with {DISCARD}; or take the edits in, "
        f"off the model, with {RECOVER}."
    )


def _names(digests: Sequence[str]) -> str:
    return first_few(f"{digest[:12]}….safetensors" for digest in digests)


def warn_of_lost(lost: Sequence[str], where: str) -> None:
    """Log what `lost_text` says."""
    logger.warning("%s", lost_text(lost, where), extra=VERIFIED)


def lost_edits(
    files: DeltaFiles, lost: Sequence[str], kinds: Mapping[str, type[Delta]]
) -> tuple[list[tuple[Edit, Delta]], dict[str, str]]:
    """Return the edits of files with their deltas, in their former order, all of it validated.

    The second part is the name of each file that cannot be taken back → the reason.
    """
    pairs: list[tuple[Edit, Delta]] = []
    refused: dict[str, str] = {}
    for digest in lost:
        try:
            pairs.append(_read(files, digest, kinds))
        except ErrataError as error:
            refused[digest] = str(error)
    pairs.sort(key=lambda pair: (pair[0].sequence, pair[0].created, pair[0].id))
    return pairs, refused


def _read(files: DeltaFiles, digest: str, kinds: Mapping[str, type[Delta]]) -> tuple[Edit, Delta]:
    source = f"The file {digest[:12]}….safetensors"
    data = files.read(digest, source)
    record = content.record_of(data, source)
    if not isinstance(record, dict):
        raise IntegrityError(f"{source} holds no record of its edit.")
    edit = parse_record({**record, "blob": digest}, f"The record in {source.lower()}")
    parts = content.decode(data, edit.delta_kind, source)
    return edit, content.delta_of(edit, parts, kinds, source)
