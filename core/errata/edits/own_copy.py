"""Copies a delta's tensors, so that the method cannot change them later."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from errata.common.storage import canonical, parse_json
from errata.edits.delta_kinds import GROUP
from errata.edits.ledger import content
from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta


def own_copy(delta: Delta, kinds: Mapping[str, type[Delta]]) -> Delta:
    """Return a delta as the ledger will give it back: built from a copy of what it stores.

    A tensor may be the live parameter, a view of it, or a buffer that a method writes into at its
    next call: the edit on the model would then change, and not be the one that is recorded. Who
    else holds a tensor cannot be known, so all are copied. That takes no more memory than
    recording the delta does.

    Raises:
        IntegrityError: the ledger could not read it again: its kind is not installed, or what it
            stores is no JSON, has no values or does not make a delta of the kind.
        PluginError: the package of its kind is broken.
    """
    _check_kind(delta, kinds)
    kind, metadata, tensors = content.take(delta)
    copied = {name: _copied(name, tensor) for name, tensor in tensors.items()}
    parts = content.Parts(kind, parse_json(canonical(metadata)), copied)
    made = content.build(parts, kinds, "What it stores", "it")
    if made.made_with != delta.made_with:  # for the record alone: no part of what is stored
        made.made_with = dict(delta.made_with)
    return made


def _check_kind(delta: Delta, kinds: Mapping[str, type[Delta]]) -> None:
    """Raise `IntegrityError` unless a delta's class is the one that its kind is read with."""
    own = type(delta)
    place = f"{own.__module__}:{own.__qualname__}"
    if delta.kind not in kinds:
        raise IntegrityError(
            f"No installed package names the delta kind {delta.kind!r}, so that its edits could "
            f"not be read again. Add an entry point to the group {GROUP!r} "
            f"({delta.kind} = {place}), and install the package again."
        )
    known = kinds[delta.kind]
    if known is not own:
        raise IntegrityError(
            f"The delta kind {delta.kind!r} is read as {known.__module__}:{known.__qualname__}, "
            f"and this is a {place}: give it a kind of its own, with an entry point in the group "
            f"{GROUP!r}."
        )


def _copied(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that no graph and nobody else holds."""
    if not isinstance(tensor, torch.Tensor):
        raise IntegrityError(f"Its tensor {name!r} is of type {type(tensor).__name__}.")
    if tensor.is_meta or tensor.layout is not torch.strided:
        what = "on the meta device" if tensor.is_meta else f"of the layout {tensor.layout}"
        raise IntegrityError(f"Its tensor {name!r} is {what}, which cannot be stored.")
    return tensor.detach().clone(memory_format=torch.contiguous_format)
