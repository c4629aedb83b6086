"""MELO's vector database: clusters of edited prompts, and which block a query gets.

For a new point p with label y, nearest centre c at distance d, radius ρ and label y_c:

* d > ρ + ρ₀, or no cluster: a new one around p with radius ρ₀;
* y = y_c: p joins; c becomes the mean of its points, ρ = max(ρ₀, the largest distance to it);
* y ≠ y_c: a new cluster around p with radius d/2 + 1e-5; ρ becomes d/2 − 1e-5, and points of the
  old one that lie outside are forgotten.

As in the authors' code, except that theirs calls labels equal when the sums of their token ids are.
The database follows from the list of its points: when an edit is taken out it is made again from
the others' points, as if that edit had never been. One more point is compared with all centres.
"""

from __future__ import annotations

from collections.abc import Iterable
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
        block: id of the edit whose LoRA block it takes.
        radius: ρ₀ of that edit.
    """

    key: Tensor
    label: tuple[int, ...]
    block: str
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

    def __init__(self, points: Iterable[EditedPoint] = ()) -> None:
        self.clusters: list[Cluster] = []
        self._centres: Tensor | None = None  # (number of clusters, d), on the CPU
        for point in points:
            self.add(point)

    def look_up(self, query: Tensor, dtype: torch.dtype) -> str | None:
        """Return the block that a query (d,) takes; None: no cluster is near.

        Args:
            query: the module's output, fp32.
            dtype: what it was computed in, of which a rounding error is forgiven.
        """
        query = query.cpu()  # it is small, the centres are many
        nearest, distance = self._nearest(query)
        if nearest is None:
            return None
        cluster = self.clusters[nearest]
        if distance > cluster.radius + rounding(dtype) * float(query.norm()):
            return None
        points = torch.stack([point.key for point in cluster.points])
        return cluster.points[int((points - query).norm(dim=1).argmin())].block

    def add(self, point: EditedPoint) -> None:
        """Take one more point in, by the rules above."""
        nearest, d = self._nearest(point.key)
        if nearest is None or d > self.clusters[nearest].radius + point.radius:
            self._open(point, point.radius)
        elif self.clusters[nearest].label == point.label:
            self._join(nearest, point)
        else:
            self._split(nearest, point, d)

    def _nearest(self, key: Tensor) -> tuple[int | None, float]:
        """Return the number of the cluster with the nearest centre, and its distance."""
        if self._centres is None or not len(self._centres):
            return None, float("inf")
        distances = (self._centres - key).norm(dim=1)
        nearest = int(distances.argmin())  # of several the first
        return nearest, float(distances[nearest])

    def _open(self, point: EditedPoint, radius: float) -> None:
        """Make a new cluster around a point."""
        self.clusters.append(Cluster(point.key, radius, point.label, [point]))
        row = point.key[None]
        self._centres = row.clone() if self._centres is None else torch.cat([self._centres, row])

    def _join(self, number: int, point: EditedPoint) -> None:
        """Take a point into the cluster of its label."""
        assert self._centres is not None
        cluster = self.clusters[number]
        cluster.points.append(point)
        keys = torch.stack([p.key for p in cluster.points])
        cluster.centre = self._centres[number] = keys.mean(dim=0)
        reach = float((keys - cluster.centre).norm(dim=1).max())
        cluster.radius = max(point.radius, reach)

    def _split(self, number: int, point: EditedPoint, d: float) -> None:
        """Share the way to a cluster of another label with it."""
        assert self._centres is not None
        cluster = self.clusters[number]
        cluster.radius = max(d / 2 - _MARGIN, 0.0)
        cluster.points = [
            p
            for p in cluster.points
            if float((p.key - cluster.centre).norm()) <= cluster.radius
            and not torch.equal(p.key, point.key)  # the same prompt: the newer answer counts
        ]
        if not cluster.points:  # nothing can be found there any more
            del self.clusters[number]
            self._centres = torch.cat([self._centres[:number], self._centres[number + 1 :]])
        self._open(point, d / 2 + _MARGIN)
