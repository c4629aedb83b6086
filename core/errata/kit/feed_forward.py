"""The feed-forward network of a block, for methods that add neurons to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import Field

from errata.contract.config import MethodConfig
from errata.edits.delta.neurons import ACTIVATIONS, Site
from errata.errors import CapabilityError
from errata.model.forward import trace
from errata.model.running import prepare, run

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy
    from errata.model.model import Model

_TRIED = "The capital of France is Paris."

_NAMES = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
"""What configurations call the activation of their feed-forward networks."""


class AddedNeuronsConfig(MethodConfig):
    """Hyper-parameters of a method that adds neurons to one block."""

    layer: int | None = Field(
        default=None, description="Block that gets the neurons; null: the last one with an MLP"
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layer written out."""
        last = anatomy.n_layers - 1
        layer = anatomy.nearest(last, "mlp") if self.layer is None else anatomy.layer(self.layer)
        return self.model_copy(update={"layer": layer})


def site_of(model: Model, layer: int, *, gated: bool = False) -> Site:
    """Return where neurons of a block's feed-forward network are, with the block's own activation.

    Raises:
        AnatomyError: the block has none that every token passes through.
        CapabilityError: an activation that neurons cannot have.
    """
    anatomy, activation = model.anatomy, activation_of(model, layer)
    if activation is None:
        raise CapabilityError(
            f"{model.name} ({anatomy.model_type}) activates its MLPs by "
            f"{_named(model) or 'a function that its configuration does not name'}; neurons "
            f"can be added where it is {', '.join(ACTIVATIONS)}."
        )
    return Site(anatomy.mlp_in(layer)[0], anatomy.mlp_out(layer), activation, gated)


def activation_of(model: Model, layer: int) -> str | None:
    """Return the activation of a block's feed-forward network if it is one of `ACTIVATIONS`.

    The configuration says so, or it is found in what the network computes of a short text: from
    its projections z and u it gives φ(z), or φ(z) u where it is gated.

    Raises `AnatomyError` for a block without one that every token passes through.
    """
    named = _named(model)
    return named if named in ACTIVATIONS else _computed(model, layer)


def _named(model: Model) -> str | None:
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in _NAMES)
    return next((name for name in found if isinstance(name, str)), None)


@torch.no_grad()
def _computed(model: Model, layer: int) -> str | None:
    from transformers.activations import ACT2FN

    ins, out = model.anatomy.mlp_in(layer), model.anatomy.mlp_out(layer)
    with trace(model.module, (*ins, out), inputs=True) as seen:
        run(model, prepare(model, [_TRIED]))
    key, parts = seen[out].input, [part for path in ins if (part := seen[path].output) is not None]
    assert key is not None
    if parts[0].shape[-1] == 2 * key.shape[-1]:  # gate and up in one
        parts = list(parts[0].chunk(2, dim=-1))
    pairs = [(parts[0], None)] if len(parts) == 1 else [tuple(parts), tuple(reversed(parts))]
    errors = {name: min(_error(ACT2FN[name](z), u, key) for z, u in pairs) for name in ACTIVATIONS}
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] <= 4 * torch.finfo(key.dtype).eps * float(key.abs().max()) else None


def _error(activated: Tensor, gate: Tensor | None, key: Tensor) -> float:
    """Return the largest difference of what was computed to an out projection's input."""
    return float(((activated if gate is None else activated * gate) - key).abs().max())


def is_gated(model: Model, layer: int) -> bool:
    """Say whether a block's feed-forward network multiplies two projections (SwiGLU, GEGLU)."""
    d_in = model.anatomy.shape(model.module, model.anatomy.mlp_out(layer))[1]
    rows = sum(model.anatomy.shape(model.module, path)[0] for path in model.anatomy.mlp_in(layer))
    return rows == 2 * d_in
