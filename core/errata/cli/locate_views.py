"""What people see of locations, average effects and layer sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

from errata.cli import render
from errata.cli.pictures import say_pictures

if TYPE_CHECKING:
    from errata.cli.session import Session
    from errata.edits.edit import Edit
    from errata.kit.layer_sweep import LayerSweep
    from errata.locate import AverageTrace, LayerOverlap, Location, RelativeSimilarity

LOW = 0.1
"""Probability of the answer in the clean run below which a trace says little."""


def edits_on(active: Sequence[Edit]) -> str:
    """Return which edits were on the model while it was looked at."""
    if not active:
        return "none: the base"
    return f"{render.names(edit.id for edit in active)} ({render.count(len(active), 'edit')})"


def low_probability(clean: object, answer: str = "") -> str:
    """Return a warning where the model hardly gives the answer that was followed; "" elsewhere."""
    if not isinstance(clean, float) or clean >= LOW or clean != clean:
        return ""
    what = repr(render.quoted(answer)) if answer else "the answers"
    return (
        f"uncorrupted, the model gives {what} a probability of only {render.number(clean)}: it "
        "hardly knows this, so the place says little. Trace what it knows (`errata generate`), "
        "or take a model that knows it."
    )


def show_located(
    session: Session,
    found: Location | AverageTrace,
    view: Callable[[Any, str], list[Any]],
    active: Sequence[Edit],
    warning: str,
    drawn: Sequence[Path],
) -> None:
    """Show what was located on a model with these edits, as JSON or as a view, and the warning."""
    if session.json:
        session.emit(
            {
                **found.as_json(),
                "edits": [edit.id for edit in active],
                "warnings": [warning] if warning else [],
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    session.show(*view(found, edits_on(active)))
    if warning:
        session.say(f"Warning: {warning}", "warn")
    say_pictures(session, drawn)


def location_view(found: Location, edits: str) -> list[Any]:
    """Return what people see of a location: the place, then the scores of every token and layer.

    Scores are drawn as bars of eight heights, one per layer, on a common scale from 0. Tokens
    that were corrupted are starred.
    """
    place = render.facts(
        [
            ("layer", f"{found.layer}  ({found.module})"),
            ("token", f"{_token(found.token)}  (number {found.token_index} of the prompt)"),
            ("score", f"{render.number(found.score)}{_range(found)}"),
            ("edits on", edits),
            ("how", found.protocol),
        ]
    )
    if not found.scores:
        return [place]
    tokens = [_token(str(t)) for t in found.evidence.get("tokens", range(len(found.scores)))]
    corrupted = found.evidence.get("corrupted", ())
    top = max(max(row) for row in found.scores)
    layers = len(found.scores[0])
    grid = render.table(
        ("token", {"no_wrap": True}),
        (f"layers 0 – {layers - 1}", {"no_wrap": True}),
        ("best", {"justify": "right", "no_wrap": True}),
        ("at layer", {"justify": "right", "no_wrap": True}),
    )
    for index, (token, row) in enumerate(zip(tokens, found.scores, strict=True)):
        best = row.index(max(row))
        here = index == found.token_index
        bars = Text(_bars(row, top))
        if here:
            wide = len(bars) // layers
            bars.stylize("accent", found.layer * wide, (found.layer + 1) * wide)
        star = "*" if index in corrupted else ""
        grid.add_row(
            Text(("▸ " if here else "  ") + token + star, style="head" if here else ""),
            bars,
            render.number(row[best]),
            str(best),
        )
    note = "; *: corrupted" if corrupted else ""
    return [place, "", grid, Text(f"bars: 0 to {render.number(top)}{note}", style="muted")]


def _range(found: Location) -> str:
    """Return the two scores that a trace's are to be read between."""
    low, high = found.evidence.get("low"), found.evidence.get("high")
    if low is None or high is None:
        return ""
    return f"  ({render.number(low)} corrupted, {render.number(high)} clean)"


def _bars(row: Sequence[float], top: float) -> str:
    wide = 2 if len(row) <= 24 else 1
    heights = "▁▂▃▄▅▆▇█"
    return "".join(
        heights[round(7 * max(score, 0) / top) if top > 0 else 0] * wide for score in row
    )


def _token(text: str) -> str:
    """Return a token as people read it: the markers for a space in front become a space."""
    return text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎")


def average_view(found: AverageTrace, edits: str) -> list[Any]:
    """Return what people see of average indirect effects: the total, then a table for each kind."""
    mean, low, high = found.total
    total = (
        f"{render.number(mean)}  ({render.number(low)} – {render.number(high)}; "
        f"clean {render.number(found.clean)})"
    )
    parts: list[Any] = [
        render.heading(found.model, f"{found.corrupt} corrupted, {found.n} prompts"),
        render.facts(
            [
                ("total effect", total),
                ("edits on", edits),
                ("left out", ", ".join(f"{n} {why}" for why, n in found.skipped.items()) or None),
                ("how", found.protocol),
            ]
        ),
    ]
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    for name, effects in found.effects.items():
        grid = render.table(
            ("token", {"no_wrap": True}), ("n", right), ("by layer", {"no_wrap": True}),
            ("highest", right), ("95 % interval", right), ("at layer", right),
        )  # fmt: skip
        top = float(effects.mean.max())
        for role, n in zip(effects.roles, effects.n, strict=True):
            layer, value, ends = effects.peak(role)
            grid.add_row(
                role, str(n), _bars(effects.of(role).tolist(), top), render.number(value),
                f"{render.number(ends[0])} – {render.number(ends[1])}", str(layer),
            )  # fmt: skip
        parts += ["", render.heading(name, f"window of {effects.window}"), grid]
    return parts


def sweep_view(found: LayerSweep) -> list[Any]:
    """Return what people see of a layer sweep: a table, how far to trust it, and the preset."""
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    names = list(found.results[0].metrics)
    several = any(one.depth > 1 for one in found.results)
    judged = found.held_out
    grid = render.table(
        ("layers" if several else "layer", right), ("score", right),
        *[(name, right) for name in names], ("failed", right), ("tracing effect", right),
        *([("held out", right)] if judged else []),
    )  # fmt: skip
    best = found.best.layers
    for index, one in enumerate(found.results):
        place = str(one.layer) if one.depth == 1 else f"{one.layers[0]}–{one.layer}"
        grid.add_row(
            Text(("▸ " if one.layers == best else "") + place),
            Text(render.number(one.score), style="new" if one.layers == best else ""),
            *[render.number(one.metrics[n][0]) if n in one.metrics else "–" for n in names],
            str(one.failed) if one.failed else "–",
            render.number(one.effect),
            *([render.number(judged.results[index].score)] if judged else []),
        )
    rho = render.number(found.correlation)
    parts: list[Any] = [
        render.heading(f"{found.method} on {found.model}", f"{found.n} requests"),
        grid,
        Text(f"{found.protocol}; rank correlation with the tracing effect: {rho}", style="muted"),
    ]
    if judged:
        mean, low, high = judged.ratio
        text = (
            f"On {judged.n} facts about other subjects the chosen layers reach "
            f"{render.number(mean)} ({render.number(low)} – {render.number(high)}) of the best "
            "score there."
        )
        parts.append(Text(text))
    return [*parts, "", Text("For registry.yaml:", style="head"), found.preset()]


def similarity_view(
    name: str, kind: str, found: RelativeSimilarity, overlap: LayerOverlap, edits: str
) -> list[Any]:
    """Return what people see of relative similarity: RSim, then the overlap by number of layers."""
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    grid = render.table(
        ("layers identified", right), ("within sets", right), ("95 % interval", right),
        ("across sets", right), ("random", right), ("RSim", right), ("95 % interval", right),
    )  # fmt: skip
    for count in _steps(overlap.layers):
        at = count - 1
        grid.add_row(
            str(count), render.number(overlap.within[at]),
            _ends(overlap.within_low[at], overlap.within_high[at]),
            render.number(overlap.across[at]), render.number(overlap.chance[at]),
            render.number(overlap.rsim[at]), _ends(overlap.rsim_low[at], overlap.rsim_high[at]),
        )  # fmt: skip
    return [
        render.heading(name, f"{found.sets} sets of {kind}, {found.prompts} prompts"),
        render.facts(
            [
                ("RSim", f"{render.number(found.value)}  ({_ends(*found.interval)})"),
                ("within sets", render.number(found.within)),
                ("all pairs", render.number(found.overall)),
                ("edits on", edits),
                ("how", found.protocol),
            ]
        ),
        "",
        render.heading("overlap of the layers identified", overlap.protocol),
        grid,
    ]


def _steps(layers: int) -> list[int]:
    """Return the numbers of layers that are shown: all of a few, of many some."""
    if layers <= 12:
        return list(range(1, layers))
    return [k for k in range(1, layers) if k in (1, 2, 3) or k % 5 == 0]


def _ends(low: float, high: float) -> str:
    return f"{render.number(low)} – {render.number(high)}"


class Phrasing(NamedTuple):
    """One phrasing of a fact and where it was located.

    Attributes:
        prompt: the filled prompt.
        found: its location.
        role: what the located token is.
        layers: those with the highest scores at this token, best first.
    """

    prompt: str
    found: Location
    role: str
    layers: list[int]

    @property
    def answer(self) -> str:
        """The answer that was followed; empty where the locator does not say."""
        return str(self.found.evidence.get("answer", ""))

    @property
    def clean(self) -> float | None:
        """Its probability in the clean run; None where the locator does not say."""
        return self.found.evidence.get("high")

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        own = {"prompt": self.prompt, "role": self.role, "layers": self.layers}
        return {**self.found.as_json(), **own}


def phrasings_view(
    shown: Sequence[Phrasing], overlap: float, chance: float, edits: str
) -> list[Any]:
    """Return what people see of one fact in several phrasings: a row for each, then the overlap."""
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    highest = len(shown[0].layers)
    grid = render.table(
        "prompt", "answer", ("clean", right), ("layer", right), "token", "which is",
        (f"{highest} highest there", right),
    )  # fmt: skip
    for one in shown:
        grid.add_row(
            render.quoted(one.prompt), render.quoted(one.answer),
            "–" if one.clean is None else render.number(one.clean), str(one.found.layer),
            _token(one.found.token).strip(), one.role, ", ".join(map(str, one.layers)),
        )  # fmt: skip
    told = f"{render.number(overlap)} of {render.count(highest, 'layer')}"
    return [
        grid,
        "",
        render.facts(
            [
                ("mean overlap", f"{told}  (random choices: {render.number(chance)})"),
                ("edits on", edits),
                ("how", shown[0].found.protocol),
            ]
        ),
    ]
