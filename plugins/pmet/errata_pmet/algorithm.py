"""PMET as in the paper's section 4 and the authors' code, which edits the MLPs alone by default.

The shapes: D is the width of the MLP, d that of the model, N the number of requests; K (D, N),
R (d, N), m (d, N), C (D, D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from errata.kit.closed_form.layer_updates import Prompts, walk
from errata.kit.closed_form.method import Found
from errata.kit.closed_form.statistics import anchored, contexts_of, mean_norm, optimised, stages_of
from errata.kit.solve import adjoint, alone

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.metric import Metric
    from errata.model import Model
    from errata_pmet.config import PmetConfig


def pmet(
    model: Model, requests: Sequence[Request], C: Mapping[int, Metric], config: PmetConfig
) -> Found:
    """Return what each layer is asked for, all from the model's present state.

    Raises:
        EditFailed: a loss is not finite.
    """
    λ = config.second_moment_weight
    contexts = contexts_of(model, config)
    prompts = Prompts(model, requests, contexts, config.fact_token)
    stages = stages_of(model, config, root=True)

    # δ_attention and δ_MLP at the last layer, together; of the two only m = m0 + δ_MLP is written.
    m: dict[int, Tensor] = {}
    for layer in dict.fromkeys(stage.target for stage in stages):
        values = optimised(
            model,
            requests,
            contexts,
            layer,
            config,
            at="attention+mlp",
            top_factor=config.top_factor,
            top_kl=config.top_kl,
        )
        m0 = torch.stack([value.v0 for value in values]).double().cpu()  # (N, d)
        delta = torch.stack([value.delta for value in values]).double().cpu()
        if config.norm_anchor is not None:
            delta = anchored(m0, delta, config.norm_anchor * mean_norm(model, layer))
        m[layer] = (m0 + delta).T

    def right(layer: int, K: Tensor) -> Tensor:
        """Return (λC + K Kᵀ)⁻¹ K of the batch, or of each request by itself."""
        return adjoint(C[layer], K, λ) if config.history == "none" else alone(C[layer], K, λ)

    updates = walk(prompts, stages, m, right, place="mlp", alone=config.history == "joint")
    return Found(updates, C, λ)
