"""Average indirect effects: maps of roles × layers, curves with intervals, severed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata.errors import ConfigError
from errata.plots.style import (
    COLOURS,
    LARGE,
    MAPS,
    MARKS,
    MEDIUM,
    NAMES,
    SMALL,
    figure,
    layer_ticks,
)
from errata.plots.traces import title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from errata.locate import AverageTrace, Effects

PLAIN = ("hidden", "mlp", "attn")


def average_map(found: AverageTrace) -> Figure:
    """Draw roles × layers for each kind of restoration, as in ROME's Figure 2."""
    shown = [found.effects[name] for name in PLAIN if name in found.effects]
    if not shown:
        raise ConfigError(
            f"There is nothing to map: of {', '.join(PLAIN)} none is in this average."
        )
    rows = max(len(effects.roles) for effects in shown)
    made, axes = figure(len(shown) * (0.135 * rows + 0.5) + 0.3, rows=len(shown))
    for effects, ax in zip(shown, axes[:, 0], strict=True):
        high = max(float(effects.mean.max()), 1e-9)
        image = ax.imshow(
            effects.mean, aspect="auto", cmap=MAPS[effects.kind], vmin=0, vmax=high,
            interpolation="nearest",
        )  # fmt: skip
        names = [f"{role}*" if _corrupted(role, found.corrupt) else role for role in effects.roles]
        ax.set_yticks(range(len(names)), names, fontsize=SMALL)
        for spine in ax.spines.values():
            spine.set_visible(False)
        layer_ticks(ax, effects.mean.shape[1])
        ax.set_title(
            title(effects.kind, effects.window, effects.mean.shape[1], how=found.how),
            fontsize=MEDIUM,
            pad=3,
        )
        bar = made.colorbar(image, ax=ax, fraction=0.05, pad=0.02)
        bar.ax.tick_params(labelsize=SMALL, length=2, width=0.5)
        bar.outline.set_linewidth(0.5)
    axes[-1, 0].set_xlabel("layer", fontsize=MEDIUM)
    made.suptitle(
        f"Average indirect effect, {found.corrupt} corrupted* (n = {found.n})", fontsize=LARGE
    )
    return made


def average_curves(found: AverageTrace, roles: Sequence[str] | None = None) -> Figure:
    """Draw the effect by layer with its 95 % interval, one panel for each kind of restoration.

    Args:
        found: the average.
        roles: which tokens; default: the corrupted ones, the subject's last, and the last token.
    """
    shown = [found.effects[name] for name in PLAIN if name in found.effects]
    chosen = _roles(shown, found.corrupt, roles)
    made, axes = figure(1.2 * len(shown) + 0.55, rows=len(shown), sharex=True)
    top = max(float(e.high[e.roles.index(r)].max()) for e in shown for r in chosen if r in e.roles)
    for effects, ax in zip(shown, axes[:, 0], strict=True):
        for index, role in enumerate(chosen):
            if role in effects.roles:
                line(ax, effects, role, index, role)
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), top * 1.05)
        ax.set_title(
            title(effects.kind, effects.window, effects.mean.shape[1], how=found.how),
            fontsize=MEDIUM,
            pad=3,
        )
        ax.set_ylabel("AIE", fontsize=MEDIUM)
        layer_ticks(ax, effects.mean.shape[1])
    _finish(made, axes, f"{found.corrupt} corrupted, n = {found.n}; bands: 95 % intervals")
    return made


def severed_curves(found: AverageTrace, role: str | None = None) -> Figure:
    """Draw the effect of restoring a block's output as it is, without MLPs, without attention.

    As in ROME's Figure 3: what an early state does only through later MLPs falls away with them.

    Args:
        found: an average with the variants "hidden", "hidden-mlp" and "hidden-attn".
        role: which token; default: the last corrupted one.
    """
    names = ("hidden", "hidden-mlp", "hidden-attn")
    missing = [name for name in names if name not in found.effects]
    if missing:
        raise ConfigError(
            f"A severed comparison needs the variants {', '.join(names)}; this average lacks "
            f"{', '.join(missing)}."
        )
    first = found.effects["hidden"]
    places = [role] if role else [
        r for r in (f"last {found.corrupt} token", "last token") if r in first.roles
    ]  # fmt: skip
    made, axes = figure(1.35 * len(places) + 0.55, rows=len(places), sharex=True)
    labels = ("nothing severed", "MLPs severed", "attention severed")
    for place, ax in zip(places, axes[:, 0], strict=True):
        for index, (name, label) in enumerate(zip(names, labels, strict=True)):
            bars(ax, found.effects[name], place, index, label)
        ax.set_title(f"restoring the block output at the {place}", fontsize=MEDIUM, pad=3)
        ax.set_ylabel("AIE", fontsize=MEDIUM)
        ax.set_ylim(min(0.0, ax.get_ylim()[0]), None)
        layer_ticks(ax, first.mean.shape[1])
    _finish(
        made, axes, f"{found.corrupt} corrupted, n = {found.n}; bars: 95 % intervals", columns=3
    )
    return made


def line(ax: Axes, effects: Effects, role: str, index: int, label: str) -> None:
    """Draw one role's curve with its band."""
    row = _row(effects, role)
    layers = range(effects.mean.shape[1])
    colour = COLOURS[index % len(COLOURS)]
    ax.plot(
        layers, effects.mean[row], color=colour, marker=MARKS[index % len(MARKS)],
        markersize=2.5, linewidth=0.9, label=label,
    )  # fmt: skip
    ax.fill_between(
        layers, effects.low[row], effects.high[row], color=colour, alpha=0.2, linewidth=0
    )


def bars(ax: Axes, effects: Effects, role: str, index: int, label: str) -> None:
    """Draw one role's curve with error bars, a little aside: curves that coincide stay visible."""
    row = _row(effects, role)
    layers = [layer + 0.12 * (index - 1) for layer in range(effects.mean.shape[1])]
    mean = effects.mean[row]
    ax.errorbar(
        layers, mean, yerr=[mean - effects.low[row], effects.high[row] - mean],
        color=COLOURS[index % len(COLOURS)], marker=MARKS[index % len(MARKS)], markersize=2.5,
        linewidth=0.9, linestyle=("-", "--", ":")[index % 3], elinewidth=0.6, label=label,
    )  # fmt: skip


def _row(effects: Effects, role: str) -> int:
    if role not in effects.roles:
        raise ConfigError(f"No prompt has a {role!r}; there are {', '.join(effects.roles)}.")
    return effects.roles.index(role)


def _finish(made: Figure, axes: Any, note: str, columns: int = 2) -> None:
    import numpy as np

    column = np.asarray(axes)[:, 0]
    column[-1].set_xlabel(f"layer ({note})", fontsize=MEDIUM)
    handles: dict[str, Any] = {}
    for ax in column:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    made.legend(
        list(handles.values()), list(handles), loc="outside upper center", fontsize=SMALL,
        frameon=False, ncols=columns, handlelength=1.6, columnspacing=1.0,
    )  # fmt: skip


def _roles(shown: Sequence[Effects], corrupt: str, given: Sequence[str] | None) -> list[str]:
    if not shown:
        raise ConfigError(f"There is no curve to draw: of {', '.join(NAMES)} none was traced.")
    there = [role for effects in shown for role in effects.roles]
    if given is not None:
        unknown = [role for role in given if role not in there]
        if unknown or not given:
            raise ConfigError(f"No prompt has {unknown}; there are {list(dict.fromkeys(there))}.")
        return list(given)
    wanted = [role for role in dict.fromkeys(there) if _corrupted(role, corrupt)]
    wanted += [r for r in ("last subject token", "masked token", "last token") if r not in wanted]
    return [role for role in wanted if role in there]


def _corrupted(role: str, corrupt: str) -> bool:
    return role in {f"{place} {corrupt} token" for place in ("first", "middle", "last")}
