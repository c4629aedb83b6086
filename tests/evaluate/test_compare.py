"""Comparing two measurements of the same cases."""

from __future__ import annotations

import builtins
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.contract.measurement import Measurement, wilson
from errata.errors import ComparisonError, MissingExtraError
from errata.evaluate.compare import MCNEMAR, WILCOXON, compare, holm

pytest.importorskip("scipy", reason="the extra 'measure' is not installed")


def shares(values: list[float], ids: list[str] | None = None, **more: Any) -> Measurement:
    names = [f"c{i}" for i in range(len(values))] if ids is None else ids
    return Measurement.mean(more.pop("metric", "ES"), values, "p: how", case_ids=names, **more)


def test_mcnemar_counts_the_cases_that_differ() -> None:
    # 8 cases right in the first only, 1 in the second only, 11 alike: the p-value is
    # 2 · (C(9,0) + C(9,1)) / 2⁹ = 20 / 512.
    a = shares([1.0] * 8 + [0.0] + [1.0] * 6 + [0.0] * 5)
    b = shares([0.0] * 8 + [1.0] + [1.0] * 6 + [0.0] * 5)
    found = compare(a, b)
    assert found.test == MCNEMAR
    assert found.p == pytest.approx(20 / 512)
    assert (found.higher, found.lower, found.n) == (8, 1, 20)
    assert (found.value_a, found.value_b) == (0.7, 0.35)
    assert found.difference == pytest.approx(0.35)
    low, high = found.interval or (0, 0)
    # The standard error of the paired difference: √((9 - 7²/20) / 20 / 20) = 0.128.
    assert low == pytest.approx(0.35 - 1.96 * 0.128, abs=0.06)
    assert high == pytest.approx(0.35 + 1.96 * 0.128, abs=0.06)


def test_wilcoxon_ranks_the_differences() -> None:
    # Only the smallest of six differences is negative: W⁻ = 1, and 2 of the 2⁶ signs give that
    # or less, so that p = 2 · 2 / 64.
    a = shares([0.1, 0.4, 0.5, 0.8, 0.9, 1.1], unit="nats", direction="lower")
    b = shares([0.2, 0.2, 0.2, 0.4, 0.4, 0.5], unit="nats", direction="lower")
    found = compare(a, b)
    assert found.test == WILCOXON
    assert found.p == pytest.approx(4 / 64)
    assert (found.higher, found.lower, found.direction) == (5, 1, "lower")


def test_wilcoxon_with_zeros_and_ties_is_exact_for_few_cases() -> None:
    # Seven differences that are not zero, 1, 1, 2, 3, -1, 4, 5, have the ranks 2, 2, 4, 5, 2, 6, 7.
    # W⁻ = 2: of the 2⁷ signs none negative, or one of the three that share rank 2, give no more.
    a = shares([2.0, 3.0, 5.0, 7.0, 1.0, 9.0, 11.0, 4.0, 5.0], unit="bits")
    b = shares([1.0, 2.0, 3.0, 4.0, 2.0, 5.0, 6.0, 4.0, 5.0], unit="bits")
    assert compare(a, b).p == pytest.approx(2 * 4 / 128)


def test_wilcoxon_of_many_cases_is_the_normal_approximation() -> None:
    n = 300
    signed = [rank * (-1.0 if rank % 5 in (0, 1) else 1.0) for rank in range(1, n + 1)]
    negative = -sum(value for value in signed if value < 0)
    z = (negative - n * (n + 1) / 4) / math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    found = compare(shares(signed, unit="bits"), shares([0.0] * n, unit="bits"))
    assert found.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), rel=0.02)


def test_equal_measurements_do_not_differ() -> None:
    for values in ([1.0, 0.0, 1.0], [0.5, 0.25, 0.125]):
        found = compare(shares(values), shares(values))
        assert (found.p, found.difference) == (1.0, 0.0)


def test_cases_that_differ_alike_prove_no_more_than_so_many_can() -> None:
    low, high = wilson(4, 4)
    found = compare(shares([1.0] * 4), shares([0.0] * 4))
    assert found.interval == pytest.approx((low - (1 - low), high))
    none = compare(shares([0.5, 1.0, 0.0, 1.0]), shares([0.5, 1.0, 0.0, 1.0]))
    assert none.interval == pytest.approx((low - 1, 1 - low))
    tenth = compare(shares([0.4, 0.3, 0.2, 1.0]), shares([0.3, 0.2, 0.1, 0.9]))
    assert tenth.interval == pytest.approx((0.1 * low - (1 - low), 0.1 * low + (1 - low)))
    bits = compare(shares([2.0] * 4, unit="bits"), shares([1.0] * 4, unit="bits"))
    assert (bits.difference, bits.interval) == (1.0, None)


def test_the_rounding_of_floats_makes_no_difference() -> None:
    found = compare(shares([(0.1 + 0.2) / 2] * 8), shares([0.15] * 8))
    assert (found.p, found.difference, found.higher, found.lower) == (1.0, 0.0, 0, 0)
    assert "difference +0 " in str(compare(shares([0.15] * 8), shares([(0.1 + 0.2) / 2] * 8)))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 10)), min_size=1, max_size=40))
def test_shares_in_tenths_are_ranked_like_whole_numbers(counts: list[tuple[int, int]]) -> None:
    # 0.4 - 0.3 and 0.3 - 0.2 are not one float, and are a tie all the same.
    tenths = compare(*(shares([count[side] / 10 for count in counts]) for side in (0, 1)))
    whole = compare(*(shares([count[side] for count in counts], unit="bits") for side in (0, 1)))
    assert (tenths.higher, tenths.lower) == (whole.higher, whole.lower)
    if tenths.test == whole.test == WILCOXON:
        assert tenths.p == pytest.approx(whole.p)


def test_a_small_difference_beside_an_enormous_one_is_still_there() -> None:
    a = shares([1e30, 0.5, 0.25], unit="perplexity")
    b = shares([1.0, 0.4, 0.35], unit="perplexity")
    assert (compare(a, b).higher, compare(a, b).lower) == (2, 1)


def test_edits_of_one_case_are_no_independent_samples() -> None:
    # Twelve chains of four edits made in one call: six chains are recalled whole, six not at all.
    ids = [f"c{i}" for i in range(12) for _ in range(4)]
    hits = [float(i < 6) for i in range(12) for _ in range(4)]
    measured = shares(hits, ids)
    assert (measured.value, measured.n) == (0.5, 48)
    low, high = measured.interval or (0, 0)
    # The standard error over 12 cases is .144; over 48 edits it would be half of that.
    assert (low, high) == pytest.approx((0.5 - 0.28, 0.5 + 0.28), abs=0.06)
    assert shares([1.0] * 6, ["a", "a", "a", "b", "b", "b"]).interval == shares([1, 1]).interval
    found = compare(measured, shares([0.0] * 48, ids))
    assert (found.test, found.n, found.higher, found.difference) == (WILCOXON, 12, 6, 0.5)
    assert found.p == pytest.approx(2 / 64)
    assert (found.interval or (1, 1))[0] < 0.3


def test_cases_are_paired_by_name_and_not_by_place() -> None:
    a = shares([1.0, 0.0, 0.5], ["x", "y", "z"])
    b = shares([0.5, 1.0, 0.0], ["z", "x", "y"])
    assert compare(a, b).difference == 0.0
    assert compare(a, b).higher == 0


def test_several_requests_of_one_case_are_paired_in_their_order() -> None:
    a = shares([1.0, 0.0, 1.0], ["x", "x", "y"])
    b = shares([1.0, 1.0, 1.0], ["x", "y", "x"])
    found = compare(a, b)
    assert (found.n, found.lower, found.value_a) == (2, 1, 2 / 3)


def test_a_case_that_occurs_more_often_in_one_is_not_paired() -> None:
    # Ten evaluations of one probe are ten observations of ten models: the base has one of them.
    a = shares([1.0, 0.0, 1.0], ["x", "x", "y"])
    b = shares([1.0, 1.0], ["x", "y"])
    with pytest.raises(ComparisonError, match=r"1 are shared. 'x' occurs 2 times in a and once"):
        compare(a, b)
    assert compare(a, b, shared=True).n == 1  # y alone
    with pytest.raises(ComparisonError, match="which belong together nobody can say"):
        compare(shares([1.0, 0.0], ["x", "x"]), shares([1.0], ["x"]), shared=True)


def test_other_cases_are_an_error_that_counts_them() -> None:
    a, b = shares([1.0, 0.0, 1.0]), shares([1.0, 0.0], ["c1", "elsewhere"])
    with pytest.raises(ComparisonError, match=r"a has 3 cases and b 2; 1 are shared.*shared=True"):
        compare(a, b)
    found = compare(a, b, shared=True)
    assert (found.n, found.value_a, found.value_b) == (1, 0.0, 1.0)
    assert found.interval is None
    with pytest.raises(ComparisonError, match=r"0 are shared.* Measure both"):
        compare(a, shares([1.0], ["elsewhere"]), shared=True)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Measurement.mean("PS", [1.0, 1.0], "p: how", case_ids=["c0", "c1"]), "not the same thing"),
        (Measurement.mean("ES", [1.0, 1.0], "p: why", case_ids=["c0", "c1"]), "not the same thing"),
        (Measurement.mean("ES", [1.0, 1.0], "p: how"), "2 values and 0 case ids"),
        (Measurement.mean("ES", [1.0, math.nan], "p: how", case_ids=["c0", "c1"]), "1 of the 2"),
    ],
)
def test_what_cannot_be_compared_is_refused(other: Measurement, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(shares([1.0, 0.5]), other)


def test_a_collapse_is_compared_though_its_mean_is_infinite() -> None:
    names = ["c0", "c1", "c2"]
    a = Measurement("perplexity", math.inf, 3, "p: how", None, (3.0, math.inf, 4.0), tuple(names))
    b = Measurement("perplexity", 2.0, 3, "p: how", None, (2.0, 2.0, 2.0), tuple(names))
    found = compare(a, b)
    assert (found.higher, found.difference, found.interval) == (3, math.inf, None)
    assert json.loads(json.dumps(found.as_json(), allow_nan=False))["difference"] is None


def test_holm_against_the_definition() -> None:
    # 4·0.005, 3·0.01, 2·0.03, 1·0.04 in order of size, each at least the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_the_order_and_never_helps(values: list[float]) -> None:
    adjusted = holm(values)
    assert all(p <= q <= 1 for p, q in zip(values, adjusted, strict=True))
    pairs = sorted(zip(values, adjusted, strict=True))
    assert [q for _, q in pairs] == sorted(adjusted)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"errata\[measure\]"):
        compare(shares([1.0, 0.0]), shares([0.0, 0.0]))
