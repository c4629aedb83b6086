"""Which linear modules are trained: roles of the anatomy, or names, in chosen blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.edits.delta.adapter_layers import base_layer, is_linear
from errata.errors import AnatomyError, ConfigError, ErrataError, UnknownNameError

if TYPE_CHECKING:
    from errata.model.anatomy import Anatomy
    from errata.model.model import Model

ROLES = ("attention_in", "attention_out", "mlp_in", "mlp_out")


def linear_modules(
    model: Model, targets: Sequence[str] | None, layers: Sequence[int] | None, *, both: bool = False
) -> list[str]:
    """Return the paths of linear modules, block by block.

    Args:
        model: the model.
        targets: roles (`ROLES`) or ends of module paths ("q_proj"); None is attention's query and
            value projections, or the one that they are fused into.
        layers: blocks, of the decoder where there are two stacks (negative: from the end). None
            is every block, the encoder's too: an answer that is to depend on the prompt needs
            them.
        both: `layers` are meant of the encoder, too, where there is one.

    Raises:
        ConfigError: nothing is named, or a layer that the model does not have.
        UnknownNameError: a name that no linear module of a named block (of any block) has.
        AnatomyError: so for a role, as the MLP's in a mixture of experts.
    """
    every = [stack for stack in (model.anatomy.encoder, model.anatomy) if stack is not None]
    stacks: list[tuple[Anatomy, Sequence[int]]] = []
    if layers is None:
        stacks += [(stack, range(stack.n_layers)) for stack in every]
    else:
        stacks += [(stack, layers) for stack in (every if both else [model.anatomy])]
    wanted: Sequence[str | None] = (None,) if targets is None else targets
    places = [(anatomy, layer, t) for anatomy, blocks in stacks for layer in blocks for t in wanted]
    chosen: dict[str, None] = {}
    found: set[str | None] = set()
    lacking: dict[str | None, ErrataError] = {}
    for anatomy, layer, target in places:
        try:
            names = _named(model, anatomy, layer, target)
        except (AnatomyError, UnknownNameError) as error:
            if layers is not None:
                raise
            lacking.setdefault(target, error)  # blocks differ: another may have it
            continue
        chosen.update(dict.fromkeys(names))
        found.add(target)
    for target in lacking.keys() - found:
        raise lacking[target]
    if not chosen:
        raise ConfigError("target_modules or layers is empty: name at least one, or leave it out.")
    return list(chosen)


def _query_and_value(projections: Sequence[str]) -> list[str]:
    """Return the projections without the key's, or the one that all are fused into."""
    names = ((path, path.rpartition(".")[2]) for path in projections)
    return [path for path, name in names if not name.startswith("k") or name.startswith("kv")]


def _named(model: Model, anatomy: Anatomy, layer: int, target: str | None) -> list[str]:
    """Return what a role, a name or None (query and value) means in one block."""
    if target is None:
        return _query_and_value(anatomy.attention_in(layer))
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
