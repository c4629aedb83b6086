"""An edit by the trained network, made again on top of itself while the target is not said.

Against the authors' code: an edit that is made again is computed on the moved weights for every
model (theirs adds the same change for BART).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.edits.delta import Factor, LowRankDelta
from errata.edits.delta.adapter_layers import base_layer, is_linear
from errata.kit.hypernetworks import (
    Factors,
    Signals,
    edited_modules,
    low_rank_deltas,
    rows_edited,
    signals_of,
    trained_network,
)
from errata.kit.training import ROLES, linear_modules
from errata.kit.training.training_batches import settled, target_batches
from errata.model.running import run
from errata_ke.network import KnowledgeEditor

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_ke.config import KeConfig


def trained(model: Model, config: KeConfig, training: Sequence[Request] = ()) -> KnowledgeEditor:
    """Return the trained network."""
    modules = edited_modules(model, config.target_modules, config.layers)
    if set(ROLES) <= set(config.target_modules or ()):
        modules += cross_attention(model, config.layers)
    return trained_network(
        model, "ke", lambda: KnowledgeEditor(model, modules, config), modules, config, training
    )


@torch.no_grad()
def edit(model: Model, requests: Sequence[Request], config: KeConfig) -> list[LowRankDelta]:
    """Return one change per request; with `loops`, made again until it holds."""
    network = trained(model, config)
    if config.loops == 1:
        deltas = []
        for signals in signals_of(model, requests, network.paths):
            deltas += _deltas(model, network(signals), signals, network)
        return deltas
    return [_again(model, request, network, config.loops) for request in requests]


def cross_attention(model: Model, layers: Sequence[int] | None) -> list[str]:
    """Return the paths of the projections by which a decoder reads its encoder; [] without one.

    No role names them: they are the linear modules of the blocks that have no role.

    Args:
        model: the model.
        layers: blocks of the decoder; None: all.
    """
    anatomy = model.anatomy
    if anatomy.encoder is None:
        return []
    chosen = range(anatomy.n_layers) if layers is None else layers
    known = set(linear_modules(model, ROLES, chosen))
    blocks = tuple(f"{anatomy.block(layer)}." for layer in chosen)
    paths = [
        name.removesuffix(".weight")
        for name in model.parameters
        if name.startswith(blocks) and name.endswith(".weight")
    ]
    return [p for p in paths if is_linear(base_layer(model.module, p)) and p not in known]


def _again(model: Model, request: Request, network: KnowledgeEditor, loops: int) -> LowRankDelta:
    (batch,) = target_batches(model, [(request.text, request.target)])
    total: dict[str, Factors] = {}
    parts: list[LowRankDelta] = []
    for _ in range(loops):
        with rows_edited(model, total, [0]):
            (signals,) = signals_of(model, [request], network.paths)
        factors = network(signals)
        parts += _deltas(model, factors, signals, network)
        total = {path: _both(total.get(path), new) for path, new in factors.items()}
        with rows_edited(model, total, [0]):
            logits = run(model, batch.prompts)
        nll = logits.new_zeros(len(logits))
        if settled(batch, logits, nll, None) == [True]:
            break
    return _sum(parts)


def _deltas(
    model: Model, factors: dict[str, Factors], signals: Signals, network: KnowledgeEditor
) -> list[LowRankDelta]:
    return low_rank_deltas(model, factors, signals, extra=network.extra, made_with=network.origin)


def _both(one: Factors | None, other: Factors) -> Factors:
    if one is None:
        return other
    return Factors(torch.cat([one.u, other.u], 1), torch.cat([one.v, other.v], 1))


def _sum(parts: Sequence[LowRankDelta]) -> LowRankDelta:
    names = dict.fromkeys(name for part in parts for name in part.factors)
    total = LowRankDelta(
        {
            name: Factor(
                torch.cat([p.factors[name].u for p in parts if name in p.factors], 1),
                torch.cat([p.factors[name].v for p in parts if name in p.factors], 1),
                next(p.factors[name].transposed for p in parts if name in p.factors),
            )
            for name in names
        }
    )
    total.made_with = parts[0].made_with
    return total
