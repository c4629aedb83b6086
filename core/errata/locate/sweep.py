"""Which layer should be edited? Edit at each of them and measure; then compare with the trace.

Hase et al. 2023 found that where tracing peaks says little about where editing works. So the
layer is chosen by what it is for: the sweep edits the same facts at every layer, one at a time,
and takes the layer with the best score; the tracing effect stands beside it, with the rank
correlation of the two. A choice judged on the facts that it was made on looks better than it is:
`held_out` facts, edited at the same layers, say how far it is from the best for others.

The result is kept among the model's artifacts; `errata.kit.auto_layers` reads it for methods whose
layer is `auto`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from errata.contract import plugins
from errata.contract.measurement import RESAMPLES, mean_interval
from errata.errors import CapabilityError, ConfigError, ErrataError, RequestError
from errata.locate.average import AverageTrace, average
from errata.locate.rank_statistics import spearman

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.contract.config import MethodConfig
    from errata.editor import Editor
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")

METRICS = ("ES", "PS", "NS")
SCHEMA = 1

# What no metric of a sweep reads; sampling texts would take most of the time.
_UNASKED = {"generation": (), "attribute": (), "references": ()}


@dataclass(frozen=True)
class LayerResult:
    """What editing at one layer, or at some in a row, gave.

    Attributes:
        layer: the block; of several the last.
        score: harmonic mean of ES, PS and NS (of those that the requests have prompts for).
        metrics: metric → (mean, low, high) of its 95 % interval.
        failed: edits that the method or a guard refused; they count as zero everywhere.
        effect: average indirect effect of tracing this layer at the last corrupted token.
        depth: number of layers edited together.
    """

    layer: int
    score: float
    metrics: dict[str, tuple[float, float, float]]
    failed: int = 0
    effect: float = math.nan
    depth: int = 1

    @property
    def layers(self) -> tuple[int, ...]:
        """The edited layers, ascending."""
        return tuple(range(self.layer - self.depth + 1, self.layer + 1))

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "layer": self.layer, "score": self.score, "failed": self.failed,
            "effect": _finite(self.effect), "depth": self.depth,
            "metrics": {name: list(ends) for name, ends in self.metrics.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerResult:
        """Return the result that `as_json` wrote."""
        metrics = {name: (ends[0], ends[1], ends[2]) for name, ends in data["metrics"].items()}
        return cls(data["layer"], data["score"], metrics, data["failed"], _number(data["effect"]),
                   data.get("depth", 1))  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """How good the chosen layer is for facts that it was not chosen on.

    Attributes:
        n: number of these facts.
        results: what editing them gave, in the order of the sweep's.
        ratio: (mean, low, high): their score at the chosen layer over that at the layer which is
            best for them; 95 % bootstrap interval over facts, the best found anew in each draw.
    """

    n: int
    results: tuple[LayerResult, ...]
    ratio: tuple[float, float, float]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        layers = [one.as_json() for one in self.results]
        return {"n": self.n, "ratio": list(self.ratio), "layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Judged:
        """Return what `as_json` wrote."""
        results = tuple(LayerResult.from_json(one) for one in data["layers"])
        return cls(data["n"], results, (data["ratio"][0], data["ratio"][1], data["ratio"][2]))


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
        results: one per place: by depth, then by layer, ascending.
        correlation: Spearman's ρ of score and tracing effect over the layers (of the smallest
            depth); NaN untraced.
        trace: what the effects were taken from.
        judged: on held-out facts; None without.
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
    judged: Judged | None = None

    @property
    def best(self) -> LayerResult:
        """The place with the highest score; of equal ones the least deep, then the lowest."""
        return max(self.results, key=lambda one: (one.score, -one.depth, -one.layer))

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
        settings = {self.option: _value(self.option, best.layers), **self.config}
        values = ", ".join(f"{name}: {json.dumps(value)}" for name, value in settings.items())
        return (
            "methods:\n"
            f"  {self.method}:\n"
            "    presets:\n"
            f"      - match: {{model_type: {self.model_type}, n_layers: {self.n_layers}}}\n"
            f"        values: {{{values}}}\n"
            f"        source: layer sweep over {self.n} facts, score {best.score:.3f} at "
            f"{place_name(best)}\n"
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema": SCHEMA, "result": "sweep", "model": self.model, "model_type": self.model_type,
            "n_layers": self.n_layers, "method": self.method, "option": self.option,
            "config": self.config, "n": self.n, "correlation": _finite(self.correlation),
            "protocol": self.protocol, "best": self.best.layer,
            "best_layers": list(self.best.layers),
            "layers": [one.as_json() for one in self.results],
            "held_out": None if self.judged is None else self.judged.as_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Sweep:
        """Return the sweep that `as_json` wrote, without its trace."""
        held = data.get("held_out")
        return cls(
            data["model"], data["model_type"], data["n_layers"], data["method"], data["option"],
            data["config"], data["n"], tuple(LayerResult.from_json(one) for one in data["layers"]),
            _number(data["correlation"]), judged=None if held is None else Judged.from_json(held),
        )  # fmt: skip


def sweep(
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    *,
    layers: Sequence[int] | None = None,
    depths: Sequence[int] = (1,),
    held_out: Sequence[Request] = (),
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
        depths: how many layers in a row are edited together, each number a sweep of its own over
            the same facts; more than 1 needs a method with `layers`.
        held_out: further facts, to judge the choice by: they are edited at the same layers and
            count for nothing else. None of their subjects may be in `requests`.
        trace: also trace the requests, for the comparison (decoders and whatever tracing takes).
        samples: corrupted runs of each trace.
        config: other hyper-parameters of the method.

    Raises:
        CapabilityError: the method edits at no layer that could be named.
        ConfigError: edits on the model, a durable ledger, or a bad layer.
        RequestError: no request, or subjects on both sides.
    """
    requests, held_out = list(requests), list(held_out)
    _check(editor, requests, held_out)
    option = layer_option(method, plugins.load(method).config)
    config = {name: value for name, value in (config or {}).items() if name != option}
    anatomy = editor.model.anatomy
    chosen = (
        range(anatomy.n_layers) if layers is None else sorted({anatomy.layer(i) for i in layers})
    )
    places = _places(chosen, depths, option, method)
    # A bad hyper-parameter is refused before anything is traced.
    editor.configure(method, {**config, option: _value(option, places[0])})
    found = None
    if trace:
        found = average(editor.model, requests, variants=("hidden",), samples=samples)
    results, held = [], []
    for within in editor.model.progress.track(places, f"sweeping {method}", len(places)):
        settings = {**config, option: _value(option, within)}
        measured = _measured(editor, [*requests, *held_out], method, settings, within)
        results.append(measured[: len(requests)])
        held.append(measured[len(requests) :])
    rows = [_result(within, table) for within, table in zip(places, results, strict=True)]
    correlation = math.nan
    if found is not None:
        effects = found.effects["hidden"].of("last subject token")
        rows = [replace(one, effect=float(effects[one.layer])) for one in rows]
        least = [one for one in rows if one.depth == min(depths)]
        correlation = spearman([one.score for one in least], [one.effect for one in least])
    done = Sweep(
        editor.model.name, anatomy.model_type, anatomy.n_layers, method, option,
        config, len(requests), tuple(rows), correlation, found,
    )  # fmt: skip
    if held_out:
        done = replace(done, judged=_judged(done, places, held))
    editor.model.artifacts.save(key_of(editor.model, method), {"_": torch.zeros(1)}, done.as_json())
    return done


def layer_option(method: str, settings: type[MethodConfig]) -> str:
    """Return the hyper-parameter that names a method's layer: "layer" or "layers"."""
    for option in ("layer", "layers"):
        if option in settings.model_fields:
            return option
    raise CapabilityError(
        f"The method {method!r} has no hyper-parameter 'layer' or 'layers': there is nothing to "
        f"sweep. It has: {', '.join(settings.model_fields)}."
    )


def split_by_subject(
    requests: Iterable[Request], held_out: int
) -> tuple[list[Request], list[Request]]:
    """Return requests to choose by and the last `held_out` to judge by, each subject once.

    Of the requests about one subject the first is taken.
    """
    once: dict[str, Request] = {}
    for request in requests:
        once.setdefault(request.subject, request)
    kept = list(once.values())
    if not 0 < held_out < len(kept):
        raise RequestError(
            f"held_out={held_out!r}: the requests are about {len(kept)} subjects; hold out at "
            "least one and leave at least one to choose the layer by."
        )
    return kept[:-held_out], kept[-held_out:]


def place_name(one: LayerResult) -> str:
    """Return a place in words: "layer 3", "layers 3 to 5"."""
    first, last = one.layers[0], one.layers[-1]
    return f"layer {last}" if first == last else f"layers {first} to {last}"


def key_of(model: Model, method: str) -> tuple[str, ...]:
    """Return where a sweep is kept."""
    return ("layer-sweep", model.fingerprint, method)


def _check(editor: Editor, requests: Sequence[Request], held_out: Sequence[Request]) -> None:
    if not requests:
        raise RequestError("A sweep needs at least one request.")
    bare = sum(request.target_true is None for request in (*requests, *held_out))
    if bare:
        raise RequestError(
            f"{bare} of {len(requests) + len(held_out)} requests have no target_true: ES compares "
            "the new answer with the old one. Add it, or leave these requests out."
        )
    shared = {r.subject for r in requests} & {r.subject for r in held_out}
    if shared:
        raise RequestError(
            f"{len(shared)} subjects are in the requests and in the held-out ones, "
            f"{min(shared)!r} for one: a layer chosen on a subject cannot be judged on it."
        )
    if editor.model.stack.ids:
        raise ConfigError("A sweep starts from the base model: revert the active edits first.")
    if editor.ledger.path is not None:
        raise ConfigError(
            "A sweep makes many edits that nobody wants to keep: open the editor without a ledger."
        )


def _places(
    layers: Sequence[int], depths: Sequence[int], option: str, method: str
) -> list[tuple[int, ...]]:
    """Return the runs of layers to be edited, by depth, then ascending."""
    if not depths or min(depths) < 1:
        raise ConfigError(f"depths={list(depths)!r}: each must be at least 1.")
    if option == "layer" and set(depths) != {1}:
        raise ConfigError(f"{method} edits one layer: there are no depths to compare.")
    places = [
        tuple(range(last - depth + 1, last + 1))
        for depth in sorted(set(depths)) for last in layers
        if all(layer in layers for layer in range(last - depth + 1, last + 1))
    ]  # fmt: skip
    missing = [d for d in depths if not any(len(place) == d for place in places)]
    if missing:
        raise ConfigError(f"No {missing[0]} layers in a row are among {list(layers)}.")
    return places


# -- measuring -------------------------------------------------------------------------------------


def _measured(
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    config: dict[str, Any],
    layers: Sequence[int],
) -> NDArray[np.float64]:
    """Return (requests, metrics): NaN where one has no such prompts, -1 where the edit failed."""
    table = np.full((len(requests), len(METRICS)), math.nan)
    edits = _computed(editor, requests, method, config)
    for row, (request, edit) in enumerate(zip(requests, edits, strict=True)):
        if edit is not None:
            try:
                editor.apply(edit)
            except ErrataError as error:  # a guard, or numbers that are not finite
                logger.debug("layers %s: %s", list(layers), error)
                edit = None
        if edit is None:
            table[row] = -1
            continue
        asked = request.model_copy(update=_UNASKED)
        found = {one.metric: one.value for one in editor.evaluate(asked, ("counterfact",))}
        editor.revert(edit)
        table[row] = [found.get(name, math.nan) for name in METRICS]
    return table


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


def _result(layers: Sequence[int], table: NDArray[np.float64]) -> LayerResult:
    failed = int((table < 0).any(axis=1).sum())
    metrics = {}
    measured = np.where(table < 0, math.nan, table)
    there = [bool(np.isfinite(column).any()) for column in measured.T]
    for name, column, found in zip(METRICS, table.T, there, strict=True):
        values = np.maximum(column[~np.isnan(column)], 0).tolist()
        if not values or not (found or failed == len(table)):
            continue  # no request has such prompts
        mean = math.fsum(values) / len(values)
        low, high = mean_interval(values, shares=True) or (mean, mean)
        metrics[name] = (mean, low, high)
    return LayerResult(
        layers[-1], _harmonic([mean for mean, _, _ in metrics.values()]), metrics, failed,
        depth=len(layers),
    )  # fmt: skip


def _harmonic(values: Sequence[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def _judged(
    done: Sweep, places: Sequence[tuple[int, ...]], held: Sequence[NDArray[np.float64]]
) -> Judged:
    """Return the scores of held-out facts, and the chosen place's share of the best one's."""
    results = tuple(_result(within, table) for within, table in zip(places, held, strict=True))
    index = places.index(done.best.layers)
    scores = np.array([one.score for one in results])
    count = len(held[0])
    draws = np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count))
    # (places, draws): the score of each place on each draw of facts.
    drawn = np.stack([_scores(table, draws) for table in held])
    low, high = np.quantile(_ratio(drawn[index], drawn.max(axis=0)), (0.025, 0.975))
    mean = float(_ratio(scores[index], scores.max()))
    return Judged(count, results, (mean, float(low), float(high)))


def _scores(table: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the harmonic mean of the metrics for each draw of facts."""
    values = np.where(table < 0, 0.0, table)
    values = values[:, ~np.isnan(values).all(axis=0)]
    chosen = values[draws]  # (draws, facts, metrics)
    counts = (~np.isnan(chosen)).sum(axis=1)
    # A draw without a fact that has a metric's prompts says nothing about it: it counts as 1.
    means = np.where(counts, np.nansum(chosen, axis=1) / np.maximum(counts, 1), 1.0)
    inverse = (1 / np.maximum(means, 1e-12)).sum(axis=1)
    return np.where((means > 0).all(axis=1), means.shape[1] / inverse, 0.0)


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Return part / whole; 1 where no place has any success."""
    found: NDArray[np.float64] = np.where(whole > 0, part / np.where(whole > 0, whole, 1), 1.0)
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _value(option: str, layers: Sequence[int]) -> int | list[int]:
    return layers[0] if option == "layer" else list(layers)
