"""The method: two values, two sets of keys, one edit.

The shapes: D is the width of the MLP, d that of the model, N the number of keys; K (D, N),
R (d, N), C (D, D), Δ (d, D). One problem per layer:

    Δ = R (Kᵀ C⁻¹ K + λ I)⁻¹ Kᵀ C⁻¹        R = [r … r, 0 … 0]

K holds the keys of the edit, with residuals r, and the keys that must stay, with residuals 0.

On the entity's side nothing is kept. The keys are the mean over contexts, as in ROME (Meng et al.
2022), and the bare prompt's (ROME divides by the product of the two); r is δ. On the relation's
side every context has a key of its own: beside keys that stay, a mean would cancel the edit. There
r is what is still missing, z − h, divided by the number of layers that are left, as in MEMIT (Meng
et al. 2023, equation 20).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.edits.delta import KeyValueDelta, KeyValues
from errata.kit.closed_form.kept_positions import keys_of_text
from errata.kit.closed_form.layer_updates import LayerUpdate, Prompts, spread, through, written
from errata.kit.closed_form.matrices import Columns, I, NormalMatrix, Product, inverse
from errata.kit.contexts import in_contexts, prefix_contexts
from errata.kit.metric import Whitening
from errata.kit.second_moments import second_moments
from errata.kit.value_loss import ValueLoss
from errata.kit.value_rows import FactToken
from errata.kit.values import OptimisedValue, ValueSettings, optimise_shared
from errata.model.scoring import score_targets
from errata_bothsides.kept_pairs import RelationPrompt, Staying

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.second_moments import SecondMoment
    from errata.kit.value_loss import Evaluation
    from errata.model import Model
    from errata_bothsides.config import BothSidesConfig

SPREAD = 5
"""Blocks that share what is written for the relation."""
ROUNDS = 3
"""Times that a block which writes alone, behind a norm, is asked for what it left unwritten."""
SAID = 0.5
"""Least probability of the relation's name with which an edit behind a norm is left as it is."""
RELATION_CONTEXTS = 2
"""Contexts that the relation's prompts stand in, each with keys of its own."""
KEPT_CONTEXTS = 3
"""Contexts of the entity's prompts that must stay."""


def contexts_of(model: Model, config: BothSidesConfig) -> tuple[str, ...]:
    """Return the contexts: those of the configuration, else the model's generated ones."""
    if config.contexts is not None:
        return config.contexts
    return prefix_contexts(model, config.context_lengths, seed=config.seed)


def moments_of(
    model: Model, config: BothSidesConfig, corpus: Sequence[str] | None = None
) -> dict[int, SecondMoment]:
    """Return E[k kᵀ] of the edited layers, computed or loaded."""
    layers = layers_of(model, config)
    return second_moments(model, layers, corpus=corpus or None, tokens=config.tokens)


def known_keys(model: Model, config: BothSidesConfig) -> dict[int, NormalMatrix]:
    """Return C = E[k kᵀ] of the edited layers, as the formula takes it."""
    moments = moments_of(model, config)
    return {layer: NormalMatrix(Whitening(moment)) for layer, moment in moments.items()}


@dataclass(frozen=True)
class SideObjective:
    """The loss of a value, as ROME's: the answer is said, the essence of s stays, δ is small."""

    config: BothSidesConfig

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return the loss of each request; at the relation's side there is no KL term."""
        return ValueLoss(
            nll=at.mean_over_contexts(-at.log_p),
            kl=self.config.kl_factor * at.kl,
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


class RelationAims(NamedTuple):
    """What one fact asks of the relation's side.

    Attributes:
        questions: for the relation, in several wordings, with the new object as the subject.
        staying: what must be answered as before.
    """

    questions: list[Request]
    staying: Staying


def both_sides(
    model: Model,
    facts: Sequence[Request],
    contexts: Sequence[str],
    C: Mapping[int, NormalMatrix],
    config: BothSidesConfig,
) -> list[Side]:
    """Return what every layer is asked for, for all facts of one subject together.

    Args:
        model: the model, in its present state; it is not changed.
        facts: what to write, all about one subject. They share the value at the subject.
        contexts: templates with one {} for the prompt; the first is "{}".
        C: E[k kᵀ] of the edited layers.
        config: hyper-parameters.

    Raises:
        RequestError: a request names no relation, or not in the way that is needed.
        EditFailed: a loss is not finite.
    """
    relations = [relation_of(model, fact, contexts, config) for fact in facts]
    entity = entity_side(model, facts, contexts, C, config)
    return [entity, *relation_side(model, relations, contexts, C, config, entity)]


def relation_of(
    model: Model, fact: Request, contexts: Sequence[str], config: BothSidesConfig
) -> RelationAims:
    """Return what a fact asks of the relation's side. The model must be unedited."""
    prompt = RelationPrompt.of(fact)
    prompts = (prompt, *map(prompt.worded, config.wordings))
    questions = [each.asking(fact.subject, fact.target_new, config.end) for each in prompts]
    staying = Staying.beside(model, fact, prompt, contexts[:KEPT_CONTEXTS], config)
    return RelationAims(questions, staying)


def entity_side(
    model: Model,
    facts: Sequence[Request],
    contexts: Sequence[str],
    C: Mapping[int, NormalMatrix],
    config: BothSidesConfig,
) -> Side:
    """Return what the early layer is asked for: at the subject, the new objects are said."""
    layer, *_ = layers_of(model, config)
    kl_prompt = config.kl_prompt if config.kl_factor else None
    settings = settings_of(layer, config, config.clamp, kl_prompt)
    (values,) = optimise_shared(model, [facts], contexts, settings, SideObjective(config))
    # The key averaged over the contexts, as ROME's: nothing is kept here that it could cancel. And
    # the bare prompt's: of a subject that begins its prompt it lies far from the others.
    K = torch.cat([torch.stack([value.keys.mean(0), value.keys[0]]) for value in values])
    R = torch.cat([torch.stack([value.delta] * 2) for value in values])
    return side(layer, K, R, C[layer], config.slack / len(contexts))


def relation_side(
    model: Model,
    relations: Sequence[RelationAims],
    contexts: Sequence[str],
    C: Mapping[int, NormalMatrix],
    config: BothSidesConfig,
    entity: Side,
) -> list[Side]:
    """Return what the late layers are asked for: at each new object, the relation is said.

    All of it is read with the entity's side in place.
    """
    _, *layers = layers_of(model, config)
    last, near = layers[-1], contexts[:RELATION_CONTEXTS]
    questions = [relation.questions for relation in relations]
    clamp = config.relation_clamp or config.clamp
    settings = replace(settings_of(last, config, clamp), sharing="wordings")
    with written(model, [entity.update]):
        found = optimise_shared(model, questions, near, settings, SideObjective(config))
        kept = [
            kept_keys(model, relation.staying, value, C[last], layers, config)
            for relation, (value, *_) in zip(relations, found, strict=True)
        ]
        said = [text for relation in relations for text in relation.staying.texts]
        texts = text_keys(model, said, layers) if said else {}
    prompts = each_context(model, [q for group in questions for q in group], near)
    δ = at_block(prompts, last, [value for group in found for value in group])
    asked = RelationProblem(prompts, δ, kept, texts, C, config)
    sides = asked.solved(layers, entity)
    if prompts.norm_behind(last) is None or config.relation_depth is not None:
        return sides
    first = [(group[0].text, group[0].target.removesuffix(config.end)) for group in questions]
    reached = said_least(model, first, [entity, *sides])
    if reached >= SAID:
        return sides
    # Behind a norm outputs keep their length: lower blocks can only turn theirs, which may take
    # the state elsewhere, further than the last one can make up for. Then it writes alone.
    alone = asked.solved([last], entity, ROUNDS)
    return alone if said_least(model, first, [entity, *alone]) > reached else sides


def said_least(model: Model, questions: Sequence[tuple[str, str]], sides: Sequence[Side]) -> float:
    """Return the probability of the relation's name where it is lowest, with all sides written."""
    with written(model, [one.update for one in sides]):
        prompts, names = map(list, zip(*questions, strict=True))
        scores = score_targets(model, prompts, names)
    return min(math.exp(-score.mean_nll) for score in scores)


@dataclass(frozen=True, eq=False)
class RelationProblem:
    """What the relation's side asks for, to be written in some blocks.

    Attributes:
        prompts: of the relation, each in its contexts.
        δ: (1, d, N) what the value changes at the last block's output.
        kept: for each fact, the keys that must stay, by block.
        texts: keys of other subjects' texts, by block; of these, those that move most must stay.
        C: E[k kᵀ] by block.
        config: hyper-parameters.
    """

    prompts: Prompts
    δ: Columns
    kept: Sequence[Mapping[int, Tensor]]
    texts: Mapping[int, Tensor]
    C: Mapping[int, NormalMatrix]
    config: BothSidesConfig

    def solved(self, layers: Sequence[int], entity: Side, rounds: int = 0) -> list[Side]:
        """Return what each of these blocks is asked for; the last is where δ belongs.

        In further `rounds` a block is asked for what λ left as well: behind a norm that does not
        shorten the output but turns it.
        """
        prompts, config = self.prompts, self.config
        block = prompts.model.anatomy.reader.block(layers[-1])
        sides: list[Side] = []
        z: Columns | None = None
        for layer, _, layers_left in spread(layers):
            # Keys and outputs as they are with the lower layers changed.
            below = [one.update for one in (entity, *sides)]
            K, h = prompts.read(layer, block, below)
            z = h + self.δ if z is None else z
            R = prompts.before_norm(layer, (z - h) / layers_left, below)
            stay = [keys[layer] for keys in self.kept]
            one = side(layer, K.flat.T, R.flat.T, self.C[layer], config.slack, stay)
            if layer in self.texts:  # and once more, with what it changes most in them kept
                stay.append(most_changed(one.update.Δ, self.texts[layer], config.text_tokens))
                one = side(layer, K.flat.T, R.flat.T, self.C[layer], config.slack, stay)
            for _ in range(rounds):
                put = [*below, one.update]
                _, h = prompts.read(layer, block, put)
                R += prompts.before_norm(layer, z - h, put)
                one = side(layer, K.flat.T, R.flat.T, self.C[layer], config.slack, stay)
            sides.append(one)
        return sides


def each_context(model: Model, requests: Sequence[Request], contexts: Sequence[str]) -> Prompts:
    """Return requests with each context as a prompt of its own, not averaged with the others."""
    return Prompts(
        model,
        [
            request.model_copy(update={"prompt": template, "chat": False})
            for request in requests
            for template in in_contexts(model, request, contexts)
        ],
        ("{}",),
    )


def at_block(prompts: Prompts, layer: int, values: Sequence[OptimisedValue]) -> Columns:
    """Return what values change at a block's output, for each of their keys.

    That is δ, or what a norm behind the MLP makes of it.
    """
    each = [value for value in values for _ in value.keys]
    v0, δ = (
        Columns.of(torch.stack([getattr(value, part) for value in each]).cpu())
        for part in ("v0", "delta")
    )
    norm = prompts.norm_behind(layer)
    return δ if norm is None else through(norm, v0 + δ) - through(norm, v0)


def layers_of(model: Model, config: BothSidesConfig) -> tuple[int, ...]:
    """Return the entity's block, and those that the relation's value is spread over."""
    early, late = config.layers
    between = [x for x in model.anatomy.reader.layers_with("mlp") if early < x <= late]
    return (early, *between[-(config.relation_depth or SPREAD) :])


def side(
    layer: int,
    keys: Tensor,
    residuals: Tensor,
    C: NormalMatrix,
    slack: float,
    kept: Sequence[Tensor] = (),
) -> Side:
    """Return the change of one layer: residuals (N, d) at keys (N, D), nothing at those kept."""
    nothing = residuals.new_zeros(sum(map(len, kept)), residuals.shape[1])
    k = Columns.of(keys[:1].float().cpu())
    K = Columns.of(torch.cat([keys.float().cpu(), *kept]))
    R = Columns.of(torch.cat([residuals, nothing]).float().cpu())
    C_inv = inverse(C)
    λ = slack * float(k.T @ C_inv @ k)
    Δ = R @ inverse(K.T @ C_inv @ K + λ * I) @ K.T @ C_inv
    return Side(LayerUpdate(layer, K, R, Δ, R), λ)


def settings_of(
    layer: int, config: BothSidesConfig, clamp: float, kl_prompt: str | None = None
) -> ValueSettings:
    """Return where and how the value of one side is optimised."""
    return ValueSettings(
        layer=layer, steps=config.steps, lr=config.lr, clamp=clamp, kl_prompt=kl_prompt
    )


def kept_keys(
    model: Model,
    staying: Staying,
    value: OptimisedValue,
    C: NormalMatrix,
    layers: Sequence[int],
    config: BothSidesConfig,
) -> dict[int, Tensor]:
    """Return the keys (N, D) that must stay: at the last token of objects, and of entity prompts.

    Of each kind of pair, those are kept whose keys at the last layer have the highest cosine in C⁻¹
    with the edit's key; C is that layer's.
    """
    parts: list[dict[int, Tensor]] = []
    for sort, questions in staying.pairs.items():
        count = getattr(config, sort)
        if questions and count:
            found = keys_of(model, questions, layers)
            near = closeness(found[layers[-1]], value.keys[0], C)
            best = near.argsort(descending=True)[:count]
            parts.append({layer: keys[best] for layer, keys in found.items()})
    if staying.objects:
        parts.append(keys_of(model, staying.objects, layers))
    if staying.ends:
        parts.append(keys_of(model, staying.ends, layers, "last"))
    none = torch.zeros(0, len(value.keys[0]))
    return {layer: torch.cat([none, *(part[layer] for part in parts)]) for layer in layers}


def keys_of(
    model: Model,
    requests: Sequence[Request],
    layers: Sequence[int],
    token: FactToken = "subject_last",
) -> dict[int, Tensor]:
    """Return the keys (N, D) of requests at the relation's layers, at one of their tokens."""
    found = Prompts(model, requests, ("{}",), token).keys(layers)
    return {layer: K.flat.T.float() for layer, K in found.items()}


def text_keys(model: Model, texts: Sequence[str], layers: Sequence[int]) -> dict[int, Tensor]:
    """Return the keys (N, D) of every token of texts, but for the first of each.

    A text's first token has the same key in all of them, far from every other.
    """
    found = [keys_of_text(model, text, layers) for text in texts]
    return {layer: torch.cat([keys[layer][1:].float() for keys in found]) for layer in layers}


def most_changed(Δ: Product, keys: Tensor, count: int) -> Tensor:
    """Return those of keys (N, D) whose outputs Δ changes most."""
    change = Δ.left @ (Δ.right @ Columns.of(keys))
    most = change.flat.norm(dim=0).argsort(descending=True)[:count]
    return keys[most.cpu()]


def closeness(keys: Tensor, key: Tensor, C: NormalMatrix) -> Tensor:
    """Return the cosines in C⁻¹ of keys (n, D) with one key (D,), up to that key's length."""
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
