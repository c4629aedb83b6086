"""What closed-form methods take from the configuration and the base: layers, contexts, C, norms."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import ConfigError
from errata.kit.closed_form.config import WeightedConfig
from errata.kit.closed_form.layer_updates import Prompts, Stage, boundary, spread
from errata.kit.closed_form.matrices import NormalMatrix
from errata.kit.contexts import prefix_contexts
from errata.kit.metric import Whitening
from errata.kit.second_moments import documents_of, second_moments, text_hash
from errata.model.forward import at_columns, trace
from errata.model.prompts import pad
from errata.model.tokens import tokenise

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.second_moments import SecondMoment
    from errata.model.model import Model

USUAL_NAMES = (
    "Albert Einstein", "Marie Curie", "William Shakespeare", "Leonardo da Vinci", "Isaac Newton",
    "Jane Austen", "Nelson Mandela", "Wolfgang Amadeus Mozart", "Frida Kahlo", "Pablo Picasso",
    "Charles Darwin", "Ada Lovelace", "Paris", "Buenos Aires", "Mount Everest", "the Eiffel Tower",
    "Lake Victoria", "New Zealand", "Tokyo", "the Colosseum", "South Korea", "Microsoft", "Toyota",
    "the BBC", "Harvard University", "Nintendo", "the Red Cross", "Romeo and Juliet", "Star Wars",
    "The Lord of the Rings", "Windows 95", "Real Madrid",
)  # fmt: skip
"""Subjects of the kinds that people edit facts about."""

_NORM_TOKENS = 2000
_OUTLIERS = 0.05  # NAS leaves out the largest 5 % of the norms


def layers_of(model: Model, config: ClosedFormConfig) -> tuple[int, ...]:
    """Return the edited blocks, ascending, counted from 0.

    Raises `ConfigError` where "auto" was not resolved.
    """
    layers = config.for_model(model.anatomy).layers
    if layers is None or layers == "auto":
        raise ConfigError(
            "layers 'auto' is resolved by the editor, from a sweep (`errata locate --sweep`): go "
            "through `Editor`, or name the layers."
        )
    return layers


def stages_of(model: Model, config: ClosedFormConfig) -> list[Stage]:
    """Return the layers with their targets, as the placement says."""
    layers = layers_of(model, config)
    return boundary(layers) if config.placement == "boundary" else spread(layers)


def prompts_of(
    model: Model, requests: Sequence[Request], config: ClosedFormConfig, *, shared: bool = False
) -> Prompts:
    """Return the requests in the contexts of the configuration, each a problem if edits are joint.

    With `shared` they are facts of one subject: one problem, and one δ.

    Raises `ConfigError` when contexts must be generated and edits are active.
    """
    contexts = contexts_of(model, config)
    each = config.history == "joint" and not shared
    return Prompts(
        model, requests, contexts, config.fact_token,
        each=each, shared=shared, window=config.window,
    )  # fmt: skip


def prepare(model: Model, corpus: Sequence[str], config: ClosedFormConfig) -> None:
    """Compute and keep contexts, second moments, and the norm anchor where it is asked for."""
    contexts_of(model, config)
    moments_of(model, config, corpus)
    if isinstance(config, WeightedConfig):
        second_moment_weights(model, config)
    if config.norm_anchor is not None:
        for layer in {stage.target for stage in stages_of(model, config)}:
            mean_norm(model, layer)


def contexts_of(model: Model, config: ClosedFormConfig) -> tuple[str, ...]:
    """Return the contexts: those of the configuration, else the model's generated ones."""
    if config.contexts is not None:
        return config.contexts
    return prefix_contexts(
        model, config.context_lengths, starts=config.context_starts, seed=config.seed
    )


def moments_of(
    model: Model, config: ClosedFormConfig, corpus: Sequence[str] | None = None
) -> dict[int, SecondMoment]:
    """Return E[k kᵀ] of every edited layer, computed or loaded, on the layer's GPU if any."""
    layers = [stage.layer for stage in stages_of(model, config)]
    found = second_moments(model, layers, corpus=corpus or None, tokens=config.tokens)
    placed: dict[int, SecondMoment] = {}
    for layer, moment in found.items():
        name = model.anatomy.weight(model.anatomy.reader.mlp_out(layer))
        device = model.parameter(name).device
        if device.type != "cuda":
            placed[layer] = moment
            continue
        key = ("second moment", str(device), layer, moment.digest)
        placed[layer] = model.remembered(key, partial(moment.to, device))
    return placed


def known_keys(model: Model, config: ClosedFormConfig) -> dict[int, NormalMatrix]:
    """Return C = E[k kᵀ] of every edited layer, as the formulas take it."""
    moments = moments_of(model, config)
    return {layer: NormalMatrix(Whitening(moment)) for layer, moment in moments.items()}


def second_moment_weights(model: Model, config: WeightedConfig) -> dict[int, float]:
    """Return λ of every edited layer: as it is given, or from what a usual key weighs there."""
    layers = [stage.layer for stage in stages_of(model, config)]
    if config.second_moment_weight is not None:
        return dict.fromkeys(layers, config.second_moment_weight)
    moments = moments_of(model, config)
    return {
        layer: config.relative_weight * usual_key_weight(model, layer, moments[layer])
        for layer in layers
    }


def usual_key_weight(model: Model, layer: int, moment: SecondMoment) -> float:
    """Return the median of kᵀ C⁻¹ k over the last tokens of well-known names.

    It is the scale that λ has to be seen on, and it differs between models, layers and texts by
    orders of magnitude. Computed once, from the base, and kept under the model's fingerprint.
    """

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        texts = [f"It is known that {name}" for name in USUAL_NAMES]
        path = model.anatomy.reader.mlp_out(layer)
        rows = tokenise(model.tokenizer, texts)
        batch = pad(model.tokenizer, [row.ids for row in rows], device=model.device)
        with torch.no_grad(), trace(model.module, path, inputs=True, stop=True) as seen:
            model.module(**batch.inputs(positions=False))
        last = torch.tensor([row.stop for row in rows]) - 1  # a T5's rows are closed by "</s>"
        K = at_columns(seen[path].input, last).T.double().cpu()  # (D, N)
        weights = Whitening(moment).reduce(K).square().sum(0)
        return {"weights": weights.cpu()}, {"median": float(weights.median()), "layer": layer}

    _, about = model.of_base("usual_name_weight", f"layer-{layer}", moment.digest, compute=compute)
    return float(about["median"])


def mean_norm(model: Model, layer: int) -> float:
    """Return the mean norm of a block's MLP output over text, without the largest 5 %.

    NAS averages over the subjects of 1,000 CounterFact prompts; here it is the tokens of the text
    that second moments are measured on, since subjects of other models' facts mean nothing.
    Computed once, from the base, and kept under the model's fingerprint.
    """
    documents = documents_of(model)

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        norms = _output_norms(model, layer, documents)
        kept = norms[: max(1, round(len(norms) * (1 - _OUTLIERS)))]
        return {"norms": norms}, {"norm": float(kept.mean()), "layer": layer}

    _, about = model.of_base("mean_norm", f"layer-{layer}", text_hash(documents), compute=compute)
    return float(about["norm"])


def _output_norms(model: Model, layer: int, documents: Sequence[str]) -> Tensor:
    """Return the norms of a block's MLP output at the first tokens of text, ascending."""
    path = model.anatomy.reader.mlp_out(layer)
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
    return torch.cat(norms).sort().values
