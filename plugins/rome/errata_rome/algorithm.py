"""ROME as in the paper's section 3.1 and the authors' code, with their letters.

The shapes: D is the width of the MLP, d that of the model; k (D,), v (d,), W (d, D), C (D, D).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from errata.edits.delta import Factor, LowRankDelta
from errata.errors import ConfigError, EditFailed
from errata.kit.contexts import prefix_contexts
from errata.kit.same_subject import facts_beside
from errata.kit.second_moments import second_moments
from errata.kit.value_loss import ValueLoss
from errata.kit.values import OptimisedValue, ValueSettings, optimise_shared

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.second_moments import SecondMoment
    from errata.kit.value_loss import Evaluation
    from errata.model import Model
    from errata_rome.config import RomeConfig


@dataclass(frozen=True, eq=False)
class RankOne:
    """One edit, W ← W + Λ uᵀ, and what it came from; fp64.

    Attributes:
        k_star: (D,) the key of the subject, before whitening.
        v_star: (d,) the value that makes the model say the new target.
        u: (D,) left vector C⁻¹ k* / ‖C⁻¹ k*‖.
        k: (D,) the key at which the constraint W k = v* is met.
        Wk: (d,) what the layer gives there now (with its bias).
        Λ: (d,) right vector.
        value: the optimisation that gave v*.
    """

    k_star: Tensor
    v_star: Tensor
    u: Tensor
    k: Tensor
    Wk: Tensor
    Λ: Tensor
    value: OptimisedValue

    def delta(self, model: Model, layer: int) -> LowRankDelta:
        """Return the change as it is stored: Λ uᵀ for the down projection of block `layer`."""
        out = model.anatomy.reader.mlp_out(layer)
        factor = Factor(
            u=self.Λ.float().cpu().unsqueeze(1),
            v=self.u.float().cpu().unsqueeze(1),
            transposed=model.anatomy.transposed(out),
        )
        return LowRankDelta({model.anatomy.weight(out): factor})


def layer_of(model: Model, config: RomeConfig) -> int:
    """Return the edited block, counted from 0; raise `ConfigError` when there is none."""
    layer = config.for_model(model.anatomy).layer
    if not isinstance(layer, int):
        raise ConfigError(
            "layer 'auto' is resolved by the editor, from a sweep (`errata locate --sweep`): go "
            "through `Editor`, or name the layer."
        )
    return layer


def contexts_of(model: Model, config: RomeConfig) -> tuple[str, ...]:
    """Return the contexts: those of the configuration, else the model's generated ones."""
    if config.contexts is not None:
        return config.contexts
    return prefix_contexts(model, config.context_lengths, seed=config.seed)


def statistic_of(
    model: Model, config: RomeConfig, corpus: Sequence[str] | None = None
) -> SecondMoment | None:
    """Return C of the edited layer, computed or loaded; None when the key is not whitened."""
    if not config.second_moment:
        return None
    layer = layer_of(model, config)
    return second_moments(model, [layer], corpus=corpus or None, tokens=config.tokens)[layer]


def rome(
    model: Model,
    requests: Sequence[Request],
    contexts: Sequence[str],
    C: SecondMoment | None,
    config: RomeConfig,
) -> list[RankOne]:
    """Return one rank-one edit per request, in order, each from the model's present state.

    Raises:
        EditFailed: a division factor ⟨k, u⟩ vanishes, or a loss is not finite.
    """
    settings = ValueSettings(
        layer=layer_of(model, config),
        at="mlp",
        loss_layer=config.loss_layer,
        steps=config.steps,
        lr=config.lr,
        clamp=config.clamp,
        kl_prompt=config.kl_prompt if config.kl_factor else None,
        fact_token=config.fact_token,
    )
    # A later value at a subject overwrites an earlier one, so it has to say that one's fact, too.
    together = config.same_subject == "together"
    facts = [[r, *(facts_beside(model, r) if together else ())] for r in requests]
    found = optimise_shared(model, facts, contexts, settings, RomeObjective(config))
    values = [value for value, *_ in found]
    return [
        rank_one(value, C, config, request) for value, request in zip(values, requests, strict=True)
    ]


@dataclass(frozen=True)
class RomeObjective:
    """The loss that v* minimises, the paper's equation 4 (step 2 of section 3.1), v* = v0 + δ.

        L(δ) = (1/N) Σ_j −log P_{v0 + δ}[o* | x_j + p]                      (a) o* is said
             + kl_factor · KL(P_{v0 + δ}[x | p′] ‖ P[x | p′])               (b) the essence stays
             + weight_decay · ‖δ‖ / ‖v0‖²

    An answer that should no longer be said adds −log(1 − P) to (a) (`errata.kit.aims`).
    x_j are the contexts and p′ is "{subject} is a", read at the subject's last token. The KL
    term's factor and the weight decay, whose norm is not squared, are the authors' code's.
    """

    config: RomeConfig

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return the loss of each request."""
        return ValueLoss(
            nll=at.mean_over_contexts(-at.log_p) + at.unlikelihood,
            kl=self.config.kl_factor * at.kl,
            decay=self.config.weight_decay * (at.δ_norm / at.v0_norm**2)[0],
        )

    def done(self, at: Evaluation, loss: ValueLoss) -> Tensor:
        """Return whose loss is low enough."""
        return (loss.total < self.config.early_stop) & at.gone


def rank_one(
    value: OptimisedValue, C: SecondMoment | None, config: RomeConfig, request: Request
) -> RankOne:
    """Return the edit that writes an optimised value.

    ROME whitens the averaged key but divides by the bare prompt's: where the two differ much (a
    subject that is the prompt's first token), ⟨k, u⟩ is small and Λ explodes. r-ROME (Gupta et
    al., 2024) uses the averages in both places, p-ROME the bare prompt in both.
    """
    keys = value.keys.double().cpu()  # (contexts, D)
    outputs = value.outputs.double().cpu()  # (contexts, d)
    bare_k, mean_k = keys[0], keys.mean(0)
    k_star = bare_k if config.variant == "p-rome" else mean_k

    # u: the direction that responds to k*, and as little as possible to the keys of other text.
    u = k_star if C is None else C.solve(k_star).to(k_star)
    u = u / u.norm()

    averaged = config.variant == "r-rome"
    k, Wk = (mean_k, outputs.mean(0)) if averaged else (bare_k, outputs[0])

    # v*: the layer's output in the bare prompt plus δ, also in r-ROME, although its Λ is the
    # difference to the averaged output.
    v_star = value.v_star.double().cpu()

    # Λ: such that (W + Λ uᵀ) k = v*.
    division = torch.dot(k, u)
    if not float(division.abs()) >= config.min_division * float(k.norm()):
        raise EditFailed(
            f"ROME cannot write {request.text!r} → {request.wish!r}: the division factor "
            f"⟨k, u⟩ is {float(division):.3g} for a key of norm {float(k.norm()):.3g} (limit "
            f"{config.min_division:g} of it), so the change would explode. Use variant='r-rome', "
            "reword the prompt so that it does not begin with the subject, or edit another layer."
        )
    Λ = (v_star - Wk) / division
    return RankOne(k_star=k_star, v_star=v_star, u=u, k=k, Wk=Wk, Λ=Λ, value=value)
