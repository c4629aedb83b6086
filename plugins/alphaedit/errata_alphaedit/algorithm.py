"""AlphaEdit as in the paper's equation 14 and the authors' code, solved in the null space itself.

The shapes: D is the width of the MLP, d that of the model, N the number of requests; K (D, N),
K_p (D, N_p), R (d, N), z (d, N), h (d, N), P (D, D) of rank r, Δ (d, D). A batch is one problem of
this form; in joint edits (`history: joint`) every request is one, with N = 1.

The published code solves for D × D unknowns. Here, with P = U₀ U₀ᵀ and K̃ = U₀ᵀ K, the system has
the size r, or the number of keys, whichever is less: the same numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from errata.kit.closed_form.layer_updates import LayerUpdate, Prompts
from errata.kit.closed_form.matrices import Columns, I, inverse
from errata.kit.closed_form.statistics import contexts_of, moments_of, prompts_of, stages_of
from errata.kit.closed_form.target_values import memit_values
from errata.kit.metric import Projection
from errata.kit.null_space import null_space

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.metric import Metric
    from errata.model import Model
    from errata_alphaedit.config import AlphaEditConfig

logger = logging.getLogger("errata")


def null_spaces(model: Model, config: AlphaEditConfig) -> dict[int, Metric]:
    """Return P of every edited layer."""
    found: dict[int, Metric] = {}
    for layer, C in moments_of(model, config).items():
        threshold = config.threshold if config.fraction is None else None
        space = null_space(model, C, threshold=threshold, fraction=config.fraction)
        logger.info(
            "Layer %d: %d of %d directions have eigenvalues below %.3g and %.2g of C's trace.",
            layer, space.rank, space.size, space.threshold, space.energy,
        )  # fmt: skip
        found[layer] = Projection(space)
    return found


def earlier_requests(model: Model, method: str) -> dict[int, list[Request]]:
    """Return what the method's active published edits wrote into each layer, in ledger order."""
    found: dict[int, list[Request]] = {}
    for edit in model.stack.entries:
        if edit.method != method or edit.config.get("history") != "none":
            continue
        for layer in model.anatomy.reader.layers_with("mlp"):
            if model.anatomy.weight(model.anatomy.reader.mlp_out(layer)) in edit.delta.parameters:
                found.setdefault(layer, []).extend(edit.requests)
    return found


def alphaedit(
    model: Model,
    requests: Sequence[Request],
    P: Mapping[int, Metric],
    config: AlphaEditConfig,
    earlier: Mapping[int, Sequence[Request]],
    *,
    shared: bool = False,
) -> list[LayerUpdate]:
    """Return what each layer is asked for, all from the model's present state.

    Args:
        model: the model; it is not changed.
        requests: what to write.
        P: the projector of each layer.
        config: hyper-parameters.
        earlier: layer → the requests of earlier batches as published, whose keys are K_p. Joint
            edits need none: all active edits are one problem.
        shared: the requests are facts of one subject: one problem, and one δ.

    Raises:
        EditFailed: a loss is not finite.
    """
    L2 = config.l2
    prompts = prompts_of(model, requests, config, shared=shared)
    stages = stages_of(model, config)

    # K_p: what was written before is to stay as it is now, so its keys are read again.
    past = {layer: keys_of(model, earlier.get(layer, ()), layer, config) for layer, _, _ in stages}

    # z = h + δ, as MEMIT's.
    z: dict[int, Columns] = {}
    for target in sorted({stage.target for stage in stages}):
        h, δ = memit_values(prompts, target, config)
        z[target] = h + δ

    updates: list[LayerUpdate] = []
    for layer, target, layers_left in stages:
        K, h = prompts.read(layer, model.anatomy.reader.block(target), updates)
        R = prompts.before_norm(layer, (z[target] - h) / layers_left, updates)
        K_p, P_l = past[layer], P[layer]
        Δ = R @ K.T @ P_l @ inverse(K_p @ K_p.T @ P_l + K @ K.T @ P_l + L2 * I)
        updates.append(LayerUpdate(layer, K, R, Δ, h))
    return updates


def keys_of(
    model: Model, requests: Sequence[Request], layer: int, config: AlphaEditConfig
) -> Columns:
    """Return the keys of requests at a layer as it stands, (1, D, N); N may be 0."""
    if not requests:
        D = model.anatomy.shape(model.module, model.anatomy.reader.mlp_out(layer))[1]
        return Columns(torch.zeros(1, D, 0, dtype=torch.float64))
    prompts = Prompts(
        model, requests, contexts_of(model, config), config.fact_token, window=config.window
    )
    K, _ = prompts.read(layer, model.anatomy.reader.mlp_out(layer))
    return K
