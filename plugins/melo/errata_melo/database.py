"""MELO's vector database: clusters of edited prompts, and which block a query gets.

For a new point p with label y, nearest centre c at distance d, radius ρ and label y_c:

* d > ρ + ρ₀, or no cluster: a new one around p with radius ρ₀;
* y = y_c: p joins; c becomes the mean of its points, ρ = max(ρ₀, the largest distance to it);
* y ≠ y_c: a new cluster around p with radius d/2 + 1e-5; ρ becomes d/2 − 1e-5, and points of the
  old one that lie outside are forgotten.

As in the authors' code, but for the label: theirs are equal when the sums of their token ids are.
All of it follows from the list of points, so an edit that is taken out was never there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.model.routing import rounding

if TYPE_CHECKING:
    from torch import Tensor

_MARGIN = 1e-5


class EditedPoint(NamedTuple):
    """One edited prompt.

    Attributes:
        key: (d,) fp32, the module's output at its last token.
        label: token ids of its target.
        block: number of the edit whose LoRA block it takes.
        radius: ρ₀ of that edit.
    """

    key: Tensor
    label: tuple[int, ...]
    block: int
    radius: float


@dataclass(eq=False)
class Cluster:
    """Points with one label.

    Attributes:
        centre: (d,).
        radius: how far it reaches.
        label: token ids.
        points: those it holds.
    """

    centre: Tensor
    radius: float
    label: tuple[int, ...]
    points: list[EditedPoint] = field(default_factory=list)


class VectorDatabase:
    """The clusters that a list of points makes.

    Args:
        points: in the order in which they were edited.
    """

    def __init__(self, points: Sequence[EditedPoint]) -> None:
        self.clusters: list[Cluster] = []
        for point in points:
            self._add(point)
        self._centres = torch.stack([c.centre for c in self.clusters]) if points else None

    def look_up(self, query: Tensor, dtype: torch.dtype) -> int | None:
        """Return the block that a query (d,) takes; None: no cluster is near.

        Args:
            query: the module's output, fp32.
            dtype: what it was computed in, of which a rounding error is forgiven.
        """
        if self._centres is None:
            return None
        distances = (self._centres.to(query.device) - query).norm(dim=1)
        nearest = int(distances.argmin())
        cluster = self.clusters[nearest]
        slack = rounding(dtype) * float(query.norm())
        if float(distances[nearest]) > cluster.radius + slack:
            return None
        points = torch.stack([point.key for point in cluster.points]).to(query.device)
        return cluster.points[int((points - query).norm(dim=1).argmin())].block

    def _add(self, point: EditedPoint) -> None:
        distances = [float((c.centre - point.key).norm()) for c in self.clusters]
        nearest = min(range(len(distances)), key=distances.__getitem__, default=-1)
        d = distances[nearest] if distances else float("inf")
        cluster = self.clusters[nearest] if distances else None
        if cluster is None or d > cluster.radius + point.radius:
            self.clusters.append(Cluster(point.key, point.radius, point.label, [point]))
        elif cluster.label == point.label:
            cluster.points.append(point)
            keys = torch.stack([p.key for p in cluster.points])
            cluster.centre = keys.mean(dim=0)
            reach = float((keys - cluster.centre).norm(dim=1).max())
            cluster.radius = max(point.radius, reach)
        else:
            cluster.radius = max(d / 2 - _MARGIN, 0.0)
            cluster.points = [
                p
                for p in cluster.points
                if float((p.key - cluster.centre).norm()) <= cluster.radius
                and not torch.equal(p.key, point.key)  # the same prompt: the newer answer counts
            ]
            if not cluster.points:
                self.clusters.remove(cluster)  # nothing can be found there any more
            self.clusters.append(Cluster(point.key, d / 2 + _MARGIN, point.label, [point]))
