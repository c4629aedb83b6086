"""The ledger: the durable store of edits and of every apply and revert."""

from errata.edits.ledger.exchange import read_export, write_export
from errata.edits.ledger.schema import Event
from errata.edits.ledger.store import Ledger

__all__ = ["Event", "Ledger", "read_export", "write_export"]
