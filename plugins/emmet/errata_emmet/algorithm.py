"""EMMET as in the paper's equation 14 and the authors' code.

The shapes: D is the width of the MLP, d that of the model, N the number of requests; K (D, N),
R (d, N), z (d, N), C (D, D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.kit.closed_form.layer_updates import Prompts, walk
from errata.kit.closed_form.method import Found
from errata.kit.closed_form.statistics import block_targets, contexts_of, stages_of
from errata.kit.solve import adjoint, alone

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.metric import Metric
    from errata.model import Model
    from errata_emmet.config import EmmetConfig


def emmet(
    model: Model, requests: Sequence[Request], C: Mapping[int, Metric], config: EmmetConfig
) -> Found:
    """Return what each layer is asked for, all from the model's present state.

    Raises:
        EditFailed: a loss is not finite.
    """
    # Kᵀ(λC)⁻¹K + εI is Kᵀ C⁻¹ K + λε I up to the factor λ, which cancels: with a ridge EMMET is
    # MEMIT at λε. The authors' code leaves the ridge out for a single request.
    slack = config.second_moment_weight * config.ridge
    contexts = contexts_of(model, config)
    prompts = Prompts(model, requests, contexts, config.fact_token)
    stages = stages_of(model, config)

    # z = h + δ, as MEMIT's.
    z = block_targets(model, requests, contexts, prompts, stages, config)

    def right(layer: int, K: Tensor) -> Tensor:
        """Return C⁻¹K (Kᵀ C⁻¹ K + λε I)⁻¹ of the batch, or of each request by itself."""
        if config.history == "none":
            return adjoint(C[layer], K, slack if K.shape[1] > 1 else 0.0)
        return alone(C[layer], K, slack)

    updates = walk(prompts, stages, z, right, alone=config.history == "joint")
    return Found(updates, C, slack)
