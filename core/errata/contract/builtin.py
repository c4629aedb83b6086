"""The core's own plugin: it comes in through the same door as everybody's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata.edits.delta import CORE_KINDS
from errata.edits.stack import Entry

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.model.model import Model


class CoreEditing:
    """Applies and reverts edits of every delta kind, by refolding the stack."""

    @hookimpl(trylast=True)
    def apply(self, model: Model, edit: Edit) -> bool:
        """Put the edit into the stack at its place in the ledger's order."""
        model.stack.add(Entry(edit.sequence, edit.id, edit.delta))
        return True

    @hookimpl(trylast=True)
    def revert(self, model: Model, edit: Edit) -> bool:
        """Take the edit out of the stack."""
        model.stack.remove(edit.id)
        return True

    @hookimpl
    def delta_kinds(self) -> Sequence[type[Delta]]:
        """Return the kinds that the core knows."""
        return CORE_KINDS
