"""PMET as in the paper's section 4 and the authors' code, which edits the MLPs alone by default.

The shapes: D is the width of the MLP, d that of the model, N the number of requests; K (D, N),
R (d, N), m (d, N), C (D, D), Δ (d, D). A batch is one problem of this form; in joint edits
(`history: joint`) every request is one, with N = 1, and all of them run side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import TYPE_CHECKING

import torch

from errata.kit.closed_form.layer_updates import LayerUpdate
from errata.kit.closed_form.matrices import Columns, inverse
from errata.kit.closed_form.statistics import (
    mean_norm,
    prompts_of,
    stages_of,
)
from errata.kit.closed_form.target_values import (
    most_probable,
    norm_anchored,
    optimised,
    value_settings,
)
from errata.kit.value_loss import ValueLoss

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.closed_form.matrices import NormalMatrix
    from errata.kit.value_loss import Evaluation
    from errata.model import Model
    from errata_pmet.config import PmetConfig


def pmet(
    model: Model,
    requests: Sequence[Request],
    C: Mapping[int, NormalMatrix],
    λ: Mapping[int, float],
    config: PmetConfig,
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

    # δ_attention and δ_MLP at the last layer, together; of the two only m = m0 + δ_MLP is written.
    m: dict[int, Columns] = {}
    for target in sorted({stage.target for stage in stages}):
        settings = replace(value_settings(target, config), at="attention+mlp")
        m0, δ = optimised(prompts, settings, PmetObjective(config))
        if config.norm_anchor is not None:
            δ = norm_anchored(m0, δ, config.norm_anchor * mean_norm(model, target))
        m[target] = m0 + δ

    updates: list[LayerUpdate] = []
    for layer, target, layers_left in stages:
        K, now = prompts.read(layer, model.anatomy.reader.mlp_out(target), updates)
        R = prompts.asked((m[target] - now) / sqrt(layers_left))
        Δ = R @ K.T @ inverse(λ[layer] * C[layer] + K @ K.T)
        updates.append(LayerUpdate(layer, K, R, Δ, now))
    return updates


@dataclass(frozen=True)
class PmetObjective:
    """PMET's loss of δ_attention and δ_MLP: MEMIT's, with less NLL once the target is first."""

    config: PmetConfig

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return the loss of each request."""
        config = self.config
        factor = torch.where(at.first_before > 0, config.top_factor, 1.0)
        return ValueLoss(
            nll=factor * (at.mean_over_contexts(-at.log_p) + at.unlikelihood),
            kl=config.kl_factor * at.kl,
            decay=config.weight_decay * (at.δ_norm / at.v0_norm**2).sum(0),  # over both places
        )

    def done(self, at: Evaluation, loss: ValueLoss) -> Tensor:
        """Return whose loss is low enough, or whose target comes first with little drift."""
        config = self.config
        low = (loss.total < config.early_stop) & at.gone
        done = low | most_probable(at, config.top_steps)
        if config.top_kl is not None:
            done = done | ((at.first > 0) & (loss.kl <= config.top_kl))
        return done
