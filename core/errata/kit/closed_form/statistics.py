"""What closed-form methods take from the base: contexts, second moments, values, norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from errata.errors import ConfigError
from errata.kit.closed_form.layer_updates import Prompts, Stage, boundary, spread
from errata.kit.contexts import prefix_contexts
from errata.kit.metric import Metric, Whitening
from errata.kit.second_moments import documents_of, second_moments, text_hash
from errata.kit.values import ValueSettings, optimise_values
from errata.model.forward import trace
from errata.model.prompts import pad
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.second_moments import SecondMoment
    from errata.kit.values import Value
    from errata.model.model import Model

_NORM_TOKENS = 2000
_OUTLIERS = 0.05  # NAS leaves out the largest 5 % of the norms


def layers_of(model: Model, config: ClosedFormConfig) -> list[int]:
    """Return the edited blocks, ascending, counted from 0."""
    anatomy = model.anatomy
    if config.layers == "auto":
        raise ConfigError("layers 'auto' must be resolved first: `errata.kit.auto_layers`.")
    if config.layers is None:
        last = anatomy.n_layers // 3
        return list(range(max(0, last + 1 - config.default_depth), last + 1))
    return sorted(anatomy.layer(layer) for layer in config.layers)


def stages_of(model: Model, config: ClosedFormConfig, *, root: bool = False) -> list[Stage]:
    """Return the layers with their targets and shares, as the placement says."""
    layers = layers_of(model, config)
    return boundary(layers) if config.placement == "boundary" else spread(layers, root)


def prepare(model: Model, corpus: Sequence[str], config: ClosedFormConfig) -> None:
    """Compute what belongs to the base: contexts, second moments, and the anchor where asked."""
    contexts_of(model, config)
    stages = stages_of(model, config)
    moments_of(model, [stage.layer for stage in stages], config, corpus)
    if config.norm_anchor is not None:
        for layer in {stage.target for stage in stages}:
            mean_norm(model, layer)


def contexts_of(model: Model, config: ClosedFormConfig) -> tuple[str, ...]:
    """Return the contexts: those of the configuration, else the model's generated ones."""
    if config.contexts is not None:
        return config.contexts
    return prefix_contexts(
        model, config.context_lengths, starts=config.context_starts, seed=config.seed
    )


def moments_of(
    model: Model,
    layers: Sequence[int],
    config: ClosedFormConfig,
    corpus: Sequence[str] | None = None,
) -> dict[int, SecondMoment]:
    """Return C of the layers, computed or loaded, each on its layer's GPU where it has one."""
    found = second_moments(model, layers, corpus=corpus or None, tokens=config.tokens)
    placed: dict[int, SecondMoment] = {}
    for layer, moment in found.items():
        name = model.anatomy.weight(model.anatomy.mlp_out(layer))
        device = model.parameter(name).device
        if device.type != "cuda":
            placed[layer] = moment
            continue
        key = ("second_moment", str(device), layer, moment.digest)
        if key not in model.memo:
            model.memo[key] = moment.to(device)
        placed[layer] = model.memo[key]
    return placed


def whitenings_of(model: Model, config: ClosedFormConfig) -> dict[int, Metric]:
    """Return the metric C⁻¹ of every edited layer."""
    layers = [stage.layer for stage in stages_of(model, config)]
    return {layer: Whitening(C) for layer, C in moments_of(model, layers, config).items()}


def optimised(
    model: Model,
    requests: Sequence[Request],
    contexts: Sequence[str],
    layer: int,
    config: ClosedFormConfig,
    *,
    at: Literal["block", "attention+mlp"] = "block",
    top_factor: float = 1.0,
    top_kl: float | None = None,
) -> list[Value]:
    """Return the optimised value of each request at a layer's output."""
    settings = ValueSettings(
        layer=layer,
        at=at,
        loss_layer=config.loss_layer,
        steps=config.steps,
        lr=config.lr,
        weight_decay=config.weight_decay,
        clamp=config.clamp,
        kl_factor=config.kl_factor,
        kl_prompt=config.kl_prompt,
        early_stop=config.early_stop,
        top_steps=config.top_steps,
        top_factor=top_factor,
        top_kl=top_kl,
        fact_token=config.fact_token,
    )
    return optimise_values(model, requests, contexts, settings)


def block_targets(
    model: Model,
    requests: Sequence[Request],
    contexts: Sequence[str],
    prompts: Prompts,
    stages: Sequence[Stage],
    config: ClosedFormConfig,
) -> dict[int, Tensor]:
    """Return z = h0 + δ, (d, N) fp64, for every target layer of the stages."""
    targets: dict[int, Tensor] = {}
    for layer in dict.fromkeys(stage.target for stage in stages):
        values = optimised(model, requests, contexts, layer, config)
        h0 = torch.stack([value.v0 for value in values]).double().cpu()  # (N, d)
        delta = torch.stack([value.delta for value in values]).double().cpu()
        if config.norm_anchor is not None:
            _, m0 = prompts.read(layer, model.anatomy.mlp_out(layer), (), False)
            delta = anchored(m0, delta, config.norm_anchor * mean_norm(model, layer))
        targets[layer] = (h0 + delta).T
    return targets


def anchored(m0: Tensor, delta: Tensor, norm: float) -> Tensor:
    """Return δ such that the MLP's part m0 + δ has this norm (NAS, 2602.02543); rows are requests.

    What attention and the residual stream bring is left alone. The authors' code drops an edit,
    silently, whose value is more than twice the anchor; here it is scaled like any other.
    """
    value = m0 + delta
    scaled: Tensor = value * (norm / value.norm(dim=1, keepdim=True))
    return scaled - m0


def mean_norm(model: Model, layer: int) -> float:
    """Return the mean norm of a block's MLP output over text, without the largest 5 %.

    NAS averages over the subjects of 1,000 CounterFact prompts; here it is the tokens of the text
    that second moments are measured on, since subjects of other models' facts mean nothing.
    Computed once, from the base, and kept under the model's fingerprint.
    """
    documents = documents_of(model)
    key = ("mean_norm", model.fingerprint, f"layer-{layer}", text_hash(documents))
    stored = model.artifacts.load(key)
    if stored is not None and isinstance(stored[1].get("norm"), float):
        return float(stored[1]["norm"])
    if model.stack.entries:
        raise ConfigError(
            f"The norm anchor of layer {layer} is measured on the unedited model, and edits "
            f"{', '.join(model.stack.ids)} are active: call the method's `prepare` with edits off."
        )
    path = model.anatomy.mlp_out(layer)
    limit = min(model.anatomy.context or 128, 128)
    norms: list[Tensor] = []
    for row in tokenise(model.tokenizer, documents[:_NORM_TOKENS]):
        batch = pad(model.tokenizer, [row.ids[:limit]], device=model.device)
        with torch.no_grad(), trace(model.module, path, stop=True) as seen:
            model.module(**batch.inputs(positions=False))
        output = seen[path].output
        assert output is not None
        norms.append(output.reshape(-1, output.shape[-1]).float().norm(dim=1).cpu())
        if sum(map(len, norms)) >= _NORM_TOKENS:
            break
    ordered = torch.cat(norms).sort().values
    norm = float(ordered[: max(1, round(len(ordered) * (1 - _OUTLIERS)))].mean())
    model.artifacts.save(key, {"norms": ordered}, {"norm": norm, "layer": layer})
    return norm
