"""MEMIT as in the paper's algorithm 1 and the authors' code, with their letters.

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
    from errata_memit.config import MemitConfig


def memit(
    model: Model, requests: Sequence[Request], C: Mapping[int, Metric], config: MemitConfig
) -> Found:
    """Return what each layer is asked for, all from the model's present state.

    Raises:
        EditFailed: a loss is not finite.
    """
    λ = config.second_moment_weight
    contexts = contexts_of(model, config)
    prompts = Prompts(model, requests, contexts, config.fact_token)
    stages = stages_of(model, config)

    # z = h + δ, the vectors that make the model say the new targets; all of them together.
    z = block_targets(model, requests, contexts, prompts, stages, config)

    def right(layer: int, K: Tensor) -> Tensor:
        """Return (λC + K Kᵀ)⁻¹ K of the batch; in a joint edit, of each request by itself.

        As C⁻¹K (λI + Kᵀ C⁻¹ K)⁻¹ while N < D: the Cholesky factor of C is computed once.
        """
        return adjoint(C[layer], K, λ) if config.history == "none" else alone(C[layer], K, λ)

    updates = walk(prompts, stages, z, right, alone=config.history == "joint")
    return Found(updates, C, λ)
