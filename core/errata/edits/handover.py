"""What a closed editor leaves on a model, and how the next one of its ledger takes it over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from errata.edits.stack import Stack

_LEFT: WeakKeyDictionary[Stack, Path] = WeakKeyDictionary()


def leave(stack: Stack, ledger: Path | None) -> None:
    """Close a stack: what is on its model stays, and an editor of the same ledger may have it."""
    stack.closed = True
    if ledger is not None and stack.ids:
        _LEFT[stack] = ledger.resolve()


def take_over(model: object, ledger: Path | None) -> None:
    """Take off a live model what a closed editor left, for the same ledger to put it on again.

    Otherwise the next editor would take those edits for the model's own, and put them on twice.

    Raises `IntegrityError` where other code changed the model meanwhile.
    """
    module = model[0] if isinstance(model, tuple) else model
    for stack, folder in list(_LEFT.items()):
        if stack.module is module and ledger is not None and ledger.resolve() == folder:
            del _LEFT[stack]
            stack.closed = False
            try:
                stack.set([])
            finally:
                stack.closed = True
