"""What a change of a weight costs in each direction: the one thing closed-form methods differ in.

A change Δ of a projection W costs tr(Δ M⁻¹ Δᵀ). MEMIT, EMMET and ROME take M = C⁻¹, so that what
the layer says on ordinary text stays; AlphaEdit takes M = P, the projector onto directions that
ordinary text does not use, and forbids all others.

Every metric is M = B Bᵀ, with B of (D, r). `reduce` gives Bᵀ k, `expand` B x, `whiten` M k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from errata.kit.null_space import NullSpace
    from errata.kit.second_moments import SecondMoment


class Metric(ABC):
    """M = B Bᵀ of one layer; fp64 throughout.

    Attributes:
        size: D, the width of a key.
        rank: r, the number of columns of B.
        reference: what it was made from, as plain JSON; `reference["digest"]` tells metrics apart.
    """

    size: int
    rank: int
    reference: dict[str, Any]

    @abstractmethod
    def reduce(self, keys: Tensor) -> Tensor:
        """Return Bᵀ K, (r, N), of K (D, N)."""

    @abstractmethod
    def expand(self, reduced: Tensor) -> Tensor:
        """Return B X, (D, N), of X (r, N)."""

    def whiten(self, keys: Tensor) -> Tensor:
        """Return M K, (D, N), of K (D, N)."""
        return self.expand(self.reduce(keys))


class Whitening(Metric):
    """M = C⁻¹, by the Cholesky factor of C that the second moment keeps."""

    def __init__(self, moment: SecondMoment) -> None:
        self._moment = moment
        self.size = self.rank = moment.size
        self.reference = {
            "metric": "second_moment",
            "digest": moment.digest,
            "layer": moment.layer,
            "tokens": moment.count,
            "text": moment.text,
            "ridge": moment.ridge,
        }

    def reduce(self, keys: Tensor) -> Tensor:
        """Return L⁻¹ K, where C = L Lᵀ."""
        factor = self._moment.cholesky
        reduced: Tensor = torch.linalg.solve_triangular(factor, keys.to(factor), upper=False)
        return reduced

    def expand(self, reduced: Tensor) -> Tensor:
        """Return L⁻ᵀ X."""
        factor = self._moment.cholesky
        keys: Tensor = torch.linalg.solve_triangular(factor.T, reduced.to(factor), upper=True)
        return keys


class Projection(Metric):
    """M = P = U₀ U₀ᵀ: nothing is written outside the null space."""

    def __init__(self, space: NullSpace) -> None:
        self._basis = space.basis
        self.size, self.rank = space.size, space.rank
        self.reference = {"metric": "null_space", **space.reference}

    def reduce(self, keys: Tensor) -> Tensor:
        """Return U₀ᵀ K."""
        return self._basis.T @ keys.to(self._basis)

    def expand(self, reduced: Tensor) -> Tensor:
        """Return U₀ X."""
        return self._basis @ reduced.to(self._basis)
