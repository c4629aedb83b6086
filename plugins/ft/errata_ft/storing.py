"""What is kept of D: whole, some rows or columns of it, or factors; whichever is smallest.

* dense: D itself, exact.
* sparse_rows: the rows (or columns) of D that are not zero, or, asked for, as few as the error
  allows. Where an activation is exactly zero (ReLU) its column of D is, too.
* low_rank: U (Uᵀ D) with U the leading left singular vectors of D. Adam moves every entry by about
  as much, so D has full rank; but most of that is noise that no prompt reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch

from errata.edits.delta import Delta, DenseDelta, Factor, LowRankDelta, Rows, SparseRowsDelta

if TYPE_CHECKING:
    from torch import Tensor

_ITERATIONS = 2


class Stored(NamedTuple):
    """One way to keep D.

    Attributes:
        delta: what is kept.
        values: what it adds, by parameter name, as stored.
        error: the largest ‖D − values‖ / ‖D‖ of a parameter.
    """

    delta: Delta
    values: dict[str, Tensor]
    error: float


def forms(
    difference: Mapping[str, Tensor],
    transposed: Callable[[str], bool | None],
    store: str,
    error: float,
) -> Iterator[Stored]:
    """Yield ways to keep D within a relative error, the smallest first, dense last.

    Args:
        difference: D by parameter name, as stored.
        transposed: says of a weight whether it is stored as (in, out); None for what is no matrix.
        store: "auto", or the only form wanted ("dense", "low_rank", "sparse").
        error: largest relative error (Frobenius) per parameter; sparse leaves out what is exactly
            zero even at 0.
    """
    found: list[Stored] = []
    if store in ("auto", "sparse"):
        # What it saves by leaving out small rows is not worth an error, unless that is asked for.
        found.append(_sparse(difference, error if store == "sparse" else 0.0))
    matrices = all(transposed(name) is not None for name in difference)
    if store == "low_rank" or (store == "auto" and matrices and error > 0):
        factored = _low_rank(difference, transposed, error, always=store == "low_rank")
        found += [factored] if factored is not None else []
    dense = {name: d.cpu() for name, d in difference.items()}
    whole = Stored(DenseDelta(dense), dict(difference), 0.0)
    if store == "auto":
        found = [form for form in found if form.delta.nbytes < whole.delta.nbytes]
    yield from sorted(found, key=lambda form: form.delta.nbytes)
    if store in ("auto", "dense"):
        yield whole


def _relative(difference: Tensor, kept: Tensor) -> float:
    scale = max(float(difference.norm()), torch.finfo(difference.dtype).tiny)
    return float((difference - kept).norm()) / scale


def _sparse(difference: Mapping[str, Tensor], error: float) -> Stored:
    rows, values, errors = {}, {}, []
    for name, d in difference.items():
        options = [_rows(d, axis, error) for axis in range(d.ndim)]
        part = min(options, key=lambda option: option.values.numel())
        kept = torch.zeros_like(d)
        part.add_to(kept)
        rows[name], values[name] = Rows(part.index.cpu(), part.values.cpu(), part.axis), kept
        errors.append(_relative(d, kept))
    return Stored(SparseRowsDelta(rows), values, max(errors))


def _rows(d: Tensor, axis: int, error: float) -> Rows:
    """Return the fewest slices along an axis that keep D within the error."""
    energy = d.double().square().movedim(axis, 0).flatten(1).sum(1) if d.ndim > 1 else (
        d.double().square()
    )  # fmt: skip
    order = energy.argsort(stable=True)  # the smallest first
    lost = energy[order].cumsum(0)
    allowed = float(lost[-1]) * error**2
    dropped = int((lost <= allowed).sum()) if float(lost[-1]) else len(order)
    kept = order[min(dropped, len(order) - 1) :]  # one at least: a delta without rows is none
    return Rows.of(d, kept, axis)


def _low_rank(
    difference: Mapping[str, Tensor],
    transposed: Callable[[str], bool | None],
    error: float,
    always: bool,
) -> Stored | None:
    """Return D as factors; None where that takes as much as D itself (unless `always`)."""
    factors, values, errors = {}, {}, []
    for name, d in difference.items():
        flip = bool(transposed(name))
        matrix = d.T if flip else d  # (d_out, d_in)
        tall = matrix.shape[0] > matrix.shape[1]
        short = matrix.T if tall else matrix
        worth = math.ceil(d.numel() / sum(d.shape)) - 1
        found = _leading(short, error, len(short) if always else min(worth, len(short)))
        if found is None:
            return None
        basis, along = found
        u, v = (along, basis) if tall else (basis, along)
        u, v = u.to(d.dtype), v.to(d.dtype)
        product = u @ v.T
        kept = product.T if flip else product
        factors[name] = Factor(u.cpu().contiguous(), v.cpu().contiguous(), flip)
        values[name] = kept
        errors.append(_relative(d, kept))
    return Stored(LowRankDelta(factors), values, max(errors))


def _leading(matrix: Tensor, error: float, limit: int) -> tuple[Tensor, Tensor] | None:
    """Return orthonormal U (m, r) and V = Mᵀ U (n, r) with ‖M − U Vᵀ‖ ≤ error · ‖M‖.

    The leading directions are found by subspace iteration from a fixed random start (Halko,
    Martinsson, Tropp 2011), twice as many each time, which takes seconds where a decomposition of
    a 7B model's matrix takes minutes; among those r is the smallest. None: more than `limit`.
    """
    total = float(matrix.double().square().sum())
    allowed = total * error**2
    rank = min(8, limit)
    while rank > 0:
        generator = torch.Generator().manual_seed(rank)
        start = torch.randn(matrix.shape[1], rank, generator=generator, dtype=matrix.dtype)
        basis = matrix @ start.to(matrix.device)
        for _ in range(_ITERATIONS):
            basis = matrix @ (matrix.T @ torch.linalg.qr(basis).Q)
        basis = torch.linalg.qr(basis).Q  # (m, rank)
        along = matrix.T @ basis  # (n, rank)
        energy, turn = torch.linalg.eigh(along.double().T @ along.double())  # ascending
        lost = max(total - float(energy.sum()), 0.0)
        if lost <= allowed or rank == matrix.shape[0]:
            tail = lost + energy.clamp_min(0).cumsum(0)
            kept = turn[:, min(int((tail <= allowed).sum()), rank - 1) :].flip(1).to(basis)
            return basis @ kept, along @ kept
        # No direction that is left has more energy than the least of those that were found.
        if lost - (limit - rank) * float(energy[0]) > allowed:
            return None
        rank = min(2 * rank, limit)
    return None
