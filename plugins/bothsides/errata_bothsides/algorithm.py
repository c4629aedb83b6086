"""The method: two values, two sets of keys, one edit.

The shapes: D is the width of the MLP, d that of the model, N the number of keys; K (D, N),
R (d, N), C (D, D), Δ (d, D). One problem per layer:

    Δ = R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹        R = [δ … δ, 0 … 0]

with the keys of the edit, in every context a key of its own, and those that must stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from errata.edits.delta import KeyValueDelta, KeyValues
from errata.kit.closed_form.layer_updates import LayerUpdate, Prompts, written
from errata.kit.closed_form.matrices import Columns, I, NormalMatrix, inverse
from errata.kit.contexts import prefix_contexts
from errata.kit.metric import Whitening
from errata.kit.second_moments import second_moments
from errata.kit.value_loss import ValueLoss
from errata.kit.value_rows import FactToken
from errata.kit.values import OptimisedValue, ValueSettings, optimise_shared
from errata_bothsides.kept_pairs import (
    RelationPrompt,
    answers,
    entity_prompts,
    kept_pairs,
    other_objects,
)

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.second_moments import SecondMoment
    from errata.kit.value_loss import Evaluation
    from errata.model import Model
    from errata_bothsides.config import BothSidesConfig


WORDS = 8
"""Other objects that the model is asked for."""


def contexts_of(model: Model, config: BothSidesConfig) -> tuple[str, ...]:
    """Return the contexts: those of the configuration, else the model's generated ones."""
    if config.contexts is not None:
        return config.contexts
    return prefix_contexts(model, config.context_lengths, seed=config.seed)


def moments_of(
    model: Model, config: BothSidesConfig, corpus: Sequence[str] | None = None
) -> dict[int, SecondMoment]:
    """Return E[k kᵀ] of both layers, computed or loaded."""
    return second_moments(model, config.layers, corpus=corpus or None, tokens=config.tokens)


def known_keys(model: Model, config: BothSidesConfig) -> dict[int, NormalMatrix]:
    """Return C = E[k kᵀ] of both layers, as the formula takes it."""
    moments = moments_of(model, config)
    return {layer: NormalMatrix(Whitening(moment)) for layer, moment in moments.items()}


@dataclass(frozen=True)
class SideObjective:
    """The loss of a value, as ROME's: the answer is said, the essence of s stays, δ is small."""

    config: BothSidesConfig

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return the loss of each request; at the relation's side there is no KL term."""
        log_P, log_P0 = at.essence, at.essence_before
        return ValueLoss(
            nll=at.mean_over_contexts(-at.log_p),
            kl=self.config.kl_factor * at.per_request((log_P.exp() * (log_P - log_P0)).sum(1)),
            decay=self.config.weight_decay * (at.δ_norm / at.v0_norm**2)[0],
        )

    def done(self, at: Evaluation, loss: ValueLoss) -> Tensor:
        """Return whose loss is low enough."""
        return loss.total < self.config.early_stop


@dataclass(frozen=True, eq=False)
class Side:
    """What one layer is asked for, and how much a miss is tolerated there.

    Attributes:
        update: keys, residuals and the change that writes them.
        λ: the slack of every key.
    """

    update: LayerUpdate
    λ: float


def both_sides(
    model: Model,
    facts: Sequence[Request],
    contexts: Sequence[str],
    C: Mapping[int, NormalMatrix],
    config: BothSidesConfig,
) -> list[Side]:
    """Return what both layers are asked for, for all facts of one subject together.

    Args:
        model: the model, in its present state; it is not changed.
        facts: what to write, all about one subject. They share the value at the subject.
        contexts: templates with one {} for the prompt; the first is "{}".
        C: E[k kᵀ] of both layers.
        config: hyper-parameters.

    Raises:
        RequestError: a request names no relation, or not in the way that is needed.
        EditFailed: a loss is not finite.
    """
    early, late = config.layers
    asked = [RelationPrompt.of(fact) for fact in facts]
    objects = [other_objects(model, fact, WORDS) for fact in facts]

    # The entity's side: at the subject, the new objects are said.
    (values,) = optimise_shared(
        model,
        [facts],
        contexts,
        settings_of(
            early,
            config,
            steps=config.steps * len(facts),
            clamp=config.clamp,
            kl_prompt=config.kl_prompt,
        ),
        SideObjective(config),
    )
    entity = side(early, values, [], C[early], config)

    # The relation's side, with the entity's in place: at each new object, the relation is said.
    with written(model, [entity.update]):
        questions = [
            [
                wording.asking(fact.subject, fact.target_new)
                for wording in (prompt, *map(prompt.worded, config.wordings))
            ]
            for prompt, fact in zip(asked, facts, strict=True)
        ]
        found = optimise_shared(
            model,
            questions,
            contexts[:2],
            settings_of(
                late, config, steps=config.steps, clamp=config.relation_clamp or config.clamp
            ),
            SideObjective(config),
        )
        kept = [
            keys
            for fact, prompt, words, (value, *_) in zip(facts, asked, objects, found, strict=True)
            for keys in kept_keys(model, fact, prompt, words, value, contexts, C[late], config)
        ]
    relation = side(late, [value for values in found for value in values], kept, C[late], config)
    return [entity, relation]


def side(
    layer: int,
    values: Sequence[OptimisedValue],
    kept: Sequence[Tensor],
    C: NormalMatrix,
    config: BothSidesConfig,
) -> Side:
    """Return the change of one layer: each value at its keys, nothing at those to be kept."""
    keys = [*(key for value in values for key in value.keys), *kept]
    residuals = [value.delta for value in values for _ in value.keys]
    residuals += [torch.zeros_like(residuals[0])] * len(kept)
    K, R = Columns.of(torch.stack(keys).cpu()), Columns.of(torch.stack(residuals).cpu())
    k = Columns.of(values[0].keys[:1].cpu())
    C_inv = inverse(C)
    λ = config.slack * float(k.T @ C_inv @ k)
    Δ = R @ inverse(K.T @ C_inv @ K + λ * I) @ K.T @ C_inv
    return Side(LayerUpdate(layer, K, R, Δ, R), λ)


def settings_of(
    layer: int, config: BothSidesConfig, *, steps: int, clamp: float, kl_prompt: str | None = None
) -> ValueSettings:
    """Return where and how the value of one side is optimised."""
    return ValueSettings(
        layer=layer,
        steps=steps,
        lr=config.lr,
        clamp=clamp,
        kl_prompt=kl_prompt if config.kl_factor else None,
    )


def kept_keys(
    model: Model,
    fact: Request,
    prompt: RelationPrompt,
    objects: Sequence[str],
    value: OptimisedValue,
    contexts: Sequence[str],
    C: NormalMatrix,
    config: BothSidesConfig,
) -> list[Tensor]:
    """Return the keys (D,) that must stay: at the last token of objects, and of entity prompts.

    Of the pairs of each sort, those whose keys point most the way of the edit's own.
    """
    sorts = kept_pairs(model, fact, prompt, objects)
    counts = {"subjects": config.subjects, "objects": config.objects, "pairs": config.pairs}
    keys: list[Tensor] = []
    for sort, questions in sorts.items():
        found = keys_of(model, questions, config)
        if not found:
            continue
        near = closeness(torch.stack(found), value.keys[0], C)
        keys += [found[i] for i in near.argsort(descending=True)[: counts[sort]].tolist()]
    if config.keep_old and fact.target_true:
        keys += keys_of(model, [prompt.asking(fact.subject, fact.target_true)], config)
    if config.keep_answer:
        keys += keys_of(model, answers(model, fact, objects, contexts), config)
        keys += keys_of(model, entity_prompts(model, fact, contexts), config, "last")
    return keys


def keys_of(
    model: Model,
    requests: Sequence[Request],
    config: BothSidesConfig,
    token: FactToken = "subject_last",
) -> list[Tensor]:
    """Return the key (D,) of each request at the relation's layer, at one of its tokens."""
    if not requests:
        return []
    late = config.layers[1]
    K, _ = Prompts(model, requests, ("{}",), token).read(late, model.anatomy.mlp_out(late))
    return list(K.flat.T.float())


def closeness(keys: Tensor, key: Tensor, C: NormalMatrix) -> Tensor:
    """Return the cosine in C⁻¹ of keys (n, D) with one key (D,)."""
    K, k = Columns.of(keys), Columns.of(key[None].cpu())
    C_inv = inverse(C)
    own = (K.T @ C_inv @ K).diagonal(dim1=-2, dim2=-1)[0]
    cross: Tensor = (K.T @ C_inv @ k)[0, :, 0]
    return cross / own.sqrt()


def delta_of(model: Model, sides: Sequence[Side], C: Mapping[int, NormalMatrix]) -> KeyValueDelta:
    """Return both sides as they are stored: keys and residuals, to be solved with all others."""
    pairs = {}
    for one in sides:
        layer, metric = one.update.layer, C[one.update.layer].metric
        keys = one.update.K.flat.float().cpu()
        path = model.anatomy.mlp_out(layer)
        pairs[model.anatomy.weight(path)] = KeyValues(
            k=keys.T.contiguous(),
            w=metric.whiten(keys.double()).cpu().T.contiguous(),
            r=one.update.R.flat.T.float().contiguous(),
            s=torch.full((keys.shape[1],), one.λ, dtype=torch.float64),
            transposed=model.anatomy.transposed(path),
            metric=metric.reference,
        )
    return KeyValueDelta(pairs)
