"""One measured number with everything needed to read it: protocol, sample size, interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 2000
_CHUNK = 1_000_000  # resampled indices held at a time

Direction = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Measurement:
    """One number, and how it was measured.

    Attributes:
        metric: short name, for example "ES" or "rewrite_exact".
        value: the number.
        n: sample size, in `cases` (requests, or texts for perplexity).
        protocol: "name: how", for example "counterfact: mean-token log-probability …".
        interval: 95 % interval of `value`, None where it makes no sense (one continuous case).
        cases: one value per case, in the order of `case_ids`.
        case_ids: which request each case is: its case_id, else the first digits of its digest.
        unit: "share", "probability", "bits", "perplexity" …
        direction: which way is better.
    """

    metric: str
    value: float
    n: int
    protocol: str
    interval: tuple[float, float] | None = None
    cases: tuple[float, ...] = ()
    case_ids: tuple[str, ...] = ()
    unit: str = "share"
    direction: Direction = "higher"

    @classmethod
    def mean(
        cls,
        metric: str,
        cases: Sequence[float],
        protocol: str,
        *,
        case_ids: Sequence[str] = (),
        unit: str = "share",
        direction: Direction = "higher",
    ) -> Measurement:
        """Return the mean of per-case values with its interval.

        Wilson's interval when every case is 0 or 1, else the bootstrap over cases.
        """
        values = tuple(float(value) for value in cases)
        return cls(
            metric,
            math.fsum(values) / len(values) if values else math.nan,
            len(values),
            protocol,
            mean_interval(values),
            values,
            tuple(case_ids),
            unit,
            direction,
        )

    @property
    def name(self) -> str:
        """Name of the protocol: what stands before the colon."""
        return self.protocol.partition(":")[0]

    def as_json(self, *, cases: bool = True) -> dict[str, Any]:
        """Return plain JSON data; numbers that are not finite become None."""
        data: dict[str, Any] = {
            "metric": self.metric,
            "value": _finite(self.value),
            "n": self.n,
            "protocol": self.protocol,
            "interval": None if self.interval is None else [_finite(end) for end in self.interval],
            "unit": self.unit,
            "direction": self.direction,
        }
        if cases:
            data["cases"] = [_finite(value) for value in self.cases]
            data["case_ids"] = list(self.case_ids)
        return data

    def __str__(self) -> str:
        low_high = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        return f"{self.metric} = {self.value:.4g}{low_high} (n={self.n}; {self.protocol})"


def mean_interval(cases: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean: Wilson for 0/1 cases, else bootstrap over cases."""
    if cases and all(value in (0.0, 1.0) for value in cases):
        return wilson(int(sum(cases)), len(cases))
    return bootstrap(np.asarray(cases, dtype=np.float64)[:, None], lambda means: means[:, 0])


def wilson(successes: int, n: int, z: float = Z95) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    >>> tuple(round(end, 3) for end in wilson(9, 10))
    (0.596, 0.982)
    """
    share = successes / n
    scale = 1 / (1 + z**2 / n)
    centre = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    # At 0 and n successes one end is exactly 0 or 1; rounding must not move it off.
    low = 0.0 if successes == 0 else scale * (centre - half)
    high = 1.0 if successes == n else scale * (centre + half)
    return low, high


def bootstrap(
    cases: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a statistic of column means, over resampled cases.

    Args:
        cases: (n, k): k values per case, resampled together.
        statistic: column means (resamples, k) → (resamples,).
        resamples: how many.
        seed: of a local generator; the global ones are not touched.

    Returns:
        None with fewer than two cases or where something is not finite.
    """
    n = len(cases)
    if n < 2 or not bool(np.isfinite(cases).all()):
        return None
    generator = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    left = resamples
    while left:
        rows = min(left, max(1, _CHUNK // n))
        index = generator.integers(0, n, size=(rows, n))
        with np.errstate(over="ignore"):
            drawn.append(statistic(cases[index].mean(axis=1)))
        left -= rows
    values = np.concatenate(drawn)
    if not bool(np.isfinite(values).all()):
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
