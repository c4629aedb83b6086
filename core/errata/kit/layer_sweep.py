"""Edit success by layer, as a sweep measured it: plain data, kept among a model's artifacts.

`errata.locate.sweep` makes one; `errata.kit.auto_layers` reads it where a method's layer is `auto`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from errata.common.json_numbers import finite, number

if TYPE_CHECKING:
    from errata.model.model import Model

SCHEMA = 1

MAIN = ("layer", "layers")
"""Hyper-parameters that say where a method edits. A further layer has a name of its own, which ends
in `_layer`."""


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
            "effect": finite(self.effect), "depth": self.depth,
            "metrics": {name: list(ends) for name, ends in self.metrics.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerResult:
        """Return the result that `as_json` wrote."""
        metrics = {name: (ends[0], ends[1], ends[2]) for name, ends in data["metrics"].items()}
        return cls(data["layer"], data["score"], metrics, data["failed"], number(data["effect"]),
                   data.get("depth", 1))  # fmt: skip


@dataclass(frozen=True)
class HeldOutResult:
    """How good the chosen layer is for facts that it was not chosen on.

    Attributes:
        n: number of these facts.
        results: what editing them gave, in the order of the sweep's.
        ratio: (mean, low, high): their score at the chosen layer over that at the layer which is
            best for them; 95 % bootstrap interval over facts, the best found anew in each draw.
            Where all draws are alike, what the intervals of the scores' metrics allow.
    """

    n: int
    results: tuple[LayerResult, ...]
    ratio: tuple[float, float, float]

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        layers = [one.as_json() for one in self.results]
        return {"n": self.n, "ratio": list(self.ratio), "layers": layers}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeldOutResult:
        """Return what `as_json` wrote."""
        results = tuple(LayerResult.from_json(one) for one in data["layers"])
        return cls(data["n"], results, (data["ratio"][0], data["ratio"][1], data["ratio"][2]))


@dataclass(frozen=True, eq=False)
class LayerSweep:
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
        held_out: what editing the held-out facts gave; None without such facts.
        judged_by: the protocol whose metrics were read.
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
    held_out: HeldOutResult | None = None
    judged_by: str = "counterfact"

    @property
    def best(self) -> LayerResult:
        """The place with the highest score; of equal ones the least deep, then the lowest."""
        return max(self.results, key=lambda one: (round(one.score, 9), -one.depth, -one.layer))

    @property
    def protocol(self) -> str:
        """How the scores were measured."""
        where = "layer" if self.option in MAIN else self.option
        names = list(dict.fromkeys(name for one in self.results for name in one.metrics))
        read = " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))
        return (
            f"layer sweep: {self.n} facts edited one at a time by {self.method} at each {where}; "
            f"harmonic mean of {read or 'nothing'} ({self.judged_by})"
        )

    def preset(self) -> str:
        """Return the preset for `registry.yaml`, as YAML."""
        best = self.best
        settings = {self.option: option_value(self.option, best.layers), **self.config}
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
            "config": self.config, "n": self.n, "correlation": finite(self.correlation),
            "protocol": self.protocol, "judged_by": self.judged_by, "best": self.best.layer,
            "best_layers": list(self.best.layers),
            "layers": [one.as_json() for one in self.results],
            "held_out": None if self.held_out is None else self.held_out.as_json(),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LayerSweep:
        """Return the sweep that `as_json` wrote."""
        held = data.get("held_out")
        return cls(
            data["model"], data["model_type"], data["n_layers"], data["method"], data["option"],
            data["config"], data["n"], tuple(LayerResult.from_json(one) for one in data["layers"]),
            number(data["correlation"]), None if held is None else HeldOutResult.from_json(held),
            data.get("judged_by", "counterfact"),
        )  # fmt: skip


def place_name(result: LayerResult) -> str:
    """Return a place in words: "layer 3", "layers 3 to 5"."""
    first, last = result.layers[0], result.layers[-1]
    return f"layer {last}" if first == last else f"layers {first} to {last}"


def is_layer(option: str) -> bool:
    """Say whether a hyper-parameter names a layer, by its own name."""
    return option in MAIN or option.endswith("_layer")


def key_of(model: Model, method: str, option: str = "") -> tuple[str, ...]:
    """Return where a sweep is kept; that of a layer besides the main one has a place of its own."""
    key = ("layer-sweep", model.fingerprint, method)
    return key if option in ("", *MAIN) else (*key, option)


def option_value(option: str, layers: Sequence[int]) -> int | list[int]:
    """Return layers as a hyper-parameter takes them: `layers` several, any other one."""
    return list(layers) if option == "layers" else layers[0]
