"""MEMIT as in the paper's algorithm 1 and the authors' code, with their letters.

The shapes: D is the width of the MLP, d that of the model, N the number of requests; K (D, N),
R (d, N), z (d, N), h (d, N), C (D, D), Δ (d, D). A batch is one problem of this form; in joint
edits (`history: joint`) every request is one, with N = 1, and all of them run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.kit.closed_form.layer_updates import LayerUpdate
from errata.kit.closed_form.matrices import Columns, inverse
from errata.kit.closed_form.statistics import prompts_of, stages_of
from errata.kit.closed_form.target_values import memit_values

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.closed_form.matrices import NormalMatrix
    from errata.model import Model
    from errata_memit.config import MemitConfig


def memit(
    model: Model,
    requests: Sequence[Request],
    C: Mapping[int, NormalMatrix],
    λ: Mapping[int, float],
    config: MemitConfig,
    *,
    shared: bool = False,
) -> list[LayerUpdate]:
    """Return what each layer is asked for, all from the model's present state.

    Args:
        model: the model; it is not changed.
        requests: what to write.
        C: E[k kᵀ] of each edited layer.
        λ: how many observations C stands for against the new keys, of each edited layer.
        config: hyper-parameters.
        shared: the requests are facts of one subject: one problem, and one δ.

    Raises:
        EditFailed: a loss is not finite.
    """
    prompts = prompts_of(model, requests, config, shared=shared)
    stages = stages_of(model, config)

    # z = h + δ, the vectors at the last layer that make the model say the new targets.
    z: dict[int, Columns] = {}
    for target in sorted({stage.target for stage in stages}):
        h, δ = memit_values(prompts, target, config)
        z[target] = h + δ

    updates: list[LayerUpdate] = []
    for layer, target, layers_left in stages:
        # Keys and outputs as they are with the lower layers changed.
        K, h = prompts.read(layer, model.anatomy.reader.block(target), updates)
        R = prompts.before_norm(layer, (z[target] - h) / layers_left, updates)
        Δ = R @ K.T @ inverse(λ[layer] * C[layer] + K @ K.T)
        updates.append(LayerUpdate(layer, K, R, Δ, h))
    return updates
