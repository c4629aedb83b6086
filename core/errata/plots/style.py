"""One look for all figures, and how they are written."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.edits.outputs import PNG, SVG, write_file
from errata.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMN = 3.31
"""Width of one column, in inches (84 mm)."""

SMALL, MEDIUM, LARGE = 6.0, 7.0, 8.0
FORMATS = ("png", "svg")
DPI = 300

# Okabe and Ito's palette, in an order in which neighbours differ in lightness as well.
COLOURS = ("#0072B2", "#E69F00", "#000000", "#56B4E9", "#D55E00", "#009E73", "#CC79A7")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
MAPS = {"hidden": "Purples", "mlp": "Greens", "attn": "Reds"}
"""Light to dark in one hue each: read by lightness alone."""

NAMES = {"hidden": "block output", "mlp": "MLP", "attn": "attention"}


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a figure of one column's width and its axes (rows, columns)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("Drawing pictures", "matplotlib", "report") from None
    made = Figure(figsize=(COLUMN, height), dpi=DPI, layout="constrained")
    axes = made.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        plain(ax)
    return made, axes


def plain(ax: Axes) -> None:
    """Take away what says nothing: upper and right frame, large ticks."""
    ax.tick_params(labelsize=SMALL, length=2, width=0.5, pad=1.5)
    for side, spine in ax.spines.items():
        spine.set_linewidth(0.5)
        spine.set_visible(side in ("left", "bottom"))


def layer_ticks(ax: Axes, count: int) -> None:
    """Number the layers along the x axis: all of them, or every fifth where they are many."""
    step = 1 if count <= 12 else 2 if count <= 24 else 5
    ax.set_xticks(range(0, count, step))
    ax.set_xlim(-0.5, count - 0.5)


def counted(ax: Axes, count: int) -> None:
    """Number things along the x axis from 1: whole numbers only, also where there is one thing."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    ax.set_xlim(1 - max(0.5, count / 40), count + max(0.5, count / 40))


def layer_name(layer: int | None, part: str) -> str:
    """Return what a part of the model is called in a figure: "layer 1, mlp_out"."""
    return part if layer is None else f"layer {layer}, {part}" if part else f"layer {layer}"


def log_scale(ax: Axes, side: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, its ticks plain numbers: text is never read as formulas here."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (ax.set_xscale if side == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if side == "x" else ax.yaxis
    low, high = (ax.dataLim.intervalx if side == "x" else ax.dataLim.intervaly).tolist()
    # Along x a long range is crowded; within a short one no power of ten may lie at all.
    short = 0 < low <= high < 20 * low
    if side == "y" or short:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    if short:  # at least two of these must be in sight: else matplotlib takes others
        steps = [base * 10.0**power for power in range(-12, 13) for base in (1, 2, 5)]
        below = max(step for step in steps if step <= low * 1.001)
        above = min(step for step in steps if step >= high * 0.999 and step > below)
        (ax.set_xlim if side == "x" else ax.set_ylim)(below / 1.15, above * 1.15)
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def token(text: str) -> str:
    """Return a token as people read it, on one line."""
    shown = text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "⏎").strip() or "␣"
    return shown if len(shown) <= 18 else f"{shown[:17]}…"


def save(made: Figure, path: str | Path) -> Path:
    """Write a figure as PNG or SVG, by the ending of its name, and return the path.

    Equal figures give equal bytes. Text in SVG stays text.

    Raises:
        ConfigError: another ending, or a file that errata did not write is there.
        StorageError: the disk refuses.
    """
    target = Path(path)
    ending = target.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise ConfigError(
            f"Cannot draw to {str(target)!r}: the name must end in "
            f"{' or '.join('.' + name for name in FORMATS)}."
        )
    return write_file(target, rendered(made, ending), {"png": PNG, "svg": SVG}[ending])


def rendered(made: Figure, ending: str) -> bytes:
    """Return the bytes of a figure; HTML pages hold them inline."""
    import warnings

    import matplotlib
    from matplotlib.text import Text

    for text in made.findobj(Text):
        text.set_parse_math(False)  # "$" in a token is a dollar
    buffer = BytesIO()
    metadata = {"Date": None, "Creator": "errata"} if ending == "svg" else {"Software": "errata"}
    with (
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "errata"}),
        warnings.catch_warnings(),
    ):
        # A sign that the font lacks is drawn as a box: nobody can do anything about the warning.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        made.savefig(buffer, format=ending, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
