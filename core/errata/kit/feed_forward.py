"""The feed-forward network of a block, as methods see it that add neurons to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from errata.edits.delta.neurons import ACTIVATIONS, Site
from errata.errors import CapabilityError, ConfigError
from errata.kit.second_moments import documents_of, text_hash
from errata.kit.training import text_batches
from errata.model.forward import trace
from errata.model.running import run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model

_NAMES = ("hidden_act", "hidden_activation", "activation_function", "activation", "dense_act_fn")
"""What configurations call the activation of their feed-forward networks."""

_FIXED = {"bloom": "gelu_new", "mpt": "gelu"}
"""Activations of the families whose code fixes them, by model type."""


def site_of(model: Model, layer: int, *, gated: bool = False) -> Site:
    """Return where neurons of a block's feed-forward network are, with the block's own activation.

    Raises:
        AnatomyError: the block has none that every token passes through.
        CapabilityError: an activation that neurons cannot have.
    """
    anatomy = model.anatomy
    config = model.config.get_text_config()
    named = [getattr(config, name) for name in _NAMES if isinstance(getattr(config, name, 0), str)]
    activation = named[0] if named else _FIXED.get(config.model_type)
    if activation is None or activation not in ACTIVATIONS:
        raise CapabilityError(
            f"{model.name} ({anatomy.model_type}) activates its MLPs by "
            f"{activation or 'something that its configuration does not name'}; neurons "
            f"can be added where it is {', '.join(ACTIVATIONS)}."
        )
    return Site(anatomy.mlp_in(layer)[0], anatomy.mlp_out(layer), activation, gated)


def is_gated(model: Model, layer: int) -> bool:
    """Say whether a block's feed-forward network multiplies two projections (SwiGLU, GEGLU)."""
    d_in = model.anatomy.shape(model.module, model.anatomy.mlp_out(layer))[1]
    rows = sum(model.anatomy.shape(model.module, path)[0] for path in model.anatomy.mlp_in(layer))
    return rows == 2 * d_in


def remembered_states(
    model: Model, module: str, count: int, corpus: Sequence[str] | None = None
) -> Tensor:
    """Return (count, d) inputs of a module in plain text, of every token but a text's first.

    Kept among the artifacts; fewer where the text is shorter. Documents come in a fixed random
    order, the first 128 tokens of each.

    Args:
        model: the model; measuring needs it without active edits.
        module: path of the module.
        count: how many.
        corpus: documents; by default the model's, else the text that ships with errata.
    """
    documents = documents_of(model, corpus or None)

    def compute() -> tuple[dict[str, Tensor], dict[str, int]]:
        held: list[Tensor] = []
        for states in _states(model, module, documents):
            held.append(states)
            if sum(map(len, held)) >= count:
                break
        found = torch.cat(held)[:count].contiguous() if held else torch.empty(0)
        if not len(found):
            raise ConfigError("The corpus has no document of two tokens: give other text.")
        return {"states": found}, {"count": len(found)}

    key = ("remembered-states", module, str(count), text_hash(documents)[:16])
    return model.of_base(*key, compute=compute)[0]["states"]


@torch.no_grad()
def _states(model: Model, module: str, documents: Sequence[str]) -> Iterator[Tensor]:
    """Yield (n, d) states of eight documents at a time."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0)).tolist()
    for begin in range(0, len(order), 8):
        for batch in text_batches(model, [documents[i] for i in order[begin : begin + 8]]):
            with trace(model.module, module, inputs=True, outputs=False, stop=True) as seen:
                run(model, batch.prompts)
            states = seen[module].input
            assert states is not None
            rows = states.reshape(len(batch), -1, states.shape[-1])
            real = batch.prompts.attention_mask.bool().clone()
            if real.shape != rows.shape[:2]:  # a decoder's states, behind an encoder
                real = torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)
            real[:, 0] = False
            yield rows[real.to(rows.device)].float().cpu()
