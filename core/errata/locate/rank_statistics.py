"""Rank correlation, and intervals of many means at once."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.contract.measurement import RESAMPLES

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Return the rank correlation of two rows of numbers, ties at their mean rank.

    NaN where one of them is constant or has fewer than two numbers.

    >>> spearman([1, 2, 3], [10, 20, 15])
    0.5
    """
    x, y = _ranks(np.asarray(a, dtype=np.float64)), _ranks(np.asarray(b, dtype=np.float64))
    if len(x) != len(y):
        raise ValueError(f"{len(x)} numbers and {len(y)}: they must be pairs")
    if len(x) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else math.nan


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + 1 + ends) / 2)[place.reshape(-1)]


def mean_intervals(
    cases: NDArray[np.float64], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the ends of the 95 % percentile bootstrap interval of each column's mean.

    Unlike `bootstrap` of errata.contract.measurement it takes thousands of columns at once, in
    one matrix product.

    Args:
        cases: (n, k): k values per case; cases are drawn, each with all its values.
        resamples: how many times.
        seed: of a generator of its own.

    Returns:
        (k,) and (k,); both the mean itself where there is one case only.
    """
    n = len(cases)
    if n < 2:
        return cases.mean(axis=0), cases.mean(axis=0)
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    means = drawn @ cases / n
    low, high = np.quantile(means, (0.025, 0.975), axis=0)
    return low, high
