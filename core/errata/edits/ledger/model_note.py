"""The note in a ledger that says how to open the model its edits were made on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.edits.ledger.store import Ledger

KIND = "model"


def model_of(ledger: Ledger) -> dict[str, Any]:
    """Return `name` and `dtype` that open a ledger's model again; empty if unknown."""
    note = ledger.last(KIND)
    return dict(note.detail) if note is not None else {}


def remember_model(ledger: Ledger, name: str, dtype: str | None) -> None:
    """Note what opens a ledger's model, where it is not what the ledger says already."""
    said = {"name": name, "dtype": dtype}
    if model_of(ledger) != said:
        ledger.note(KIND, said)
