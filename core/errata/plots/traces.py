"""Heat maps of single prompts: tokens × layers, the corrupted tokens starred."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.plots.style import LARGE, MAPS, MEDIUM, NAMES, SMALL, figure, layer_ticks, token

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from errata.locate import CausalTrace, Trajectory


def heat_map(*traces: CausalTrace) -> Figure:
    """Draw traces of one prompt below one another, as in ROME's Figure 1.

    Dark is a high probability of the answer after restoring there; the scale runs from the
    corrupted to the clean run's (what is below is as light) and is common to all. That of
    estimates ends at their highest: they may be far too small, and say where, not how much.
    """
    first = traces[0]
    tokens = len(first.tokens)
    height = len(traces) * (0.125 * tokens + 0.52) + 0.3
    made, axes = figure(height, rows=len(traces))
    low = first.low
    highest = max(float(t.scores.max()) for t in traces)
    exact = not all(t.how for t in traces)
    high = max(first.high, highest) if exact or highest <= low else highest
    for trace, ax in zip(traces, axes[:, 0], strict=True):
        _map(ax, trace, low, high)
    axes[-1, 0].set_xlabel("layer", fontsize=MEDIUM)
    what = {"subject": "subject", "relation": "relation"}.get(first.corrupt, "tokens")
    made.suptitle(
        f"P({first.answer.strip()!r}), {what} corrupted*: {first.low:.2f} → {first.high:.2f}",
        fontsize=LARGE,
    )
    return made


def _map(ax: Axes, trace: CausalTrace, low: float, high: float) -> None:
    image = ax.imshow(
        trace.scores.numpy(), aspect="auto", cmap=MAPS[trace.kind], vmin=low, vmax=high,
        interpolation="nearest",
    )  # fmt: skip
    names = [
        f"{token(text)}*" if index in trace.corrupted else token(text)
        for index, text in enumerate(trace.tokens)
    ]
    ax.set_yticks(range(len(names)), names, fontsize=SMALL)
    for spine in ax.spines.values():
        spine.set_visible(False)
    layer_ticks(ax, trace.scores.shape[1])
    ax.set_title(
        title(trace.kind, trace.window, trace.scores.shape[1], trace.severed, trace.how),
        fontsize=MEDIUM,
        pad=3,
    )
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL, length=2, width=0.5)
    bar.outline.set_linewidth(0.5)


def title(kind: str, window: int, layers: int, severed: str | None = None, how: str = "") -> str:
    """Return what one panel shows; of a window wider than the model, all layers are restored."""
    text = f"restoring {NAMES[kind]}"
    if kind != "hidden":
        together = min(window, layers)
        text = f"restoring {NAMES[kind]} outputs, {together} layer{'s' * (together != 1)}"
    if severed:
        text += f", {NAMES[severed]} severed"
    return f"{text} (estimate)" if how else text


def trajectory(found: Trajectory, places: Sequence[int] | None = None) -> Figure:
    """Draw what each layer says: the answer's probability at every token, rank 0 ringed."""
    rows = range(len(found.tokens)) if places is None else list(places)
    made, axes = figure(0.125 * len(rows) + 0.95)
    ax = axes[0, 0]
    values = found.probability.numpy()[list(rows)]
    image = ax.imshow(values, aspect="auto", cmap="Blues", vmin=0, vmax=max(values.max(), 1e-9))
    ax.set_yticks(range(len(rows)), [token(found.tokens[row]) for row in rows], fontsize=SMALL)
    for spine in ax.spines.values():
        spine.set_visible(False)
    layer_ticks(ax, values.shape[1])
    top = [
        (layer, y)
        for y, row in enumerate(rows)
        for layer in range(values.shape[1])
        if int(found.rank[row, layer]) == 0
    ]
    if top:
        ax.scatter(*zip(*top, strict=True), s=14, facecolors="none", edgecolors="#D55E00", lw=0.9)
    ax.set_xlabel("layer", fontsize=MEDIUM)
    ax.set_title(
        f"P({found.answer.strip()!r}) read after each layer (ring: on top)", fontsize=MEDIUM, pad=3
    )
    bar = made.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL, length=2, width=0.5)
    bar.outline.set_linewidth(0.5)
    return made
