"""Overlap of the k layers that a locator names, within sets and across them, by k."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from errata.errors import ConfigError
from errata.plots.style import COLOURS, LARGE, MARKS, MEDIUM, SMALL, counted, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy import float64
    from numpy.typing import NDArray

    from errata.locate import LayerOverlap

    Row = NDArray[float64]


def layer_overlaps(found: Mapping[str, LayerOverlap], heading: str = "") -> Figure:
    """Draw the overlap by the number of layers identified, one panel for each kind; below, RSim.

    Args:
        found: kind of sets → overlaps, of equally many layers.
        heading: above the figure.

    Raises:
        ConfigError: nothing to draw, or overlaps of different numbers of layers.
    """
    layers = {one.layers for one in found.values()}
    if len(layers) != 1:
        raise ConfigError(
            f"Overlaps among {sorted(layers)} layers cannot share an axis."
            if layers else "There is no overlap to draw."
        )  # fmt: skip
    count = layers.pop()
    made, axes = figure(1.25 * (len(found) + 1) + 0.4, rows=len(found) + 1, sharex=True)
    for (name, one), ax in zip(found.items(), axes[:-1, 0], strict=True):
        _overlap(ax, one)
        ax.set_title(f"{name}: {one.sets} sets, {one.prompts} prompts", fontsize=MEDIUM, pad=3)
    axes[0, 0].legend(fontsize=SMALL, frameon=False, loc="lower right", handlelength=1.6)
    below = axes[-1, 0]
    for index, (name, one) in enumerate(found.items()):
        _curve(below, one.rsim, one.rsim_low, one.rsim_high, index, name)
    below.set_ylim(0, None)
    below.set_ylabel("RSim", fontsize=MEDIUM)
    if len(found) > 1:
        below.legend(fontsize=SMALL, frameon=False, loc="upper right", handlelength=1.6)
    below.set_xlabel("layers identified, k (bands: 95 % intervals)", fontsize=MEDIUM)
    for ax in axes[:, 0]:
        counted(ax, count)
    if heading:
        made.suptitle(heading, fontsize=LARGE)
    return made


def _overlap(ax: Axes, one: LayerOverlap) -> None:
    _curve(ax, one.within, one.within_low, one.within_high, 0, "within a set")
    numbers = range(1, one.layers + 1)
    ax.plot(numbers, one.across, color=COLOURS[1], marker=MARKS[1], markersize=2.5, linewidth=0.9,
            label="across sets")  # fmt: skip
    ax.plot(numbers, one.chance, color=COLOURS[2], linewidth=0.7, linestyle=(0, (3, 2)),
            label="random choices, k / L")  # fmt: skip
    ax.set_ylim(0, 1.03)
    ax.set_ylabel("overlap", fontsize=MEDIUM)


def _curve(ax: Axes, mean: Row, low: Row, high: Row, index: int, label: str) -> None:
    numbers = range(1, len(mean) + 1)
    colour = COLOURS[(0, 1, 5)[index % 3]]
    ax.plot(numbers, mean, color=colour, marker=MARKS[index % len(MARKS)], markersize=2.5,
            linewidth=0.9, label=label)  # fmt: skip
    ax.fill_between(numbers, low, high, color=colour, alpha=0.2, linewidth=0)
