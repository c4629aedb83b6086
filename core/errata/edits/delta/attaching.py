"""Hanging a delta kind on a live model, and holding it to coming off without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.errors import PluginError
from errata.model.structure import Structure

if TYPE_CHECKING:
    from errata.edits.delta.base import Delta, Undo
    from errata.model.model import Model


def attach_kind(kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]]) -> Undo:
    """Hang all deltas of one kind on the model and return the undo.

    The first time on a model the undo is tried out at once, so that a kind that cannot be taken
    off again is refused before it is on the model. After an error the caller puts the module back.

    Raises:
        PluginError: `attach` returned no undo, or one that leaves something behind.
    """
    tried = ("comes off", kind)
    if tried in model.memo:
        return _attached(kind, model, deltas)
    before = Structure(model.module)
    _attached(kind, model, deltas)()
    left = before.changed()
    if left:
        raise PluginError(
            f"The delta kind {kind.kind!r} ({kind.__module__}) does not come off: after "
            f"the undo that its `attach` returned {', '.join(left[:5])} is not as it was. "
            "The undo must leave the module exactly as `attach` found it."
        )
    model.memo[tried] = True
    return _attached(kind, model, deltas)


def _attached(kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]]) -> Undo:
    undo = kind.attach(model, deltas)
    if not callable(undo):
        raise PluginError(
            f"The delta kind {kind.kind!r} ({kind.__module__}) returned "
            f"{type(undo).__name__} from `attach`; it must return the function that undoes it."
        )
    return undo
