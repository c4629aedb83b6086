"""One measured number with everything needed to read it: protocol, sample size, interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from errata.common.display import Described, shortened
from errata.common.json_numbers import finite, number

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

RESAMPLES = 2000
PRECISION = 1e-10
"""Floats that differ by less, relative to what they were computed from, are the same number."""
_CHUNK = 1_000_000  # resampled indices held at a time

Direction = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Answer:
    """What a model answered to one question, and whether it was right.

    Attributes:
        case_id: of the case that the question belongs to.
        prompt: the question.
        expected: every answer that counts as right.
        text: what the model generated.
        right: whether it matches, by the rule that the measurement's protocol states.
        metric: the metric that counts it, for example "rewrite_exact".
        type: the benchmark's name for this sort of question.
        error: which of `errata.evaluate.ERROR_TYPES` a wrong answer is; "" when it is right.
        details: what else is known of how the text came about (`Generated.details`), plain JSON.
    """

    case_id: str
    prompt: str
    expected: tuple[str, ...]
    text: str
    right: bool
    metric: str
    type: str = ""
    error: str = ""
    details: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data; `details` only where there are any."""
        data = {**asdict(self), "expected": list(self.expected)}
        return data if data["details"] else {k: v for k, v in data.items() if k != "details"}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Answer:
        """Return the answer that `as_json` wrote."""
        return cls(**{**data, "expected": tuple(data["expected"])})


@dataclass(frozen=True, repr=False)
class Measurement(Described):
    """One number, and how it was measured.

    Attributes:
        metric: short name, for example "ES" or "rewrite_exact".
        value: the number.
        n: sample size, in `cases` (requests or what shares a case_id; texts for perplexity).
        protocol: "name: how", for example "counterfact: mean-token log-probability …".
        interval: 95 % interval of `value`, None where it makes no sense (one continuous case;
            continuous cases that are all alike).
        cases: one value per case, in the order of `case_ids`.
        case_ids: which request each case is: its case_id, else the first digits of its digest.
        unit: "share", "probability", "bits", "perplexity" …
        direction: which way is better.
        answers: the single answers behind a generated metric (those named `…_exact`).
        of: the metrics of the same protocol whose harmonic mean this one is, () for all others.
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
    answers: tuple[Answer, ...] = ()
    of: tuple[str, ...] = ()

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
        answers: Sequence[Answer] = (),
    ) -> Measurement:
        """Return the mean of per-case values with its interval.

        Wilson's interval when every case is 0 or 1, else the bootstrap over cases; of cases that
        are all alike, which a bootstrap would be certain of, `alike_interval` for shares and none
        for other numbers. Values of one case id (the edits of a chain, made in one call) are no
        independent samples: they are resampled together.
        """
        values = tuple(float(value) for value in cases)
        return cls(
            metric,
            math.fsum(values) / len(values) if values else math.nan,
            len(values),
            protocol,
            mean_interval(values, shares=unit == "share", case_ids=case_ids),
            values,
            tuple(case_ids),
            unit,
            direction,
            tuple(answers),
        )

    @property
    def name(self) -> str:
        """Name of the protocol: what stands before the colon."""
        return self.protocol.partition(":")[0]

    @property
    def is_mean(self) -> bool:
        """Whether the value is the mean of the cases, so that more cases can be joined to it."""
        if not self.cases or self.of:
            return False
        mean = math.fsum(self.cases) / len(self.cases)
        # NaN is a mean like any other: that of cases one of which is NaN.
        both = math.isnan(mean) and math.isnan(self.value)
        return both or math.isclose(mean, self.value, rel_tol=1e-9, abs_tol=1e-12)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Return the measurement that `as_json` wrote, without its answers.

        Numbers that were not finite are written as None and come back as NaN.
        """
        low_high = data["interval"]
        return cls(
            data["metric"],
            number(data["value"]),
            int(data["n"]),
            data["protocol"],
            None if low_high is None else (number(low_high[0]), number(low_high[1])),
            tuple(map(number, data.get("cases", ()))),
            tuple(data.get("case_ids", ())),
            data["unit"],
            data["direction"],
            of=tuple(data.get("of", ())),
        )

    def as_json(self, *, cases: bool = True) -> dict[str, Any]:
        """Return plain JSON data; numbers that are not finite become None. Without `answers`."""
        data: dict[str, Any] = {
            "metric": self.metric,
            "value": finite(self.value),
            "n": self.n,
            "protocol": self.protocol,
            "interval": None if self.interval is None else [finite(end) for end in self.interval],
            "unit": self.unit,
            "direction": self.direction,
            "of": list(self.of),
        }
        if cases:
            data["cases"] = [finite(value) for value in self.cases]
            data["case_ids"] = list(self.case_ids)
        return data

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield self.metric, f"{self.value:.4g}"
        if self.interval:
            yield "95 %", f"{self.interval[0]:.4g} to {self.interval[1]:.4g}"
        yield "n", str(self.n)
        yield "how", shortened(self.protocol, 120)

    def as_row(self) -> dict[str, Any]:
        """Return what a table shows of it."""
        low, high = self.interval or (None, None)
        return {
            "metric": self.metric, "value": self.value, "low": low, "high": high, "n": self.n,
            "unit": self.unit, "protocol": self.protocol,
        }  # fmt: skip

    def __str__(self) -> str:
        low_high = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        return f"{self.metric} = {self.value:.4g}{low_high} (n={self.n}; {self.protocol})"


def mean_interval(
    cases: Sequence[float], *, shares: bool, case_ids: Sequence[str] = ()
) -> tuple[float, float] | None:
    """Return the 95 % interval of a mean: Wilson for shares of 0 and 1, else bootstrap over cases.

    A ratio or a probability that happens to be 1 in every case is no proportion of successes.
    Where case ids repeat, each id is one case with all its values.
    """
    repeated = len(set(case_ids)) < len(case_ids) == len(cases)
    totals = case_totals(cases, case_ids if repeated else list(map(str, range(len(cases)))))
    if shares and cases and all(0 <= value <= 1 for value in cases):
        if not repeated and all(value in (0.0, 1.0) for value in cases):
            return wilson(int(sum(cases)), len(cases))
        if len(totals) > 1 and len(set(cases)) == 1:
            return alike_interval(cases[0], len(totals), 0.0, 1.0)
    return bootstrap(totals, ratio_of_means)


def alike_interval(value: float, n: int, low: float, high: float) -> tuple[float, float]:
    """Return the 95 % interval of a mean over n cases that all have one value.

    Resampling would claim certainty. By Wilson's interval at least a share of all cases is like
    them; the others may be anything from `low` to `high`.

    >>> alike_interval(1.0, 4, 0.0, 1.0) == wilson(4, 4)
    True
    """
    share = wilson(n, n)[0]
    return share * value + (1 - share) * low, share * value + (1 - share) * high


def case_totals(values: Sequence[float], case_ids: Sequence[str]) -> NDArray[np.float64]:
    """Return (sum, number) of the values of each case, (cases, 2), in order of appearance."""
    totals: dict[str, list[float]] = {}
    for name, value in zip(case_ids, values, strict=True):
        total = totals.setdefault(name, [0.0, 0.0])
        total[0] += value
        total[1] += 1
    return np.array(list(totals.values()), dtype=np.float64)


def ratio_of_means(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean over values from the column means of `case_totals`, for `bootstrap`."""
    ratios: NDArray[np.float64] = means[:, 0] / means[:, 1]
    return ratios


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion.

    >>> tuple(round(end, 3) for end in wilson(9, 10))
    (0.596, 0.982)
    """
    share, z = successes / n, Z95
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
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of a statistic of column means, over resampled cases.

    Args:
        cases: (n, k): k values per case, resampled together.
        statistic: column means (`RESAMPLES`, k) → (`RESAMPLES`,).
        seed: of a generator of its own; the global ones are not touched.

    Returns:
        None with fewer than two cases, where something is not finite, and where every draw gives
        the same: that would claim certainty.
    """
    n = len(cases)
    if n < 2 or not bool(np.isfinite(cases).all()):
        return None
    generator = np.random.default_rng(seed)
    drawn: list[NDArray[np.float64]] = []
    left = RESAMPLES
    while left:
        rows = min(left, max(1, _CHUNK // n))
        index = generator.integers(0, n, size=(rows, n))
        with np.errstate(over="ignore"):
            drawn.append(statistic(cases[index].mean(axis=1)))
        left -= rows
    values = np.concatenate(drawn)
    if not bool(np.isfinite(values).all()) or np.ptp(values) <= PRECISION * np.abs(values).max():
        return None
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
