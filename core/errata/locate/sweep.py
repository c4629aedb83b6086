"""Which layer should be edited? Edit at each of them and measure; then compare with the trace.

Hase et al. 2023 found that where tracing peaks says little about where editing works. So the
layer is chosen by what it is for: the sweep edits the same facts at every layer, one at a time,
and takes the layer with the best score; the tracing effect stands beside it, with the rank
correlation of the two.

The result is kept among the model's artifacts. `chosen_layers` reads it: that is where a method
whose preset says `auto` takes its layers from.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from errata.errors import CapabilityError, ConfigError, ErrataError, RequestError
from errata.locate.average import AverageTrace, average
from errata.locate.numbers import spearman

if TYPE_CHECKING:
    from errata.config import MethodConfig
    from errata.edit import Edit
    from errata.editor import Editor
    from errata.model import Model
    from errata.request import Request

logger = logging.getLogger("errata")

METRICS = ("ES", "PS", "NS")
SCHEMA = 1


@dataclass(frozen=True)
class LayerResult:
    """What editing at one layer gave.

    Attributes:
        layer: the block.
        score: harmonic mean of ES, PS and NS (of those that the requests have prompts for).
        metrics: metric → (mean, low, high) of its 95 % interval.
        failed: edits that the method or a guard refused; they count as zero everywhere.
        effect: average indirect effect of tracing this layer at the last corrupted token.
    """

    layer: int
    score: float
    metrics: dict[str, tuple[float, float, float]]
    failed: int = 0
    effect: float = math.nan


@dataclass(frozen=True, eq=False)
class Sweep:
    """Edit success by layer.

    Attributes:
        model: name of the model.
        model_type: of its configuration.
        n_layers: number of its blocks.
        method: the method that edited.
        option: the hyper-parameter that names its layer.
        config: the other hyper-parameters that were set for the sweep.
        n: number of requests.
        results: one per layer, ascending.
        correlation: Spearman's ρ of score and tracing effect over the layers; NaN untraced.
        trace: what the effects were taken from.
    """

    model: str
    model_type: str
    n_layers: int
    method: str
    option: str
    config: dict[str, Any]
    n: int
    results: tuple[LayerResult, ...]
    correlation: float = math.nan
    trace: AverageTrace | None = field(default=None, repr=False)

    @property
    def best(self) -> LayerResult:
        """The layer with the highest score; of equal ones the lowest."""
        return max(self.results, key=lambda one: (one.score, -one.layer))

    @property
    def protocol(self) -> str:
        """How the scores were measured."""
        return (
            f"layer sweep: {self.n} facts edited one at a time by {self.method} at each layer; "
            "harmonic mean of ES, PS and NS (counterfact)"
        )

    def preset(self) -> str:
        """Return the preset for `registry.yaml`, as YAML."""
        best = self.best
        value = best.layer if self.option == "layer" else [best.layer]
        values = ", ".join(
            f"{name}: {_yaml(setting)}"
            for name, setting in {self.option: value, **self.config}.items()
        )
        return (
            "methods:\n"
            f"  {self.method}:\n"
            "    presets:\n"
            f"      - match: {{model_type: {self.model_type}, n_layers: {self.n_layers}}}\n"
            f"        values: {{{values}}}\n"
            f"        source: layer sweep over {self.n} facts, score {best.score:.3f} at layer "
            f"{best.layer}\n"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema": SCHEMA, "model": self.model, "model_type": self.model_type,
            "n_layers": self.n_layers, "method": self.method, "option": self.option,
            "config": self.config, "n": self.n, "correlation": _finite(self.correlation),
            "protocol": self.protocol, "best": self.best.layer,
            "layers": [
                {"layer": one.layer, "score": one.score, "failed": one.failed,
                 "effect": _finite(one.effect),
                 "metrics": {name: list(ends) for name, ends in one.metrics.items()}}
                for one in self.results
            ],
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sweep:
        """Return the sweep that `as_json` wrote, without its trace."""
        results = tuple(
            LayerResult(
                one["layer"], one["score"],
                {name: (ends[0], ends[1], ends[2]) for name, ends in one["metrics"].items()},
                one["failed"], _number(one["effect"]),
            )
            for one in data["layers"]
        )  # fmt: skip
        return cls(
            data["model"], data["model_type"], data["n_layers"], data["method"], data["option"],
            data["config"], data["n"], results, _number(data["correlation"]),
        )  # fmt: skip


def sweep(
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    *,
    layers: Sequence[int] | None = None,
    trace: bool = True,
    samples: int = 5,
    config: dict[str, Any] | None = None,
) -> Sweep:
    """Edit each request at each layer, measure and take the edit off; keep the result.

    Args:
        editor: with its ledger in memory and no edit on the model: a sweep makes many edits that
            nobody wants to keep.
        requests: facts; those that the model knows say most.
        method: a method with a hyper-parameter `layer` or `layers`.
        layers: which; default: all.
        trace: also trace the requests, for the comparison (decoders and whatever tracing takes).
        samples: corrupted runs of each trace.
        config: other hyper-parameters of the method.

    Raises:
        CapabilityError: the method edits at no layer that could be named.
        ConfigError: edits on the model, a durable ledger, or a bad layer.
    """
    requests = list(requests)
    if not requests:
        raise RequestError("A sweep needs at least one request.")
    if editor.model.stack.ids:
        raise ConfigError("A sweep starts from the base model: revert the active edits first.")
    if editor.ledger.path is not None:
        raise ConfigError(
            "A sweep makes many edits that nobody wants to keep: open the editor without a ledger."
        )
    settings, _ = editor.configure(method, config)
    option = layer_option(method, settings)
    anatomy = editor.model.anatomy
    chosen = (
        range(anatomy.n_layers) if layers is None else sorted({anatomy.layer(i) for i in layers})
    )
    found = None
    if trace:
        found = average(editor.model, requests, variants=("hidden",), samples=samples)
    results = []
    for layer in editor.model.progress.track(list(chosen), f"sweeping {method}", len(chosen)):
        value = layer if option == "layer" else [layer]
        result = _at(editor, requests, method, layer, {**(config or {}), option: value})
        results.append(result)
    if found is not None:
        effects = found.effects["hidden"].of("last subject token")
        results = [_with_effect(one, float(effects[one.layer])) for one in results]
    correlation = spearman([r.score for r in results], [r.effect for r in results])
    done = Sweep(
        editor.model.name, anatomy.model_type, anatomy.n_layers, method, option,
        dict(config or {}), len(requests), tuple(results),
        correlation if found is not None else math.nan, found,
    )  # fmt: skip
    editor.model.artifacts.save(_key(editor.model, method), {"_": torch.zeros(1)}, done.as_json())
    return done


def layer_option(method: str, settings: MethodConfig) -> str:
    """Return the hyper-parameter that names a method's layer: "layer" or "layers"."""
    for option in ("layer", "layers"):
        if option in type(settings).model_fields:
            return option
    raise CapabilityError(
        f"The method {method!r} has no hyper-parameter 'layer' or 'layers': there is nothing to "
        f"sweep. It has: {', '.join(type(settings).model_fields)}."
    )


def _at(
    editor: Editor, requests: Sequence[Request], method: str, layer: int, config: dict[str, Any]
) -> LayerResult:
    from errata.evaluate import Measurement, pool

    groups: list[list[Measurement]] = []
    edits = _computed(editor, requests, method, config)
    for request, edit in zip(requests, edits, strict=True):
        if edit is None:
            continue
        try:
            editor.apply(edit)
        except ErrataError as error:  # a guard, or numbers that are not finite
            logger.debug("layer %d: %s", layer, error)
            continue
        groups.append(editor.evaluate(request, ("counterfact",)))
        editor.revert(edit)
    failed = len(requests) - len(groups)
    found = {one.metric: one for one in pool(groups)}
    share = len(groups) / len(requests)
    metrics = {}
    for name in METRICS:
        if name in found:
            one = found[name]
            ends = one.interval or (one.value, one.value)
            metrics[name] = (one.value * share, ends[0] * share, ends[1] * share)
    return LayerResult(layer, _harmonic([mean for mean, _, _ in metrics.values()]), metrics, failed)


def _computed(
    editor: Editor, requests: Sequence[Request], method: str, config: dict[str, Any]
) -> list[Edit | None]:
    """Return one edit per request, all from the base: together where the method can, else singly.

    None stands for a request that the method could not edit.
    """
    if editor.registry.method(method).capabilities.batch and len(requests) > 1:
        try:
            edits = editor.edit(
                requests, method=method, config=config, batch_size=len(requests), apply=False
            )
        except ConfigError:
            raise
        except ErrataError as error:  # one request spoils the batch
            logger.debug("%s", error)
        else:
            if len(edits) == len(requests):
                return list(edits)
    found: list[Edit | None] = []
    for request in requests:
        try:
            found.append(editor.edit(request, method=method, config=config, apply=False))
        except ConfigError:
            raise
        except ErrataError as error:  # a vanishing division factor, for one
            logger.debug("%s", error)
            found.append(None)
    return found


def _harmonic(values: Sequence[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def _with_effect(one: LayerResult, effect: float) -> LayerResult:
    return LayerResult(one.layer, one.score, one.metrics, one.failed, effect)


def _key(model: Model, method: str) -> tuple[str, ...]:
    return ("layer-sweep", model.fingerprint, method)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _yaml(value: Any) -> str:
    return json.dumps(value)


# -- where `layers: auto` gets its layers ----------------------------------------------------------


@dataclass(frozen=True)
class ChosenLayers:
    """Layers that a cached sweep recommends.

    Attributes:
        layers: ascending.
        why: one sentence: which sweep, and what it measured there.
        sweep: all of it.
    """

    layers: tuple[int, ...]
    why: str
    sweep: Sweep = field(repr=False)


def cached_sweep(model: Model, method: str) -> Sweep | None:
    """Return the sweep of a method on this model that was made last, or None."""
    stored = model.artifacts.load(_key(model, method))
    if stored is None or stored[1].get("schema") != SCHEMA:
        return None
    return Sweep.from_json(stored[1])


def chosen_layers(model: Model, *methods: str, count: int = 1) -> ChosenLayers:
    """Return the layers for a method whose configuration says "auto".

    The best layer of the cached sweep; with `count` > 1 that many in a row, where the mean of
    their scores is highest (of equal ones the lowest). Says which and why through
    the model's progress and the log.

    Args:
        model: the model; sweeps are kept under its fingerprint.
        *methods: whose sweep, in order of preference: the method itself, then its like.
        count: number of layers.

    Raises:
        ConfigError: no such sweep was made on this model; the message names the command.
    """
    if not methods:
        raise ConfigError("chosen_layers needs the name of at least one method.")
    for method in methods:
        found = cached_sweep(model, method)
        if found is not None:
            chosen = _window(found, count)
            logger.info("%s", chosen.why)
            model.progress.note(chosen.why)
            return chosen
    raise ConfigError(
        f"layer 'auto' takes the layer from a sweep, and none of {methods[0]} was made on "
        f"{model.name} yet: run `errata locate --sweep --method {methods[0]} --model {model.name}`"
        " (with this cache folder), or name the layer."
    )


def _window(found: Sweep, count: int) -> ChosenLayers:
    scores = {one.layer: one.score for one in found.results}
    windows = [
        range(layer, layer + count) for layer in scores
        if all(other in scores for other in range(layer, layer + count))
    ]  # fmt: skip
    if count < 1 or not windows:
        raise ConfigError(
            f"The sweep of {found.method} on {found.model} has no {count} layers in a row; it "
            f"measured {sorted(scores)}."
        )
    best = max(windows, key=lambda w: (math.fsum(scores[i] for i in w), -w[0]))
    layers = tuple(best)
    shown = f"layer {layers[0]}" if count == 1 else f"layers {layers[0]} to {layers[-1]}"
    mean = math.fsum(scores[i] for i in layers) / count
    why = (
        f"auto: {shown} of {found.model}, by a sweep of {found.method} over {found.n} facts "
        f"(score {mean:.3f}; all layers: "
        + ", ".join(f"{layer} {score:.3f}" for layer, score in sorted(scores.items()))
        + ")"
    )
    return ChosenLayers(layers, why, found)
