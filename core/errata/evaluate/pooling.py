"""Joining measurements: of many evaluations into one table, of several metrics into one mean."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from errata.contract.measurement import Measurement, bootstrap, mean_interval

OVER_EVALUATIONS = "; mean over evaluations"
"""Ends the protocol of a number that is one value per evaluation, however many it looked at."""


def harmonic(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the harmonic mean of the last axis; 0 where a value is 0."""
    positive = (values > 0).all(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = values.shape[-1] / (1 / values).sum(axis=-1)
    return np.where(positive, means, 0.0)


def harmonic_mean(metric: str, parts: Sequence[Measurement], protocol: str) -> list[Measurement]:
    """Return the harmonic mean of several means, over the cases that all of them have.

    Nothing where no case has them all. It is a number about all cases together and has none of
    its own; `of` names the parts, so that `pool` can compute it anew.
    """
    rows = _joined(parts)
    names = tuple(part.metric for part in parts)
    return [_measured_harmonic(metric, rows, names, protocol, parts[0].unit)] if rows else []


def pool(groups: Iterable[Sequence[Measurement]]) -> list[Measurement]:
    """Join the measurements of many evaluations (one per case, say) into one table.

    Measurements of one metric by one protocol become one. A mean is the mean over the cases of
    all evaluations; a harmonic mean (`of`) is computed anew from the joined cases. What asks every
    evaluation the same (retained probes, the harness's documents) or is no mean (perplexity)
    becomes the mean over the evaluations, each of which is then one case: it has the name of the
    one case that its evaluation is about, where there is one. Its protocol says so.
    Cases keep their ids, metrics their order, and answers come along.

    >>> one, two = (Measurement.mean("ES", [hit], "counterfact: …") for hit in (1, 0))
    >>> pool([[one], [two]])[0].cases
    (1.0, 0.0)
    """
    measured = [list(group) for group in groups]
    found: dict[tuple[str, str], list[Measurement]] = {}
    order: list[tuple[str, str]] = []
    rows: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    for given, group in zip(measured, _of_cases(measured), strict=True):
        by_name = {(one.name, one.metric): one for one in given}
        known = [order.index(key) for key in map(_key, group) if key in found]
        place = known[0] if known else len(order)
        for one in group:
            key = _key(one)
            if key not in found:  # in the order of its own evaluation
                order.insert(place, key)
            place = order.index(key) + 1
            found.setdefault(key, []).append(one)
            parts = [by_name.get((one.name, metric)) for metric in one.of]
            rows.setdefault(key, []).extend(_joined(parts))
    pooled: list[Measurement] = []
    for key in order:
        first = found[key][0]
        if len(found[key]) == 1:
            pooled.append(first)
        elif not first.of:
            pooled.append(_pooled(found[key]))
        elif rows[key]:
            pooled.append(
                _measured_harmonic(first.metric, rows[key], first.of, first.protocol, first.unit)
            )
    return pooled


def of_case(found: Iterable[Measurement], case: str) -> list[Measurement]:
    """Return the measurements of one case's evaluation, each as values of that case.

    A case-independent measurement (of retained probes, texts, documents) is one observation of the
    edited model, however much it asked: it becomes one value under the case's name.
    """
    return [one if one.of or _is_of(one, case) else one_value(one, case) for one in found]


def one_value(one: Measurement, case: str = "") -> Measurement:
    """Return a measurement of a whole evaluation as one value, of `case` where that is known."""
    said = one.protocol.removesuffix(OVER_EVALUATIONS)
    return Measurement.mean(
        one.metric,
        [one.value],
        f"{said}{OVER_EVALUATIONS}",
        case_ids=[case] if case else (),
        unit=one.unit,
        direction=one.direction,
        answers=one.answers,
    )


def _is_of(one: Measurement, case: str) -> bool:
    return one.is_mean and len(one.case_ids) == len(one.cases) and set(one.case_ids) == {case}


def _of_cases(groups: Sequence[Sequence[Measurement]]) -> list[list[Measurement]]:
    """Return the evaluations with one value each for what asked all of them the same."""
    asked: dict[tuple[str, str], list[tuple[int, Measurement]]] = {}
    for place, group in enumerate(groups):
        for one in group:
            if one.case_ids and not one.of:
                asked.setdefault(_key(one), []).append((place, one))
    same = {
        key
        for key, many in asked.items()
        if len(many) > 1 and all(one.case_ids == many[0][1].case_ids for _, one in many)
    }
    shared = {name for key in same for name in asked[key][0][1].case_ids}
    own: list[set[str]] = [
        {name for one in group if not one.of for name in one.case_ids} - shared for group in groups
    ]
    names = ["".join(found) if len(found) == 1 else "" for found in own]
    for key in list(same):
        ids = asked[key][0][1].case_ids
        better = {names[place] for place, _ in asked[key]} - set(ids)
        if len(ids) == 1 and (not better or "" in better):  # maybe a case that comes twice
            same.discard(key)
    return [
        [one_value(one, name) if _key(one) in same else one for one in group]
        for name, group in zip(names, groups, strict=True)
    ]


def _key(one: Measurement) -> tuple[str, str]:
    return one.metric, one.protocol


def _pooled(many: Sequence[Measurement]) -> Measurement:
    """Return the mean over all cases, or over the evaluations where it is no mean of cases."""
    first = many[0]
    joins = all(one.is_mean for one in many)
    named = joins and all(one.case_ids for one in many)
    return Measurement.mean(
        first.metric,
        [value for one in many for value in (one.cases if joins else (one.value,))],
        first.protocol if joins else f"{first.protocol}{OVER_EVALUATIONS}",
        case_ids=[name for one in many for name in one.case_ids] if named else (),
        unit=first.unit,
        direction=first.direction,
        answers=[answer for one in many for answer in one.answers],
    )


def _joined(parts: Sequence[Measurement | None]) -> list[tuple[float, ...]]:
    """Return the values of the cases that every part has: a row per case, a column per part."""
    columns = []
    for part in parts:
        if part is None or len(part.case_ids) != len(part.cases):
            return []
        before: Counter[str] = Counter()
        column = {}
        for name, value in zip(part.case_ids, part.cases, strict=True):
            column[name, before[name]] = value
            before[name] += 1
        columns.append(column)
    shared = (
        [name for name in columns[0] if all(name in column for column in columns)]
        if columns
        else []
    )
    return [tuple(column[name] for column in columns) for name in shared]


def _measured_harmonic(
    metric: str,
    rows: Sequence[tuple[float, ...]],
    of: tuple[str, ...],
    protocol: str,
    unit: str,
) -> Measurement:
    # Exact sums: the value does not depend on the order of the cases.
    means = np.array([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)])
    interval = bootstrap(np.array(rows, dtype=np.float64), harmonic)
    if interval is None and len(rows) > 1:
        interval = _of_ends(rows)
    return Measurement(
        metric, float(harmonic(means)), len(rows), protocol, interval, unit=unit, of=of
    )


def _of_ends(rows: Sequence[tuple[float, ...]]) -> tuple[float, float] | None:
    """Return the interval of a harmonic mean from those of its parts, where resampling has none.

    The mean rises with each part, so it lies between that of all lower and that of all upper ends.
    """
    shares = all(0 <= value <= 1 for row in rows for value in row)
    ends = [mean_interval(column, shares=shares) for column in zip(*rows, strict=True)]
    if not shares or None in ends:
        return None
    low, high = harmonic(np.array(ends, dtype=np.float64).T)
    return float(low), float(high)
