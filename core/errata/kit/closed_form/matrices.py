"""The matrices of the papers' formulas, with operators that read as the papers write them.

    Δ = R @ K.T @ inverse(λ * C + K @ K.T)                                   MEMIT
    Δ = R @ inverse(K.T @ inverse(C) @ K + λ * ε * I) @ K.T @ inverse(C)     EMMET
    Δ = R @ K.T @ P @ inverse(K_p @ K_p.T @ P + K @ K.T @ P + L2 * I)        AlphaEdit

No D × D matrix is formed on the way. K Kᵀ stays the list of its keys, C is used by its Cholesky
factor and P by its basis, and Δ stays the product of its two factors. What is inverted has as many
unknowns as there are keys, or as M has rank, whichever is less. With M = C⁻¹ (or P), S = s I:

    Kᵀ (s M⁻¹ + K Kᵀ)⁻¹  =  Kᵀ M (s I + K Kᵀ M)⁻¹  =  (S + Kᵀ M K)⁻¹ Kᵀ M

Every matrix has a leading dimension G of problems that are solved apart from each other: one
problem of N requests for a batch, or one problem per request. All numbers are fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, overload

import torch

from errata.edits.delta.joint_solve import cholesky, floored
from errata.kit.metric import Metric

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Columns:
    """A matrix with one column per request, as K, R, z and h are.

    Attributes:
        tensor: (G, x, N) fp64.
    """

    tensor: Tensor

    @classmethod
    def of(cls, rows: Tensor, *, each: bool = False) -> Columns:
        """Return vectors (N, x) as columns: of one problem, or of a problem for each."""
        wide = rows.double()
        return cls(wide[:, :, None] if each else wide.T[None])

    @property
    def flat(self) -> Tensor:
        """The columns of all problems side by side, (x, G · N)."""
        return self.tensor.transpose(0, 1).flatten(1)

    @property
    def count(self) -> int:
        """N, the number of requests in each problem."""
        return int(self.tensor.shape[2])

    @property
    def T(self) -> Transposed:
        """The transpose."""
        return Transposed(self)

    def __add__(self, other: Columns) -> Columns:
        return Columns(self.tensor + other.tensor)

    def __sub__(self, other: Columns) -> Columns:
        return Columns(self.tensor - other.tensor)

    def __truediv__(self, number: float) -> Columns:
        return Columns(self.tensor / number)

    @overload
    def __matmul__(self, other: Tensor) -> Columns: ...
    @overload
    def __matmul__(self, other: Transposed) -> Product: ...
    def __matmul__(self, other: Tensor | Transposed) -> Columns | Product:
        if isinstance(other, Transposed):
            return Product(self, other)
        return Columns(self.tensor.to(other) @ other)


@dataclass(frozen=True, eq=False)
class Transposed:
    """Kᵀ, or Kᵀ M, or Kᵀ times an inverse: one row per request.

    Attributes:
        columns: K.
        metric: M, where there is one.
        system: what was inverted, where something was.
    """

    columns: Columns
    metric: Metric | None = None
    system: NormalMatrix | None = None

    @cached_property
    def rows(self) -> Tensor:
        """The rows as numbers, (G, N, D)."""
        if self.system is not None:
            return self.system.solve(self.columns)
        if self.metric is not None:
            return _by_column(self.metric.whiten, self.columns.tensor).mT
        return self.columns.tensor.mT

    @overload
    def __matmul__(self, other: Columns) -> Tensor: ...
    @overload
    def __matmul__(self, other: Metric | Inverse) -> Transposed: ...
    def __matmul__(self, other: Columns | Metric | Inverse) -> Tensor | Transposed:
        if isinstance(other, Columns):
            if self.metric is None or self.system is not None:
                return self.rows @ other.tensor.to(self.rows)
            left, right = (_by_column(self.metric.reduce, k.tensor) for k in (self.columns, other))
            return left.mT @ right
        if self.system is not None:
            raise ValueError("Kᵀ times an inverse cannot be multiplied by one more matrix.")
        if isinstance(other, Metric):
            return replace(self, metric=other)
        if not other.matrix.keys:  # that of C itself
            return replace(self, metric=other.matrix.metric)
        if self.metric is not other.matrix.projection:
            raise ValueError(
                "Kᵀ (s C + K Kᵀ)⁻¹ and Kᵀ P (K Kᵀ P + s I)⁻¹ are solved: with P on both sides, or "
                "on none."
            )
        return replace(self, system=other.matrix)


@dataclass(frozen=True, eq=False)
class Product:
    """Columns times rows, unformed: Δ of (G, d, D) with rank N, or K Kᵀ.

    Attributes:
        left: (G, d, N).
        right: (G, N, D).
    """

    left: Columns
    right: Transposed

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """U (d, G · N) and V (D, G · N): the sum of all problems is U Vᵀ."""
        return self.left.flat, self.right.rows.transpose(1, 2).transpose(0, 1).flatten(1)

    def __matmul__(self, other: Metric | Inverse) -> Product:
        return Product(self.left, self.right @ other)

    def __add__(self, other: Product | ScaledIdentity) -> NormalMatrix:
        P = self.right.metric
        if P is None:
            raise ValueError("K Kᵀ is added to λ C, and K Kᵀ P to K Kᵀ P or s I.")
        return NormalMatrix(P, 0.0, projected=True) + self + other


@dataclass(frozen=True, eq=False)
class NormalMatrix:
    """The matrix of the normal equations, s M⁻¹ + Σ K Kᵀ or Σ K Kᵀ P + s I, (G, D, D) unformed.

    C itself is the one with M = C⁻¹, s = 1 and no keys.

    Attributes:
        metric: M.
        slack: s.
        keys: each K.
        projected: the second form, in which M is P.
    """

    metric: Metric
    slack: float = 1.0
    keys: tuple[Columns, ...] = ()
    projected: bool = False

    @property
    def projection(self) -> Metric | None:
        """P, in the second form."""
        return self.metric if self.projected else None

    def __rmul__(self, number: float) -> NormalMatrix:
        if self.keys:
            raise ValueError("Only C can be scaled: write λ * C + K @ K.T.")
        return replace(self, slack=number * self.slack)

    def __add__(self, other: Product | ScaledIdentity) -> NormalMatrix:
        if isinstance(other, ScaledIdentity):
            if not self.projected:
                raise ValueError("s I is added to K Kᵀ P; to K Kᵀ alone add λ C.")
            return replace(self, slack=self.slack + other.scale)
        keys, right = other.left, other.right
        if right.columns is not keys or right.metric is not self.projection or right.system:
            raise ValueError("Only products K Kᵀ, or K Kᵀ P with the same P, can be added.")
        return replace(self, keys=(*self.keys, keys))

    def solve(self, columns: Columns) -> Tensor:
        """Return (S + K_allᵀ M K_all)⁻¹ K_allᵀ M, (G, N, D): the rows that belong to `columns`."""
        place = next((i for i, keys in enumerate(self.keys) if keys is columns), None)
        if place is None:
            raise ValueError("Kᵀ (λC + K Kᵀ)⁻¹ is solved with the same K in both places.")
        start = sum(keys.count for keys in self.keys[:place])
        own = slice(start, start + columns.count)
        problems = len(columns.tensor)
        K = torch.cat([keys.tensor.expand(problems, -1, -1) for keys in self.keys], dim=2)
        reduced = _by_column(self.metric.reduce, K)  # K̃ = Bᵀ K, (G, r, N): M = B Bᵀ
        squares = reduced.square().sum(1)
        s = floored(torch.full_like(squares, self.slack), squares)
        if reduced.shape[2] <= reduced.shape[1]:
            system = torch.diag_embed(s) + reduced.mT @ reduced
            found = torch.cholesky_solve(reduced.mT, cholesky(system))[:, own].mT
        else:
            scaled = reduced / s[:, None]  # K̃ S⁻¹
            system = torch.eye(reduced.shape[1]).to(reduced) + scaled @ reduced.mT
            found = torch.cholesky_solve(scaled[:, :, own], cholesky(system))
        return _by_column(self.metric.expand, found).mT


@dataclass(frozen=True, eq=False)
class Inverse:
    """A⁻¹ of a normal matrix A, to be multiplied from the left."""

    matrix: NormalMatrix


@dataclass(frozen=True)
class ScaledIdentity:
    """s I, of the size of what it is added to."""

    scale: float

    def __rmul__(self, number: float) -> ScaledIdentity:
        return ScaledIdentity(number * self.scale)

    def __radd__(self, gram: Tensor) -> Tensor:
        """Return Kᵀ M K + s I; s is at least `RIDGE` times each key's own kᵀ M k."""
        own = gram.diagonal(dim1=-2, dim2=-1)
        return gram + torch.diag_embed(floored(torch.full_like(own, self.scale), own))


I = ScaledIdentity(1.0)  # noqa: E741
"""The identity, under the papers' name."""


@overload
def inverse(matrix: NormalMatrix) -> Inverse: ...
@overload
def inverse(matrix: Tensor) -> Tensor: ...
def inverse(matrix: NormalMatrix | Tensor) -> Inverse | Tensor:
    """Return the inverse of a symmetric positive definite matrix.

    Raises:
        IntegrityError: a matrix of numbers, (G, N, N), is singular or not finite. That of a
            normal matrix is computed, and refused, where it is used.
    """
    if isinstance(matrix, NormalMatrix):
        return Inverse(matrix)
    return torch.cholesky_inverse(cholesky(matrix))


def _by_column(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a function of (x, N) to the columns of all problems at once, (G, x, N)."""
    problems, _, count = tensor.shape
    found = function(tensor.transpose(0, 1).flatten(1))
    return found.reshape(-1, problems, count).transpose(0, 1)
