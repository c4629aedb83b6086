"""The least-squares problem behind every closed-form edit, solved one key after the other.

Keys K (D, N), wanted residuals R (d, N), slacks s (N) and a metric M, (D, D) such as C⁻¹:

    min over Δ of  Σ_i ‖Δ k_i − r_i‖² / s_i + tr(Δ M⁻¹ Δᵀ)   ⇒   Δ = R (S + Kᵀ M K)⁻¹ (M K)ᵀ

With M = C⁻¹ and s = λ this is MEMIT's R Kᵀ (λC + K Kᵀ)⁻¹; with s → 0 the constraint Δ k = r is met
exactly (ROME for one key, EMMET for many); with M = P and s = L2 it is AlphaEdit. A key that must
stay as it is has r = 0. Everything is fp64.

Only M K enters, so what stores its whitened keys w = M k needs neither M nor C to be solved again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

RIDGE = 1e-9
"""Least slack of a key, relative to kᵀ M k.

It makes a constraint that repeats or contradicts others solvable: equal keys with different
residuals get the mean of these, and what is met exactly is met to about this relative error.
"""

BLOCK = 64
"""Keys that `JointSolve` takes at a time."""


class KeyRows(NamedTuple):
    """Keys as they are solved for, one per row, all fp64 and on one device.

    Attributes:
        k: (n, D) keys.
        w: (n, D) whitened keys M k.
        r: (n, d) wanted residuals.
        s: (n,) slacks.
    """

    k: Tensor
    w: Tensor
    r: Tensor
    s: Tensor


def floored(slack: Tensor, own: Tensor) -> Tensor:
    """Return slacks of at least `RIDGE` times the keys' own kᵀ M k."""
    floor: Tensor = RIDGE * own
    return torch.maximum(slack, floor)


def cholesky(system: Tensor) -> Tensor:
    """Return the lower Cholesky factor of a system, or of several, (…, N, N).

    Raises `IntegrityError` where there is none.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()) or not bool(torch.isfinite(factor).all()):
        raise IntegrityError(
            "The least-squares system of these keys cannot be solved: a key or its whitened form "
            "is not finite, or they do not belong together."
        )
    return factor


class JointSolve:
    """Δ over a growing list of keys, where a new key costs what it adds.

    With A = S + Kᵀ M K = L Lᵀ, the rows of Z = L⁻¹ (M K)ᵀ and Y = L⁻¹ Rᵀ depend on the keys up
    to them only, and Δ = Yᵀ Z. So keys at the end are appended, in O((D + d) N) each, and what
    lies before a removed key is kept (`truncate`). Once there are more keys than dimensions, Z
    gives way to Q = Zᵀ Z, (D, D): the accumulated normal equations, at O(D²) a key.

    Keys go in by blocks of `BLOCK` at fixed places, so that every number is the outcome of the
    same operations on operands of the same shapes, whatever was appended and truncated before:
    the result is a function, bit for bit, of the list of keys.

    Args:
        d_in: D. d_out: d. device: where it computes.
    """

    def __init__(self, d_in: int, d_out: int, device: torch.device | str = "cpu") -> None:
        self._width, self._height = d_in, d_out
        self._turn = -(-d_in // BLOCK) * BLOCK  # keys at which Q takes over from Z
        self._device = torch.device(device)
        self._z, self._y = self._zeros(0, d_in), self._zeros(0, d_out)  # rows beyond `count` spare
        self._q: Tensor | None = None
        self._delta = self._zeros(d_out, d_in)
        self._rest: tuple[Tensor, Tensor] | None = None  # of the keys after the last whole block
        self.count = 0

    @property
    def change(self) -> Tensor:
        """Δ (d, D) of all keys of the last `extend`."""
        if self._rest is None:
            return self._delta.clone()
        z, y = self._rest
        return torch.addmm(self._delta, y.T, z)

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Yᵀ (d, n) and Zᵀ (D, n) of all keys of the last `extend`: Δ is the one times the other.

        None once there are more keys than dimensions.
        """
        if self._q is not None:
            return None
        y, z = self._y[: self.count], self._z[: self.count]
        if self._rest is not None:
            y, z = torch.cat([y, self._rest[1]]), torch.cat([z, self._rest[0]])
        return y.T, z.T

    def extend(self, rows: KeyRows) -> None:
        """Append `rows`: whole blocks of them for good.

        The keys after the last whole block are solved for and not kept: give them again, with
        what follows them, next time.
        """
        for start in range(0, len(rows.k) - BLOCK + 1, BLOCK):
            block = KeyRows(*(part[start : start + BLOCK].contiguous() for part in rows))
            self._append(*self._solved(block))
        rest = len(rows.k) % BLOCK
        self._rest = None
        if rest:
            self._rest = self._solved(KeyRows(*(part[-rest:].contiguous() for part in rows)))

    def truncate(self, count: int) -> None:
        """Forget the keys from number `count` on, and those that share a block with it."""
        count = count // BLOCK * BLOCK
        if count >= self.count:
            return
        if self.count > self._turn:  # the rows of Z after the turn were not kept
            count = min(count, self._turn)
        self.count = 0
        self._q = None
        self._delta = self._zeros(self._height, self._width)
        # The sums are formed again, block by block as they were, from the rows that stay.
        z, y = self._z, self._y
        for start in range(0, count, BLOCK):
            self._append(z[start : start + BLOCK], y[start : start + BLOCK], keep=False)

    # -- how -------------------------------------------------------------------------------------

    def _solved(self, rows: KeyRows) -> tuple[Tensor, Tensor]:
        """Return the block's rows of Z and Y."""
        k, w, r, s = rows
        if self._q is not None:
            v = w - k @ self._q
        elif self.count:
            z = self._z[: self.count]
            v = w - (k @ z.T) @ z  # what the earlier keys leave of M k
        else:
            v = w
        left = r - k @ self._delta.T  # what the earlier keys leave to be written
        system = torch.diag(floored(s, (k * w).sum(1))) + k @ v.T
        factor = cholesky(0.5 * (system + system.T))
        z, y = (torch.linalg.solve_triangular(factor, part, upper=False) for part in (v, left))
        return z.contiguous(), y.contiguous()

    def _append(self, z: Tensor, y: Tensor, keep: bool = True) -> None:
        if keep and self.count < self._turn:
            self._store(z, y)
        self.count += len(z)
        self._delta.addmm_(y.T, z)
        if self._q is not None:
            self._q.addmm_(z.T, z)
        elif self.count >= self._turn:
            kept = self._z[: self.count]
            self._q = kept.T @ kept

    def _store(self, z: Tensor, y: Tensor) -> None:
        end = self.count + len(z)
        if end > len(self._z):
            room = min(max(2 * len(self._z), 4 * BLOCK), self._turn) - len(self._z)
            self._z = torch.cat([self._z, self._zeros(room, self._width)])
            self._y = torch.cat([self._y, self._zeros(room, self._height)])
        self._z[self.count : end] = z
        self._y[self.count : end] = y

    def _zeros(self, rows: int, columns: int) -> Tensor:
        return torch.zeros(rows, columns, dtype=torch.float64, device=self._device)
