"""Taking over what other processes write to the ledger of a served model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.editor import Editor


class Follower:
    """Keeps a live editor at what its ledger says, whoever wrote it.

    Args:
        editor: whose model.
    """

    def __init__(self, editor: Editor) -> None:
        self._editor = editor
        self._behind = False  # the ledger changed, and refreshing failed so far

    def catch_up(self) -> None:
        """Sync the model with the ledger; cheap when it is unchanged.

        Raises what `Editor.refresh` raises, at every call until it succeeds: a model that lags
        behind its ledger would contradict what the server says about its edits.
        """
        ledger = self._editor.ledger
        newest = ledger.events(1)
        if not self._behind and (not newest or newest[0].number <= ledger.head):
            return
        self._behind = True
        self._editor.refresh()
        self._behind = False
