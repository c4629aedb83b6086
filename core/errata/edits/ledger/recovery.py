"""Edits whose files are there and whose records are not: found, read and held to be sound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.edits.ledger import content
from errata.edits.ledger.files import RECOVER, DeltaFiles
from errata.edits.ledger.schema import parse_record
from errata.errors import ErrataError, IntegrityError

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit

SHOWN = 3


def lost_text(lost: Sequence[str], where: str) -> str:
    """Say which files have no record, and what to do about it."""
    files = ", ".join(f"{digest[:12]}….safetensors" for digest in lost[:SHOWN])
    more = f" and {len(lost) - SHOWN} more" if len(lost) > SHOWN else ""
    return (
        f"The ledger {where} has no record of {len(lost)} of the files in its blobs ({files}{more})"
        ": part of its database was lost, or a process was killed while it recorded an edit. Take "
        f"the edits back in with {RECOVER}."
    )


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
        raise IntegrityError(
            f"{source} holds no record: it was written by an earlier errata, which kept records in "
            "the database alone."
        )
    edit = parse_record({**record, "blob": digest}, f"The record in {source.lower()}")
    delta = content.build(content.decode(data, edit.delta_kind, source), kinds, source)
    if delta.nbytes != edit.nbytes:
        raise IntegrityError(
            f"{source} has {delta.nbytes} bytes of tensors; its record says {edit.nbytes}."
        )
    return edit, delta
