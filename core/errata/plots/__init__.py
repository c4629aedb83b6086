"""Pictures of what locating and editing found, drawn by matplotlib (extra "report").

Every function returns a `matplotlib.figure.Figure`; `save` writes it as PNG or SVG. Figures are
one column wide (84 mm), with type of 6 to 8 points. Colours differ in lightness too, and lines in
their marks: nothing rests on colour alone. No global state of matplotlib is used or changed.
"""

from errata.plots.averages import average_curves, average_map, severed_curves
from errata.plots.margins import Margins, class_margins
from errata.plots.overlaps import layer_overlaps
from errata.plots.style import save
from errata.plots.traces import heat_map, trajectory
from errata.plots.weights import layer_sweep, method_changes, overlap_map, weight_changes

__all__ = [
    "Margins",
    "average_curves",
    "average_map",
    "class_margins",
    "heat_map",
    "layer_overlaps",
    "layer_sweep",
    "method_changes",
    "overlap_map",
    "save",
    "severed_curves",
    "trajectory",
    "weight_changes",
]
