"""Pictures of edits: what they did to the weights, and how well each layer can be edited."""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.errors import ConfigError
from errata.plots.style import (
    COLOURS,
    LARGE,
    MARKS,
    MEDIUM,
    SMALL,
    counted,
    figure,
    layer_name,
    layer_ticks,
    log_scale,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from errata.kit.layer_sweep import LayerSweep
    from errata.locate.weights import WeightDiff

_SIDES = {"output": "writes (output side)", "input": "reads (input side)"}


def layer_sweep(found: LayerSweep) -> Figure:
    """Draw edit success by layer, and the tracing effect of the layers below it.

    Of layers edited together the score alone is drawn, at the last of them.
    """
    from errata.kit.layer_sweep import place_name

    least = min(one.depth for one in found.results)
    shown = [one for one in found.results if one.depth == least]
    traced = any(one.effect == one.effect for one in shown)
    made, axes = figure(3.1 if traced else 2.1, rows=2 if traced else 1, sharex=True,
                        height_ratios=[1.7, 1] if traced else None)  # fmt: skip
    layers = [one.layer for one in shown]
    ax = axes[0, 0]
    for index, name in enumerate(shown[0].metrics):
        means, low, high = zip(*(one.metrics[name] for one in shown), strict=True)
        colour = COLOURS[(0, 1, 3, 4, 5)[index]]
        ax.plot(layers, means, color=colour, marker=MARKS[index], markersize=2.5, linewidth=0.8,
                label=name)  # fmt: skip
        ax.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(layers, [one.score for one in shown], color="#000000", marker="^", markersize=3,
            linewidth=1.3, label="Score")  # fmt: skip
    if found.held_out:
        held = [one.score for one in found.held_out.results if one.depth == least]
        ax.plot(layers, held, color="#000000", marker="o", markersize=3, linewidth=0.8,
                linestyle="--", markerfacecolor="#FFFFFF", markeredgewidth=0.6,
                label=f"Score, held out (n = {found.held_out.n})")  # fmt: skip
    depths = sorted({one.depth for one in found.results} - {least})
    for index, depth in enumerate(depths):
        deep = [one for one in found.results if one.depth == depth]
        ax.plot([one.layer for one in deep], [one.score for one in deep], linewidth=0.8,
                color=COLOURS[4 + index % 3], marker=MARKS[3 + index % 4], markersize=2.5,
                linestyle=":", label=f"Score, {depth} layers ending there")  # fmt: skip
    best = found.best
    # The mark stands on the upper edge: above every line, whatever the lines do.
    ax.axvline(best.layer, color="#999999", linewidth=0.6, linestyle=(0, (2, 2)), zorder=0)
    ax.annotate(
        f"chosen: {place_name(best)}", (best.layer, 1.04), xytext=(3, 1), fontsize=SMALL,
        textcoords="offset points", ha="left" if best.layer <= found.n_layers / 2 else "right",
    )  # fmt: skip
    ax.set_ylim(0, 1.12)
    ax.set_ylabel("edit success", fontsize=MEDIUM)
    made.suptitle(f"{found.method} on {found.model}, n = {found.n}", fontsize=LARGE)
    made.legend(loc="outside lower center", fontsize=SMALL, frameon=False, ncols=3,
                handlelength=1.8, columnspacing=1.0)  # fmt: skip
    layer_ticks(ax, found.n_layers)
    if traced:
        below = axes[1, 0]
        below.bar(layers, [one.effect for one in shown], color="#999999", width=0.6)
        below.set_ylabel("AIE, last\nsubject token", fontsize=MEDIUM)
        below.set_title(
            f"tracing effect (rank correlation with Score: {found.correlation:.2f})",
            fontsize=MEDIUM, pad=3,
        )  # fmt: skip
        layer_ticks(below, found.n_layers)
    axes[-1, 0].set_xlabel("layer", fontsize=MEDIUM)
    return made


def weight_changes(found: WeightDiff) -> Figure:
    """Draw the relative norm of each change, its spectrum, and where it lies in the base weight."""
    if not found.changes:
        raise ConfigError(f"There is nothing to draw: no weight differs from {found.before!r} to "
                          f"{found.after!r}.")  # fmt: skip
    shown = sorted(found.changes, key=lambda change: -change.relative)[:8]
    made, axes = figure(0.15 * len(shown) + 0.12 * (len(shown) // 2) + 3.7, rows=3,
                        height_ratios=[0.15 * len(shown) + 0.35, 1.2, 1.2])  # fmt: skip
    labels = [layer_name(change.layer, change.part or change.name) for change in shown]
    bars, spectra, energy = axes[:, 0]
    bars.barh(range(len(shown)), [change.relative for change in shown], color=COLOURS[0],
              height=0.6)  # fmt: skip
    bars.set_ylim(-0.6, len(shown) - 0.4)
    bars.set_yticks(range(len(shown)), labels, fontsize=SMALL)
    bars.invert_yaxis()
    bars.set_xlabel("‖ΔW‖ / ‖W‖", fontsize=MEDIUM)
    bars.set_title(f"{found.before} → {found.after}", fontsize=LARGE, pad=3)
    for index, (change, label) in enumerate(zip(shown, labels, strict=True)):
        values = [value for value in change.spectrum[: max(change.rank, 1)] if value > 0][:64]
        spectra.plot(
            range(1, len(values) + 1), values, color=COLOURS[index % len(COLOURS)],
            marker=MARKS[index % len(MARKS)], markersize=2.5, linewidth=0.8, label=label,
        )  # fmt: skip
    log_scale(spectra, "y")
    spectra.set_xlabel("singular value number", fontsize=MEDIUM)
    spectra.set_ylabel("σ of ΔW", fontsize=MEDIUM)
    counted(spectra, max(len(line.get_xdata()) for line in spectra.lines))
    _legend_above(spectra)
    placed = [(label, c) for label, c in zip(labels, shown, strict=True) if c.energy]
    for offset, (side, name) in zip((-0.2, 0.2), _SIDES.items(), strict=True):
        values = [change.energy[side] for _, change in placed]
        at = [index + offset for index in range(len(placed))]
        energy.bar(at, values, width=0.36, color=COLOURS[0 if side == "output" else 1], label=name)
        for x, (_, change) in zip(at, placed, strict=True):
            energy.plot([x - 0.18, x + 0.18], [change.chance[side]] * 2, color="#000000", lw=1)
    energy.set_xticks(range(len(placed)), [label for label, _ in placed], fontsize=SMALL)
    if len(placed) == 1:
        energy.set_xlim(-1, 1)  # two bars as wide as those of several weights
    if sum(len(label) for label, _ in placed) > 48:
        energy.set_xticks(range(len(placed)), [label for label, _ in placed], fontsize=SMALL,
                          rotation=30, ha="right", rotation_mode="anchor")  # fmt: skip
    energy.set_ylabel("energy in W's\ntop directions", fontsize=MEDIUM)
    energy.set_xlabel("black line: a random direction", fontsize=MEDIUM)
    _legend_above(energy)
    return made


def _legend_above(ax: Axes) -> None:
    """Put a panel's legend above it: inside, a swatch could lie on a bar of its own colour."""
    ax.legend(fontsize=SMALL, frameon=False, ncols=2, handlelength=1.5, loc="lower left",
              bbox_to_anchor=(0, 1), borderaxespad=0.2, columnspacing=1.0)  # fmt: skip


def method_changes(found: WeightDiff) -> Figure:
    """Draw what each edit or method did alone: size, how many directions, and where they lie."""
    shown = [(label, change) for label, changes in found.groups.items() for change in changes]
    if not shown:
        raise ConfigError("There is nothing to draw: none of them changes a weight.")
    made, axes = figure(0.17 * len(shown) + 0.85, columns=3, sharey=True)
    labels = [
        f"{label}, {layer_name(change.layer, '')}" if change.layer is not None else label
        for label, change in shown
    ]
    rows = range(len(shown))
    size, rank, place = axes[0]
    size.barh(rows, [change.relative for _, change in shown], color=COLOURS[0], height=0.6)
    size.set_ylim(-0.7, len(shown) - 0.3)
    size.set_yticks(rows, labels, fontsize=SMALL)
    size.invert_yaxis()
    size.set_title("‖ΔW‖ / ‖W‖", fontsize=MEDIUM, pad=3)
    # A line from the stable rank to the rank: how far the spectrum falls off.
    for row, (_, change) in enumerate(shown):
        rank.plot([change.stable_rank, change.rank], [row, row], color="#999999", linewidth=0.8)
    rank.plot([c.stable_rank for _, c in shown], rows, "o", color=COLOURS[0], markersize=3.5,
              label="stable rank")  # fmt: skip
    rank.plot([c.rank for _, c in shown], rows, "|", color="#000000", markersize=6, label="rank")
    log_scale(rank, "x")
    rank.set_title("directions", fontsize=MEDIUM, pad=3)
    for side, mark, colour in (("output", "s", COLOURS[0]), ("input", "D", COLOURS[1])):
        at = [(c.energy[side] / c.chance[side], r) for r, (_, c) in enumerate(shown) if c.energy]
        place.plot([x for x, _ in at], [y for _, y in at], mark, color=colour, markersize=3.5,
                   label={"output": "writes in", "input": "reads in"}[side])  # fmt: skip
    place.axvline(1, color="#000000", linewidth=0.6)
    place.set_xlim(0, 1.1 * max([1.0, *(x for line in place.lines for x in line.get_xdata())]))
    place.set_title("W's top\n(× chance)", fontsize=MEDIUM, pad=3)
    handles, names = rank.get_legend_handles_labels()
    more, others = place.get_legend_handles_labels()
    made.legend([*handles, *more], [*names, *others], loc="outside lower center", fontsize=SMALL,
                frameon=False, ncols=4, handletextpad=0.2, columnspacing=1.0)  # fmt: skip
    return made


def overlap_map(found: WeightDiff, parameter: str | None = None) -> Figure:
    """Draw how much the changes of single edits (or methods) share, for one parameter.

    Lower left: row spaces, what they read; upper right: column spaces, what they write.
    """
    import numpy as np

    names = list(dict.fromkeys(overlap.name for overlap in found.overlaps))
    if not names:
        raise ConfigError("There is no overlap to draw: no parameter is changed by two of them.")
    name = parameter or max(names, key=lambda n: sum(o.name == n for o in found.overlaps))
    pairs = [overlap for overlap in found.overlaps if overlap.name == name]
    if not pairs:
        raise ConfigError(f"No two changes share {name!r}; there are {', '.join(names)}.")
    labels = list(dict.fromkeys(one for o in pairs for one in (o.one, o.other)))
    table = np.eye(len(labels))
    for overlap in pairs:
        i, j = labels.index(overlap.one), labels.index(overlap.other)
        i, j = min(i, j), max(i, j)
        table[j, i], table[i, j] = overlap.rows, overlap.columns
    made, axes = figure(2.6)
    ax = axes[0, 0]
    image = ax.imshow(table, cmap="Blues", vmin=0, vmax=1)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_xticks(range(len(labels)), labels, rotation=45, ha="right", fontsize=SMALL)
    ax.set_yticks(range(len(labels)), labels, fontsize=SMALL)
    if len(labels) <= 10:
        for i in range(len(labels)):
            for j in range(len(labels)):
                if i != j:
                    ax.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", fontsize=SMALL,
                            color="#FFFFFF" if table[i, j] > 0.5 else "#000000")  # fmt: skip
    ax.set_title(f"{name}\nlower left: read, upper right: written", fontsize=MEDIUM, pad=3)
    bar = made.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL, length=2, width=0.5)
    return made
