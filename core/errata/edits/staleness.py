"""What an edit was computed on top of, and whether that is still there.

An edit that sees the model as it is stands on all that is active. Records do not list that: each
names one edit below it, which stands for what it was computed on, too. So the ledger of a sequence
grows with its length, not with the square of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.edits.edit import Edit


def stale_ids(edits: Iterable[Edit], there: Collection[str]) -> list[str]:
    """Return the ids of those edits that were computed on top of one that is not there.

    Args:
        edits: those that are asked about, and all whose ids are there, as far as their records can
            be read.
        there: ids of edits that were not taken off.
    """
    there = set(there)
    records = {edit.id: edit for edit in edits}
    sound: dict[str, bool] = {}
    for name in records:
        chain: list[str] = []
        below: str | None = name
        while below in records and below not in sound:
            chain.append(below)
            sound[below] = True  # until known better: ends a circle
            below = records[below].on_top_of
        for one in reversed(chain):
            edit = records[one]
            sound[one] = there.issuperset(edit.parents) and (
                edit.on_top_of is None
                or (edit.on_top_of in there and sound.get(edit.on_top_of, True))
            )
    return [name for name in records if not sound[name]]


def computed_on(active: Sequence[Edit]) -> tuple[str | None, tuple[str, ...]]:
    """Return `on_top_of` and `parents` of an edit that is computed while these are active."""
    records = {edit.id: edit for edit in active}
    stale = set(stale_ids(active, records))
    firm = [edit for edit in active if edit.id not in stale]
    if not firm:
        return None, tuple(records)
    # The latest firm edit that stands on others covers most of them. A stale one would also cover
    # edits that are off.
    standing = [edit for edit in firm if edit.on_top_of or edit.parents]
    top = below = (standing or firm)[-1]
    covered = {top.id, *top.parents}
    while below.on_top_of:
        below = records[below.on_top_of]
        covered |= {below.id, *below.parents}
    return top.id, tuple(name for name in records if name not in covered)
