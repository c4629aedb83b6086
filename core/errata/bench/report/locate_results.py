"""What `errata locate --json` and `errata diff --json` wrote, for a report: facts and pictures."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.bench.report.formatting import interval, plain
from errata.errors import ConfigError, IntegrityError, reason_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_BYTES = 64 * 2**20
SCHEMA = 1


@dataclass(frozen=True)
class Picture:
    """One figure with what it shows, in words.

    Attributes:
        alt: said to who cannot see it.
        figure: of matplotlib.
    """

    alt: str
    figure: Figure

    @property
    def source(self) -> str:
        """The picture as a data URI: the page loads nothing."""
        from errata.plots.style import rendered

        data = base64.b64encode(rendered(self.figure, "png")).decode("ascii")
        return f"data:image/png;base64,{data}"


@dataclass(frozen=True, eq=False)
class Located:
    """One result of locating.

    Attributes:
        path: the file.
        title: what was looked for, in a few words.
        facts: (name, value), the main numbers.
        protocol: how they were measured.
        draw: makes the pictures; raises `MissingExtraError` without matplotlib.
    """

    path: Path
    title: str
    facts: tuple[tuple[str, str], ...]
    protocol: str
    draw: Callable[[], list[Picture]] = field(repr=False)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "path": str(self.path), "title": self.title, "protocol": self.protocol,
            "facts": [list(fact) for fact in self.facts],
        }  # fmt: skip


def read_located(path: str | Path) -> Located:
    """Read one file.

    Raises:
        ConfigError: no such file. IntegrityError: one that holds no result of locating.
    """
    source = Path(path)
    try:
        if source.stat().st_size > MAX_BYTES:
            raise IntegrityError(f"{source} is larger than {MAX_BYTES} bytes: no result is.")
        data = json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read {str(source)!r}: {reason_of(error)}.") from error
    except ValueError as error:  # no JSON, or no text
        raise IntegrityError(f"{source} is not JSON: {error}. {_HINT}") from None
    what = str(data.get("result")) if isinstance(data, dict) else "none"
    if what not in _READERS or data.get("schema") != SCHEMA:
        raise IntegrityError(
            f"{source} holds no result of locating (result {what!r}, known are "
            f"{', '.join(map(repr, _READERS))}, schema {SCHEMA}). {_HINT}"
        )
    try:
        return _READERS[what](source, data)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise IntegrityError(
            f"{source} is damaged: {type(error).__name__}: {error}. {_HINT}"
        ) from None


_HINT = "Write it with `errata locate … --json > FILE` or `errata diff … --json > FILE`."


def _location(path: Path, data: Mapping[str, Any]) -> Located:
    from errata.locate.trace_result import CausalTrace
    from errata.plots.style import token

    evidence = data["evidence"]
    facts = [
        ("place", f"layer {int(data['layer'])} ({data['module']}), token {token(data['token'])}"),
        ("score", _number(data["score"])),
    ]
    title = str(evidence.get("prompt") or "one prompt")
    if not {"low", "high", "kind", "tokens"} <= set(evidence):
        return Located(path, title, tuple(facts), str(data["protocol"]), lambda: [])
    trace = CausalTrace.from_json(data)
    facts.append(("clean, corrupted", f"{plain(trace.high)}, {plain(trace.low)}"))

    def draw() -> list[Picture]:
        from errata import plots

        alt = f"Tokens by layers: P({trace.answer.strip()!r}) after restoring each; {facts[0][1]}."
        return [Picture(alt, plots.heat_map(trace))]

    return Located(path, title, tuple(facts), str(data["protocol"]), draw)


def _phrasings(path: Path, data: Mapping[str, Any]) -> Located:
    prompts = [str(one["prompt"]) for one in data["phrasings"]]
    each = [_location(path, one) for one in data["phrasings"]]
    facts = []
    for prompt, one, found in zip(prompts, data["phrasings"], each, strict=True):
        highest = ", ".join(str(int(layer)) for layer in one["layers"])
        facts.append((prompt, f"{found.facts[0][1]}, {one['role']}; highest there: {highest}"))
    shared, chance = plain(float(data["overlap"])), plain(float(data["chance"]))
    facts.append(("mean overlap of the highest layers", f"{shared} (random choices: {chance})"))

    def draw() -> list[Picture]:
        return [
            Picture(f"{prompt} – {picture.alt}", picture.figure)
            for prompt, found in zip(prompts, each, strict=True)
            for picture in found.draw()
        ]

    title = f"{data['subject']}: {len(prompts)} phrasings"
    return Located(path, title, tuple(facts), each[0].protocol, draw)


def _average(path: Path, data: Mapping[str, Any]) -> Located:
    from errata.locate import AverageTrace

    found = AverageTrace.from_json(data)
    facts = [("total effect", f"{plain(found.total[0])} ({interval(found.total[1:])})")]
    for name, effects in found.effects.items():
        peaks = []
        for role in effects.roles:
            layer, value, ends = effects.peak(role)
            peaks.append((value, f"{plain(value)} ({interval(ends)}) at the {role}, layer {layer}"))
        facts.append((name, max(peaks)[1]))
    if found.skipped:
        facts.append(("left out", ", ".join(f"{n} {why}" for why, n in found.skipped.items())))

    def draw() -> list[Picture]:
        from errata import plots

        said = f"{found.corrupt} corrupted, {found.n} prompts"
        plain_kinds = [kind for kind in ("hidden", "mlp", "attn") if kind in found.effects]
        made = []
        if plain_kinds:
            made += [
                Picture(f"Map of token roles by layers: average indirect effects, {said}.",
                        plots.average_map(found)),
                Picture(f"Curves by layer with intervals: average indirect effects, {said}.",
                        plots.average_curves(found)),
            ]  # fmt: skip
        if {"hidden", "hidden-mlp", "hidden-attn"} <= set(found.effects):
            made.append(Picture(f"The same with MLPs or attention severed, {said}.",
                                plots.severed_curves(found)))  # fmt: skip
        return made

    title = f"{found.model}: {found.corrupt} corrupted, {found.n} prompts"
    return Located(path, title, tuple(facts), found.protocol, draw)


def _sweep(path: Path, data: Mapping[str, Any]) -> Located:
    from errata.kit.layer_sweep import LayerSweep, place_name

    found = LayerSweep.from_json(dict(data))
    facts = [("chosen", f"{place_name(found.best)}, score {plain(found.best.score)}")]
    if found.held_out:
        ratio = found.held_out.ratio
        facts.append(("on held-out facts", f"{plain(ratio[0])} ({interval(ratio[1:])}) of the best "
                      f"layer's score there, n = {found.held_out.n}"))  # fmt: skip
    if math.isfinite(found.correlation):
        facts.append(("rank correlation with the tracing effect", plain(found.correlation)))

    def draw() -> list[Picture]:
        from errata import plots

        alt = f"Edit success of {found.method} by layer; {place_name(found.best)} is best."
        return [Picture(alt, plots.layer_sweep(found))]

    title = f"{found.method} on {found.model}: layer sweep, {found.n} facts"
    return Located(path, title, tuple(facts), found.protocol, draw)


def _similarity(path: Path, data: Mapping[str, Any]) -> Located:
    facts = [("RSim", f"{plain(data['value'])} ({interval(tuple(data['interval']))})"),
             ("within sets, all pairs", f"{plain(data['within'])}, {plain(data['overall'])}"),
             ("sets, prompts", f"{int(data['sets'])}, {int(data['prompts'])}")]  # fmt: skip
    title = f"{data['model']}: {data['locator']} over sets of {data['sets_of']}"

    def draw() -> list[Picture]:
        if "layers" not in data:
            return []
        from errata import plots
        from errata.locate.layer_overlap import LayerOverlap

        kind, found = str(data["sets_of"]), LayerOverlap.from_json(data["layers"])
        alt = f"Overlap of the layers identified by their number, within sets of {kind} and across."
        return [Picture(alt, plots.layer_overlaps({kind: found}))]

    return Located(path, title, tuple(facts), str(data["protocol"]), draw)


def _diff(path: Path, data: Mapping[str, Any]) -> Located:
    from errata.locate.weights import WeightDiff

    found = WeightDiff.from_json(data)
    facts = [
        (change.name, f"relative norm {plain(change.relative)}, rank {change.rank}")
        for change in found.changes[:12]
    ]
    if len(found.changes) > 12:
        facts.append(("more", f"{len(found.changes) - 12} parameters"))
    if found.runtime:
        facts.append(("at run time, no weight changed", ", ".join(found.runtime)))

    def draw() -> list[Picture]:
        from errata import plots

        made = []
        if found.changes:
            made.append(Picture("Sizes, spectra and directions of the changes.",
                                plots.weight_changes(found)))  # fmt: skip
        if any(found.groups.values()):
            made.append(Picture("Each edit or method alone: size, directions and their place.",
                                plots.method_changes(found)))  # fmt: skip
        if found.overlaps:
            made.append(Picture("How much the changes share, pair by pair.",
                                plots.overlap_map(found)))  # fmt: skip
        return made

    title = f"{data['model']}: {found.before} → {found.after}"
    how = "weight diff: ΔW folded from the stored deltas in float64, against the base's weights"
    return Located(path, title, tuple(facts), how, draw)


def _number(value: Any) -> str:
    return plain(float(value)) if value is not None else "–"


_READERS: Mapping[str, Callable[[Path, Mapping[str, Any]], Located]] = {
    "location": _location,
    "phrasings": _phrasings,
    "average": _average,
    "sweep": _sweep,
    "similarity": _similarity,
    "diff": _diff,
}
