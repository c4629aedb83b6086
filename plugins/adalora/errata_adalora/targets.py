"""Which modules get an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.delta.adapter_layers import base_layer, is_linear
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from errata.anatomy import Anatomy
    from errata.model import Model
    from errata_adalora.config import AdaloraConfig

ROLES = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def resolve(model: Model, config: AdaloraConfig) -> list[str]:
    """Return the paths of the linear modules to adapt, block by block.

    `layers` are blocks of the decoder where there are two stacks. With no layers named, every
    block is meant, the encoder's too: an answer that is to depend on the prompt needs them.

    Raises `ConfigError` for a layer that the model does not have, and `UnknownNameError` for a
    name that no linear module of a block has.
    """
    stacks: list[tuple[Anatomy, Sequence[int]]] = []
    if config.layers is None:
        every = [model.anatomy.encoder, model.anatomy]
        stacks += [(stack, range(stack.n_layers)) for stack in every if stack is not None]
    else:
        stacks.append((model.anatomy, config.layers))
    chosen: dict[str, None] = {}
    for anatomy, layers in stacks:
        for layer in layers:
            if config.target_modules is None:
                names = _query_and_value(anatomy.attention_in(layer))
            else:
                targets = config.target_modules
                names = [name for t in targets for name in _named(model, anatomy, layer, t)]
            chosen.update(dict.fromkeys(names))
    if not chosen:
        raise ConfigError("target_modules or layers is empty: name at least one, or leave it out.")
    return list(chosen)


def _query_and_value(projections: Sequence[str]) -> list[str]:
    """Return the projections without the key's, or the one that all are fused into."""
    return [path for path in projections if not path.rpartition(".")[2].startswith("k")]


def _named(model: Model, anatomy: Anatomy, layer: int, target: str) -> list[str]:
    """Return what a role or a name means in one block."""
    if target in ROLES:
        found = getattr(anatomy, target)(layer)
        return [found] if isinstance(found, str) else list(found)
    block = anatomy.block(layer)
    linear = [
        path
        for path in model.parameters
        if path.startswith(f"{block}.") and path.endswith(".weight")
    ]
    linear = [path.removesuffix(".weight") for path in linear]
    linear = [path for path in linear if is_linear(base_layer(model.module, path))]
    found = [path for path in linear if path.endswith(f".{target}")]
    if not found:
        names = {path.removeprefix(f"{block}.") for path in linear} | set(ROLES)
        raise UnknownNameError("target module", target, names)
    return found
