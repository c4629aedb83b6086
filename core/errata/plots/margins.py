"""A classifier's scores before and after edits, as in KnowledgeEditor's figure of logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from errata.errors import ConfigError
from errata.plots.style import COLOURS, LARGE, MEDIUM, SMALL, figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 2


class Margins(NamedTuple):
    """Score of the class that the unedited model gives, minus that of the best other, per text.

    Attributes:
        before: of the unedited model: 0 or above.
        after: of the edited one: below 0 where it gives another class.
    """

    before: Sequence[float]
    after: Sequence[float]


def class_margins(panels: Mapping[str, Mapping[str, Margins]]) -> Figure:
    """Draw the margin after an edit against that before it, a panel per method.

    What an edit leaves alone lies on the diagonal; what changes its class lies below zero.

    Args:
        panels: method → group ("retain", "equivalence", "success" …) → margins; groups that come
            first are drawn below the others.

    Raises `ConfigError` where there is nothing to draw.
    """
    if not any(margins.before for groups in panels.values() for margins in groups.values()):
        raise ConfigError("There are no class scores before and after edits to draw.")
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    made, axes = figure(1.45 * rows + 0.75, rows=rows, columns=columns, sharex=True, sharey=True)
    names = list(dict.fromkeys(name for groups in panels.values() for name in groups))
    for ax, (title, groups) in zip(axes.flat, panels.items(), strict=False):
        for index, name in enumerate(names):
            margins = groups.get(name, Margins((), ()))
            last = len(names) - 1 - index  # what is drawn last, on top, has the first colour
            ax.plot(
                margins.before, margins.after, linestyle="none", marker="os^Dv"[last % 5],
                markersize=1.2 + index * 0.6, color=COLOURS[last % len(COLOURS)],
                markeredgewidth=0, alpha=0.75, label=name,
            )  # fmt: skip
        ax.axline((0, 0), slope=1, color="0.6", linewidth=0.5, zorder=0)
        ax.axhline(0, color="0.6", linewidth=0.5, zorder=0)
        ax.set_title(title, fontsize=MEDIUM, pad=3)
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    made.legend(
        handles, labels, loc="outside lower center", ncols=len(names), fontsize=SMALL,
        frameon=False, markerscale=2,
    )  # fmt: skip
    for ax in axes.flat[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
        ax.set_xlabel("margin, original", fontsize=MEDIUM)
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("margin, updated", fontsize=MEDIUM)
    made.suptitle("Class scores before and after an edit", fontsize=LARGE)
    return made
