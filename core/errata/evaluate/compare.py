"""Is one better than the other? Two measurements of the same cases, compared case by case."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from errata.common.json_numbers import finite
from errata.contract.measurement import (
    PRECISION,
    Measurement,
    alike_interval,
    bootstrap,
    case_totals,
    ratio_of_means,
)
from errata.errors import ComparisonError, MissingExtraError

MCNEMAR = "McNemar's exact test"
WILCOXON = "Wilcoxon's signed-rank test"


@dataclass(frozen=True)
class Comparison:
    """What two measurements of the same cases differ by.

    Attributes:
        metric: what was measured.
        a: label of the first.
        b: label of the second.
        n: cases that both have.
        value_a: mean of the first over these cases.
        value_b: mean of the second.
        difference: `value_a - value_b`.
        interval: 95 % interval of the difference, by bootstrap over the cases. Where all cases
            differ alike, which a bootstrap would be certain of, it is `alike_interval` for shares
            and None for other numbers. None with fewer than two cases or where something is
            infinite.
        p: two-sided p-value of `test`.
        test: which test it is. McNemar's (exact binomial) where every case is one value, 0 or 1,
            else Wilcoxon's (cases without a difference are left out of the ranks), on the sum of
            a case's differences where it has several. Differences that only the rounding of floats
            makes are none, and those that are equal but for it are tied.
        higher: cases with a higher value in the first.
        lower: cases with a lower one.
        protocol: how both were measured.
        direction: which way is better.
        adjusted: the p-value after Holm's correction, where several were compared.
    """

    metric: str
    a: str
    b: str
    n: int
    value_a: float
    value_b: float
    difference: float
    interval: tuple[float, float] | None
    p: float
    test: str
    higher: int
    lower: int
    protocol: str
    direction: str = "higher"
    adjusted: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data; numbers that are not finite become None."""
        data = dict(vars(self))
        for name in ("value_a", "value_b", "difference"):
            data[name] = finite(data[name])
        data["interval"] = None if self.interval is None else list(self.interval)
        return data

    def __str__(self) -> str:
        low_high = "" if self.interval is None else " [{:.4g}, {:.4g}]".format(*self.interval)
        holm = "" if self.adjusted is None else f", Holm {self.adjusted:.3g}"
        return (
            f"{self.metric}: {self.a} {self.value_a:.4g}, {self.b} {self.value_b:.4g}, difference "
            f"{self.difference:+.4g}{low_high}, p = {self.p:.3g}{holm} "
            f"({self.test}, n={self.n}; {self.protocol})"
        )


def compare(
    a: Measurement, b: Measurement, *, shared: bool = False, labels: tuple[str, str] = ("a", "b")
) -> Comparison:
    """Compare two measurements of one metric, case by case.

    A case that occurs k times in both (several requests of one case) is paired in its order; it
    is one case all the same, and interval and test are over cases. Where it occurs more often in
    one of them, nobody can say which belong together: it is not paired.

    Args:
        a: the first.
        b: the second.
        shared: compare the cases that both have, equally often, and leave out the others.
        labels: what the two are called in the result.

    Raises:
        ComparisonError: another metric or protocol, no values per case, different cases or one
            that occurs more often in one of them, or a case that is not a number.
        MissingExtraError: scipy is not installed.

    >>> a = Measurement.mean("ES", [1, 1, 1, 1, 0, 1], "p: x", case_ids=list("abcdef"))
    >>> b = Measurement.mean("ES", [0, 0, 1, 0, 0, 0], "p: x", case_ids=list("abcdef"))
    >>> result = compare(a, b)
    >>> round(result.difference, 3), result.p, result.higher
    (0.667, 0.125, 4)
    """
    if (a.metric, a.protocol) != (b.metric, b.protocol):
        raise ComparisonError(
            f"{a.metric!r} ({a.protocol}) and {b.metric!r} ({b.protocol}) are not the same thing: "
            "compare one metric, measured by one protocol with one set of settings."
        )
    names, first, second = _paired(a, b, shared, labels)
    differences = first - second
    if bool(np.isnan(differences).any()):
        raise ComparisonError(
            f"{int(np.isnan(differences).sum())} of the {len(first)} cases of {a.metric!r} are "
            "not numbers or infinite in both: they cannot be compared."
        )
    totals = case_totals(differences, names)
    single = len(totals) == len(differences)
    binary = single and all(value in (0.0, 1.0) for value in (*first.tolist(), *second.tolist()))
    totals[:, 0] = sums = _without_rounding(
        totals[:, 0], case_totals(np.maximum(np.abs(first), np.abs(second)), names)[:, 0]
    )
    higher, lower = int((sums > 0).sum()), int((sums < 0).sum())
    return Comparison(
        metric=a.metric,
        a=labels[0],
        b=labels[1],
        n=len(totals),
        value_a=float(first.mean()),
        value_b=float(second.mean()),
        difference=float(sums.sum() / len(differences)),
        interval=_interval(totals, a.unit == "share"),
        p=_mcnemar(higher, lower) if binary else _wilcoxon(sums),
        test=MCNEMAR if binary else WILCOXON,
        higher=higher,
        lower=lower,
        protocol=a.protocol,
        direction=a.direction,
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for having asked several questions (Holm 1979).

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _paired(a: Measurement, b: Measurement, shared: bool, labels: tuple[str, str]) -> Any:
    """Return the names and the values (n,) of both on the same cases, in the first one's order."""
    first, second = _by_case(a, labels[0]), _by_case(b, labels[1])
    often, other = Counter(a.case_ids), Counter(b.case_ids)
    # k-th is paired with k-th only where both have as many: else they are of different evaluations.
    common = [(name, k) for name, k in first if often[name] == other[name]]
    if not common or (not shared and not len(common) == len(first) == len(second)):
        uneven = [name for name in often if 0 < other[name] != often[name]]
        why = (
            f" {uneven[0]!r} occurs {_times(often[uneven[0]])} in {labels[0]} and "
            f"{_times(other[uneven[0]])} in {labels[1]}: which belong together nobody can say."
            if uneven
            else ""
        )
        hint = (
            "compare(…, shared=True) compares those."
            if common
            else "Measure both on the same requests."
        )
        raise ComparisonError(
            f"{a.metric!r}: {labels[0]} has {len(first)} cases and {labels[1]} {len(second)}; "
            f"{len(common)} are shared.{why} {hint}"
        )
    return (
        [name for name, _ in common],
        np.array([first[case] for case in common], dtype=np.float64),
        np.array([second[case] for case in common], dtype=np.float64),
    )


def _without_rounding(differences: Any, sizes: Any) -> Any:
    """Return differences (n,) without what the rounding of floats adds.

    One that is none becomes 0, and those of one size become equal: 0.4 - 0.3 and 0.3 - 0.2 differ
    by 1e-17, and would be no tie.

    Args:
        differences: as computed.
        sizes: (n,) of the numbers that each is the difference of.
    """
    tolerance = np.where(np.isfinite(differences), PRECISION * sizes, 0.0)
    found = np.where(np.abs(differences) <= tolerance, 0.0, np.abs(differences))
    order = np.argsort(found, kind="stable")
    ordered, tolerance = found[order], tolerance[order]
    with np.errstate(invalid="ignore"):  # two infinite ones are no step
        steps = np.diff(ordered) > np.minimum(tolerance[1:], tolerance[:-1])
    first = np.concatenate([[True], steps])  # of each run of equal ones
    found[order] = ordered[first][np.cumsum(first) - 1]
    return np.copysign(found, differences) + 0.0  # none is 0, not -0


def _interval(totals: Any, shares: bool) -> tuple[float, float] | None:
    """Return the interval of the mean difference from (sum, number) of each case's, (n, 2)."""
    means = ratio_of_means(totals)
    if shares and len(means) > 1 and np.ptp(means) <= PRECISION and np.abs(means).max() <= 1:
        return alike_interval(float(means[0]), len(means), -1.0, 1.0)
    return bootstrap(totals, ratio_of_means)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _by_case(item: Measurement, label: str) -> dict[tuple[str, int], float]:
    """Return the values by (case id, how many of this id came before)."""
    if not item.cases or len(item.cases) != len(item.case_ids):
        raise ComparisonError(
            f"{item.metric!r} of {label} has {len(item.cases)} values and {len(item.case_ids)} "
            "case ids: only what was measured case by case can be compared in pairs."
        )
    before: Counter[str] = Counter()
    values = {}
    for case, value in zip(item.case_ids, item.cases, strict=True):
        values[case, before[case]] = value
        before[case] += 1
    return values


def _mcnemar(higher: int, lower: int) -> float:
    stats = _scipy_stats()
    if not higher + lower:
        return 1.0
    return float(stats.binomtest(higher, higher + lower, 0.5).pvalue)


def _wilcoxon(differences: Any) -> float:
    stats = _scipy_stats()
    moved = differences[differences != 0]
    # scipy: exact for few pairs, the normal approximation for many.
    return float(stats.wilcoxon(moved).pvalue) if len(moved) else 1.0


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingExtraError("Comparing measurements", "scipy", "measure") from error
    return stats
