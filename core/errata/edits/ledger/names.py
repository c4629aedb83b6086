"""The ids of a ledger's edits by their beginnings."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from errata.errors import UnknownNameError

if TYPE_CHECKING:
    from errata.edits.ledger.database import Database

HEX = frozenset("0123456789abcdef")


def resolve(database: Database, name: str) -> str:
    """Return the full id for a unique beginning of one, or raise `UnknownNameError`."""
    if isinstance(name, str) and name and set(name) <= HEX:
        # "g" follows "f": the range holds exactly the ids that begin so.
        query = "SELECT id FROM edits WHERE id >= ? AND id < ? ORDER BY id LIMIT 9"
        rows = database.rows(query, (name, name + "g"))
        if len(rows) == 1:
            return str(rows[0][0])
        if rows:
            raise UnknownNameError(
                "edit", name, [row[0] for row in rows], "It fits several: give more digits."
            )
    raise _unknown(
        name, [row[0] for row in database.rows("SELECT id FROM edits ORDER BY sequence")]
    )


def _unknown(name: object, ids: list[str]) -> UnknownNameError:
    shown = name if isinstance(name, str) else repr(name)
    shown = shown if len(shown) <= 80 else shown[:79] + "…"
    close = difflib.get_close_matches(shown, ids, n=1, cutoff=0.5)
    known = dict.fromkeys([*close, *ids[-8:]])
    more = len(ids) - len(known)
    return UnknownNameError("edit", shown, known, f"({more} older ones.)" if more > 0 else "")
