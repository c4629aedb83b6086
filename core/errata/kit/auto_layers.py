"""Where a layer that is `auto` comes from: the model's cached sweep of that hyper-parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from errata.errors import ConfigError
from errata.kit.layer_sweep import (
    MAIN,
    SCHEMA,
    LayerResult,
    LayerSweep,
    is_layer,
    key_of,
    place_name,
)

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.model.model import Model

AUTO = "auto"

Config = TypeVar("Config", bound="MethodConfig")


@dataclass(frozen=True)
class AutoLayers:
    """Layers that a cached sweep recommends.

    Attributes:
        layers: ascending.
        why: one sentence: which sweep, and what it measured there.
        sweep: all of it.
    """

    layers: tuple[int, ...]
    why: str
    sweep: LayerSweep = field(repr=False)


def cached_sweep(model: Model, method: str, option: str = "") -> LayerSweep | None:
    """Return the sweep of a method on this model that was made last, or None.

    `option` is the hyper-parameter that was swept, where it is not `layer` or `layers`.
    """
    stored = model.artifacts.load(key_of(model, method, option))
    if stored is None or stored[1].get("schema") != SCHEMA:
        return None
    return LayerSweep.from_json(stored[1])


def auto_layers(
    model: Model, *methods: str, count: int | None = None, option: str = ""
) -> AutoLayers:
    """Return the layers for a method whose configuration says "auto".

    Says which and why through the model's progress and the log.

    Args:
        model: the model; sweeps are kept under its fingerprint.
        *methods: whose sweep, in order of preference: the method itself, then its like.
        count: number of layers in a row. Default: what was best in the sweep, one layer or
            several. Where the sweep did not edit so many together, those whose single layers'
            mean score is highest (of equal ones the lowest).
        option: the hyper-parameter, where it is not `layer` or `layers`.

    Raises:
        ConfigError: no such sweep was made on this model; the message names the command.
    """
    if not methods:
        raise ConfigError("auto_layers needs the name of at least one method.")
    for method in methods:
        found = cached_sweep(model, method, option)
        if found is not None:
            chosen = _chosen(found, count)
            model.progress.note(chosen.why)
            return chosen
    if model.task == "classify":
        raise ConfigError(
            f"{option or 'layer'} 'auto' takes the layer from a sweep, and there are none of a "
            f"sequence classifier such as {model.name}: name the layer."
        )
    which = f" --set option={option}" if option and option not in MAIN else ""
    raise ConfigError(
        f"{option or 'layer'} 'auto' takes the layer from a sweep, and none of {methods[0]} was "
        f"made on {model.name} yet: run `errata locate --sweep --method {methods[0]} --model "
        f"{model.name} --dataset atlas{which}` (or --file with facts that this model knows; with "
        "this cache folder), or name the layer."
    )


def resolve_auto_layers(model: Model, method: str, config: Config) -> tuple[Config, str]:
    """Return a configuration with "auto" replaced by the layers of the method's sweep, and why.

    The configuration itself and "" where nothing is left to choose.
    """
    changes: dict[str, object] = {}
    why: list[str] = []
    for option in filter(is_layer, type(config).model_fields):
        if getattr(config, option) == AUTO:
            several = option == "layers"
            chosen = auto_layers(model, method, count=None if several else 1, option=option)
            changes[option] = chosen.layers if several else chosen.layers[0]
            why.append(chosen.why)
    return (config.model_copy(update=changes), "; ".join(why)) if changes else (config, "")


def _chosen(found: LayerSweep, count: int | None) -> AutoLayers:
    if count is None:
        return _named(found, found.best.layers, found.best.score, found.best.depth)
    together = [one for one in found.results if one.depth == count]
    if together:
        best = max(together, key=lambda one: (round(one.score, 9), -one.layer))
        return _named(found, best.layers, best.score, count)
    scores = {one.layer: one.score for one in found.results if one.depth == 1}
    windows = [
        range(layer, layer + count) for layer in scores
        if all(other in scores for other in range(layer, layer + count))
    ]  # fmt: skip
    if count < 1 or not windows:
        raise ConfigError(
            f"The sweep of {found.method} on {found.model} has no {count} layers in a row; it "
            f"measured {sorted(scores)}."
        )
    chosen = max(windows, key=lambda w: (math.fsum(scores[i] for i in w), -w[0]))
    mean = math.fsum(scores[i] for i in chosen) / count
    return _named(found, tuple(chosen), mean, 1)


def _named(found: LayerSweep, layers: tuple[int, ...], score: float, depth: int) -> AutoLayers:
    place = place_name(LayerResult(layers[-1], score, {}, depth=len(layers)))
    place = place if found.option in MAIN else f"{found.option} {layers[-1]}"
    others = [one for one in found.results if one.depth == depth]
    shown = ", ".join(f"{place_name(one).split(' ', 1)[1]}: {one.score:.3f}" for one in others)
    why = (
        f"auto: {place} of {found.model}, by a sweep of {found.method} over {found.n} facts "
        f"(score {score:.3f}; all: {shown})"
    )
    return AutoLayers(layers, why, found)
