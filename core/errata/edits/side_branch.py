"""Weight edits beside the weights: y = W x + U (Vᵀ x), so that shared and quantised W stay as is.

The branch of a module computes in fp32 (or wider) and is rounded once, to the module's dtype. Which
edits it takes may differ from row to row of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta.adapter_layers import base_layer
from errata.edits.factors import changes, linear_of
from errata.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from errata.edits.delta.base import Undo
    from errata.edits.edit import Edit
    from errata.model.model import Model


def attach(model: Model, entries: Sequence[Edit]) -> Undo:
    """Hang weight edits beside the modules whose weights they change; return the undo.

    Raises `CapabilityError` for an edit that changes what is no linear module's weight.
    """
    handles = []
    for name in sorted({n for entry in entries for n in entry.delta.parameters}):
        own = [entry for entry in entries if name in entry.delta.parameters]
        branch = _Branch(model, name, own)
        module = base_layer(model.module, linear_of(model, name))  # beneath any adapter
        handles.append(module.register_forward_hook(branch))

    def undo() -> None:
        while handles:
            handles.pop().remove()

    return undo


class _Branch:
    """The edits of one module, as a forward hook."""

    def __init__(self, model: Model, name: str, entries: Sequence[Edit]) -> None:
        self._model = model
        self._name = name
        self._entries = tuple(entries)
        self._factors: dict[frozenset[str], tuple[Tensor, Tensor] | None] = {}
        self._of(frozenset(entry.id for entry in entries))  # fails here, not in a forward

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the branch to the module's output."""
        x: Tensor = args[0]
        everything = frozenset(entry.id for entry in self._entries)
        rows = self._model.row_edits
        if rows is None:
            return self._add(x, output, everything)
        wanted = [everything & row for row in rows]
        if len(set(wanted)) == 1:
            return self._add(x, output, wanted[0])
        # Some models flatten rows and tokens; beams repeat each row.
        total = x.shape[0]
        if total % len(wanted):
            raise ConfigError(
                f"Edits were chosen for {len(wanted)} rows, but a batch has {total}: "
                "give one set of edits for each row."
            )
        each = total // len(wanted)
        output = output.clone()
        for ids in dict.fromkeys(wanted):
            index = torch.tensor(
                [r * each + i for r, own in enumerate(wanted) if own == ids for i in range(each)],
                device=x.device,
            )
            output[index] = self._add(x[index], output[index], ids)
        return output

    def _add(self, x: Tensor, output: Tensor, ids: frozenset[str]) -> Tensor:
        pair = self._of(ids)
        if pair is None:
            return output
        u, v = pair
        added = (x.to(u.dtype) @ v) @ u.T
        return (output.to(u.dtype) + added).to(output.dtype)

    def _of(self, ids: frozenset[str]) -> tuple[Tensor, Tensor] | None:
        """Return the factors of some of the edits, folded together; None for none of them."""
        if ids not in self._factors:
            own = [entry for entry in self._entries if entry.id in ids]
            self._factors[ids] = None
            if own:
                (change,) = changes(self._model, own, only=self._name)
                device = self._model.parameters[self._name].device
                self._factors[ids] = change.u.to(device), change.v.to(device)
        return self._factors[ids]
