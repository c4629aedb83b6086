"""What delta kinds do to a live model: called by name, and held to coming off without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

from errata.errors import CapabilityError, PluginError, blaming
from errata.model.answers import Answers
from errata.model.structure import Structure

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.edits.delta.base import Delta, Undo
    from errata.model.model import Model


def calling(kind: type[Delta], what: str) -> AbstractContextManager[None]:
    """Name the kind whose method `what` failed in the block, unless it is errata's own."""
    own = kind.__module__.partition(".")[0] == "errata"
    return nullcontext() if own else blaming(f"{_name(kind)} failed in `{what}`")


def attach_kind(kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]]) -> Undo:
    """Hang all deltas of one kind on the model and return the undo.

    The first time on a model the undo is tried out at once, so that a kind that cannot be taken
    off again is refused before it is on the model. After an error the caller puts the module back.

    Raises:
        PluginError: `attach` returned no undo, or one that leaves something behind.
    """
    tried: set[type[Delta]] = model.remembered("kinds that come off", set)
    if kind in tried:
        return _attached(kind, model, deltas)
    before = Structure(model.module)
    _attached(kind, model, deltas)()
    left = before.changed()
    if left:
        raise PluginError(
            f"{_name(kind)} does not come off: after the "
            f"undo that its `attach` returned {', '.join(left[:5])} is not as it was. "
            "The undo must leave the module exactly as `attach` found it."
        )
    tried.add(kind)
    return _attached(kind, model, deltas)


def keep_from_saving(module: nn.Module, ids: Sequence[str]) -> Undo:
    """Let `save_pretrained` refuse while edits are hung on a module, and return the undo.

    It would leave them out, or write an adapter's tensors under names that no model has.
    """
    if not hasattr(module, "save_pretrained"):
        return lambda: None

    def save_pretrained(self: nn.Module, *_: Any, **__: Any) -> None:
        raise CapabilityError(
            f"{type(self).__name__} carries edits that are no part of its weights "
            f"({', '.join(ids)}), and would be saved without them. Merge them, export them, or "
            "save the base while they are off."
        )

    module.save_pretrained = MethodType(save_pretrained, module)  # type: ignore[assignment]
    return lambda: delattr(module, "save_pretrained")


def rewritten(
    kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]], prompts: Sequence[str]
) -> list[str]:
    """Return prompts as a kind wants them to be read; raise `PluginError` for anything else."""
    with calling(kind, "rewrite"):
        texts = kind.rewrite(model, deltas, prompts)
    _check_count(kind, "rewrite", texts, prompts)
    if not all(isinstance(text, str) for text in texts):
        raise PluginError(f"{_name(kind)} returned no texts from `rewrite`: {texts!r}.")
    return list(texts)


def responding(
    kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]], prompts: Sequence[str]
) -> list[Answers | None]:
    """Return who answers each prompt for a kind; raise `PluginError` for anything else."""
    with calling(kind, "respond"):
        found = kind.respond(model, deltas, prompts)
    _check_count(kind, "respond", found, prompts)
    for one in found:
        if one is not None and not isinstance(one, Answers):
            raise PluginError(
                f"{_name(kind)} returned {type(one).__name__} from `respond`; it must return None "
                "for a prompt that the model answers, or errata.model.answers.Answers."
            )
    return list(found)


def fold_kind(kind: type[Delta], name: str, accumulator: Tensor, deltas: Sequence[Delta]) -> None:
    """Add all deltas of one kind to an accumulator, in place."""
    with calling(kind, "fold"):
        kind.fold(name, accumulator, deltas)


def _attached(kind: type[Delta], model: Model, deltas: Sequence[tuple[str, Delta]]) -> Undo:
    with calling(kind, "attach"):
        undo = kind.attach(model, deltas)
    if not callable(undo):
        raise PluginError(
            f"{_name(kind)} returned {type(undo).__name__} from `attach`; it must return the "
            "function that undoes it."
        )

    def undone() -> None:
        with calling(kind, "the undo that its attach returned"):
            undo()

    return undone


def _name(kind: type[Delta]) -> str:
    return f"The delta kind {kind.kind!r} ({kind.__module__})"


def _check_count(kind: type[Delta], what: str, given: Any, prompts: Sequence[str]) -> None:
    if not isinstance(given, (list, tuple)) or len(given) != len(prompts):
        number = f"{len(given)} of them" if isinstance(given, (list, tuple)) else f"{given!r}"
        raise PluginError(
            f"{_name(kind)} was asked about {len(prompts)} prompts, and its `{what}` gave "
            f"{number}: it must return a list with one for each, in the same order."
        )
