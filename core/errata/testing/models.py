"""Helpers on models for tests: their state as a dictionary, and a copy that differs."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from errata.edits.edit import Edit
from errata.edits.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from errata.editor import Editor
    from errata.edits.delta import Delta
    from errata.model.model import Model


def edit_with(sequence: int, edit_id: str, delta: Delta) -> Edit:
    """Return a bare record with a delta, as a stack holds it: only what folding needs is true."""
    return Edit.model_construct(
        id=edit_id, sequence=sequence, method="test", delta_kind=delta.kind, requests=(),
        config={}, fingerprint={}, parents=(), outcome=Outcome(), artifacts={},
    ).bind(delta)  # fmt: skip


def state_of(model: Model) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer of the live model, by its base name."""
    live = {**model.parameters, **model.buffers}
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def perturbed(editor: Editor) -> nn.Module:
    """Return a copy of the editor's base module in which one entry of every matrix differs."""
    with editor.disabled():
        other = copy.deepcopy(editor.model.module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter[0, 0] += 0.5
    return other
