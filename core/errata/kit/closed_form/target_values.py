"""MEMIT's target values: what the last edited layer should say at the subject, z = h + δ.

Also the two options that later papers add to any method of the family: when the optimisation of δ
may stop (MPES), and how long a value may be (NAS).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from errata.edits.aims import says_something
from errata.errors import ConfigError
from errata.kit.closed_form.layer_updates import through
from errata.kit.closed_form.matrices import Columns
from errata.kit.closed_form.statistics import mean_norm
from errata.kit.value_loss import ValueLoss
from errata.kit.values import OptimisedValue, ValueSettings, optimise_shared, optimise_values

if TYPE_CHECKING:
    from torch import Tensor

    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.closed_form.layer_updates import Prompts
    from errata.kit.value_loss import Evaluation, ValueObjective


@dataclass(frozen=True)
class MemitObjective:
    """MEMIT's loss of δ (equation 16, with the KL term and the weight decay of the authors' code).

    δ = argmin  −(1/P) Σ_j log P_{h += δ}(o | x_j ⊕ p)                 the new object is said
              − (1/P) Σ_j log(1 − P_{h += δ}(o′ | x_j ⊕ p))          what is to go no longer
              + kl_factor · KL(P_{h += δ}(· | p′) ‖ P(· | p′))       p′ = "{subject} is a"
              + weight_decay · ‖δ‖ / ‖h‖²
    """

    config: ClosedFormConfig

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return the loss of each request."""
        return ValueLoss(
            nll=at.mean_over_contexts(-at.log_p) + at.unlikelihood,
            kl=self.config.kl_factor * at.kl,
            decay=self.config.weight_decay * (at.δ_norm / at.v0_norm**2)[0],
        )

    def done(self, at: Evaluation, loss: ValueLoss) -> Tensor:
        """Return whose loss is low enough, or whose target is the most probable one (MPES)."""
        low = (loss.total < self.config.early_stop) & at.gone
        return low | most_probable(at, self.config.top_steps)


def most_probable(at: Evaluation, steps: int | None) -> Tensor:
    """Return whose target came first in all contexts at so many evaluations in a row, (N,) bool.

    MPES, most probable early stopping (Gupta et al., arXiv 2502.01636): a value that is optimised
    further is overfitted, and its norm grows. None: nobody's.
    """
    return torch.zeros_like(at.first, dtype=torch.bool) if steps is None else at.first >= steps


def value_settings(layer: int, config: ClosedFormConfig) -> ValueSettings:
    """Return where and how values of a layer are optimised, by default at the block's output."""
    return ValueSettings(
        layer=layer,
        at="block",
        loss_layer=config.loss_layer,
        steps=config.steps,
        lr=config.lr,
        clamp=config.clamp,
        kl_prompt=config.kl_prompt if config.kl_factor else None,
        fact_token=config.fact_token,
    )


def optimised(
    prompts: Prompts, settings: ValueSettings, objective: ValueObjective
) -> tuple[Columns, Columns]:
    """Return v0 and δ of each request (or window), (G, d, N), from the model's present state.

    Raises:
        EditFailed: a loss is not finite.
    """
    values: dict[int, OptimisedValue] = {}
    windows = prompts.windows
    whole = [i for i, window in enumerate(windows) if window.number is None]
    asked = [windows[i].request for i in whole]
    groups = [asked] if prompts.shared else [[request] for request in asked]
    grouped = optimise_shared(prompts.model, groups, prompts.contexts, settings, objective)
    values.update(zip(whole, (value for group in grouped for value in group), strict=True))
    # Texts side by side, each window with the values of those before it in their places.
    settings = replace(settings, fact_token="last", kl_prompt=None)
    for number in range(max((w.number for w in windows if w.number is not None), default=-1) + 1):
        now = [i for i, window in enumerate(windows) if window.number == number]
        held = [[(windows[j].request, values[j].delta) for j in range(i - number, i)] for i in now]
        found = optimise_values(
            prompts.model, [windows[i].request for i in now], prompts.contexts[:1], settings,
            objective, held=held,
        )  # fmt: skip
        values.update(zip(now, found, strict=True))
    v0 = torch.stack([values[i].v0 for i in range(len(windows))]).cpu()  # (N, d)
    delta = torch.stack([values[i].delta for i in range(len(windows))]).cpu()
    says = [says_something(request) for request in prompts.requests]
    prompts.disclaim((delta == 0).all(1) & ~torch.tensor(says))
    return prompts.columns(v0), prompts.columns(delta)


def memit_values(prompts: Prompts, layer: int, config: ClosedFormConfig) -> tuple[Columns, Columns]:
    """Return h and δ of each request at a block's output: the target value is z = h + δ.

    Raises:
        ConfigError: a norm anchor, where only the direction of what the MLP says counts.
        EditFailed: a loss is not finite.
    """
    settings, objective = value_settings(layer, config), MemitObjective(config)
    norm = prompts.norm_behind(layer)
    if norm is not None and config.norm_anchor is not None:
        model = prompts.model
        raise ConfigError(
            f"norm_anchor={config.norm_anchor:g} has nothing to scale at layer {layer} of "
            f"{model.name} ({model.anatomy.model_type}): a norm stands behind its MLP, so only the "
            "direction of a value counts, and its length is kept. Leave norm_anchor out."
        )
    if norm is not None:  # what this layer's MLP can say behind its norm is all that δ can be
        m, δ = optimised(prompts, replace(settings, at="mlp"), objective)
        _, h = prompts.read(layer, prompts.model.anatomy.reader.block(layer))
        return h, through(norm, m + δ) - through(norm, m)
    h, δ = optimised(prompts, settings, objective)
    if config.norm_anchor is not None:
        _, m = prompts.read(layer, prompts.model.anatomy.reader.mlp_out(layer))
        δ = norm_anchored(m, δ, config.norm_anchor * mean_norm(prompts.model, layer))
    return h, δ


def norm_anchored(m: Columns, δ: Columns, norm: float) -> Columns:
    """Return δ such that what the MLP is to say, m + δ, has this norm.

    NAS, norm anchor scaling (arXiv 2602.02543). What attention and the residual stream bring is
    left alone. The authors' code drops an edit, silently, whose value is more than twice the
    anchor; here it is scaled like any other.
    """
    value = (m + δ).tensor
    return Columns(value * (norm / value.norm(dim=1, keepdim=True))) - m
