"""AlphaEdit as in the paper's equation 14 and the authors' code, solved in the null space itself.

The published solve is of D × D: (P (K Kᵀ + K_p K_pᵀ) + L2 I)⁻¹ P K. With P = U₀ U₀ᵀ, U₀ of (D, r),
it is U₀ (K̃ K̃ᵀ + K̃_p K̃_pᵀ + L2 I)⁻¹ K̃ with K̃ = U₀ᵀ K: r × r, or of as many unknowns as there are
keys, whichever is less.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from errata.kit.closed_form.layer_updates import Prompts, walk
from errata.kit.closed_form.method import Found
from errata.kit.closed_form.statistics import block_targets, contexts_of, moments_of, stages_of
from errata.kit.metric import Projection
from errata.kit.null_space import null_space
from errata.kit.solve import adjoint, alone

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.metric import Metric
    from errata.model import Model
    from errata_alphaedit.config import AlphaEditConfig

logger = logging.getLogger("errata")


def metrics_of(model: Model, config: AlphaEditConfig) -> dict[int, Metric]:
    """Return P of every edited layer."""
    layers = [stage.layer for stage in stages_of(model, config)]
    found: dict[int, Metric] = {}
    for layer, C in moments_of(model, layers, config).items():
        threshold = config.threshold if config.fraction is None else None
        space = null_space(model, C, threshold=threshold, fraction=config.fraction)
        logger.info(
            "Layer %d: %d of %d directions have eigenvalues below %.3g and %.2g of C's trace.",
            layer, space.rank, space.size, space.threshold, space.energy,
        )  # fmt: skip
        found[layer] = Projection(space)
    return found


def alphaedit(
    model: Model,
    requests: Sequence[Request],
    P: Mapping[int, Metric],
    config: AlphaEditConfig,
    past: Mapping[int, Tensor] | None = None,
) -> Found:
    """Return what each layer is asked for, all from the model's present state.

    Args:
        model: the model.
        requests: what to write.
        P: the projector of each layer.
        config: hyper-parameters.
        past: K_p, (D, N') per layer, of a batch as published: the keys of earlier edits, read
            again after each was made. Joint edits need none: all active edits are one problem.

    Raises:
        EditFailed: a loss is not finite.
    """
    contexts = contexts_of(model, config)
    prompts = Prompts(model, requests, contexts, config.fact_token)
    stages = stages_of(model, config)

    # z = h + δ, as MEMIT's.
    z = block_targets(model, requests, contexts, prompts, stages, config)

    def right(layer: int, K: Tensor) -> Tensor:
        """Return (P (K Kᵀ + K_p K_pᵀ) + L2 I)⁻¹ P K."""
        if config.history == "joint":
            return alone(P[layer], K, config.l2)
        if past is None:
            return adjoint(P[layer], K, config.l2)
        # What was written before is to stay as it is now: a key that wants nothing more.
        K_p = past[layer].to(K)
        return adjoint(P[layer], torch.cat([K_p, K], 1), config.l2)[:, K_p.shape[1] :]

    updates = walk(prompts, stages, z, right, alone=config.history == "joint")
    return Found(updates, P, config.l2)
