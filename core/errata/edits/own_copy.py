"""Deltas with tensors of their own: what a model's tensors become later is none of theirs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.model.model import Model


def own_copy(delta: Delta, model: Model) -> Delta:
    """Return the delta, or a copy where it holds memory of the model's, or a part of a graph.

    A tensor that is the live parameter, or a view of it, would change with the first fold, and
    what is recorded be another delta than the one on the model.

    Raises `IntegrityError` for a delta that cannot be rebuilt from what it stores.
    """
    live = {_storage(t) for t in (*model.parameters.values(), *model.buffers.values())} - {0}
    if not any(t.requires_grad or _storage(t) in live for t in _held(delta)):
        return delta
    parts = {name: tensor.detach().clone() for name, tensor in delta.tensors().items()}
    return type(delta).from_parts(parts, delta.metadata())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _held(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield every tensor that an object holds, whatever its attributes are made of.

    `Delta.tensors` will not do: it copies what is not contiguous, so views do not show.
    """
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for part in thing.values():
            yield from _held(part, seen)
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for part in thing:
            yield from _held(part, seen)
    elif not isinstance(thing, type) and hasattr(thing, "__dict__"):
        yield from _held(vars(thing), seen)
