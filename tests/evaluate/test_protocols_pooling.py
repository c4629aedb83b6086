"""Pooling: many evaluations of one case each are one evaluation of all cases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.contract.measurement import wilson
from errata.edits.request import Probe, RelationView, Request
from errata.evaluate import Answer, Measurement, compare, pool
from errata.evaluate.pooling import harmonic_mean
from errata.evaluate.protocols import (
    counterfact,
    easyedit,
    generation,
    knowedit,
    mquake,
    probes,
    rake,
)
from errata.evaluate.reader import KnownAnswers
from tests.evaluate.protocol_stub import ask, score

MEANS = (
    counterfact.PROTOCOL, generation.PROTOCOL, probes.PORTABILITY, probes.LOCALITY,
    easyedit.PROTOCOL, knowedit.PROTOCOL, mquake.PROTOCOL, rake.PROTOCOL,
)  # fmt: skip
SHARES = (0.05, 0.2, 0.5, 0.8)
TEXTS = (" Rome", " Paris", " Rome and", "", " Oslo Oslo Oslo")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[list[Request]], dict[str, Any]]:
    """Return cases of one or two requests, and how an edited model and its base answer."""
    dice = draw(st.randoms(use_true_random=False))
    cases: list[list[Request]] = []
    prompts: list[str] = []
    for case in range(draw(st.integers(1, 4))):
        requests = []
        for part in range(draw(st.integers(1, 2))):
            name = f"{case}.{part}"
            own = {field: [f"{field} {name}"] for field in ("p", "n", "l", "h")}
            asked = {field: found if dice.random() < 0.5 else [] for field, found in own.items()}
            requests.append(
                Request(
                    prompt="{} is",
                    subject=name,
                    target_new="Rome",
                    target_true=dice.choice(["Paris", None]),
                    case_id=str(case),
                    paraphrases=asked["p"],
                    neighbourhood=asked["n"],
                    locality=[Probe(prompt=p, answers=("Paris",), type="t") for p in asked["l"]],
                    portability=[
                        Probe(prompt=f"{p} {way}", answers=("Rome",), type="multi_hop", group=name)
                        for p in asked["h"]
                        for way in "ab"
                    ],
                    relation_view=RelationView(names=("Rome",), add="add {}", remove="rm {}")
                    if dice.random() < 0.5
                    else None,
                )
            )
            prompts += [f"{name} is", f"add {name}", f"rm {name}"]
            prompts += [own[f][0] for f in "pnl"] + [f"{own['h'][0]} {way}" for way in "ab"]
        cases.append(requests)

    def answers() -> dict[str, Any]:
        return {
            "scores": {(p, t): score(dice.choice(SHARES), dice.choice(SHARES)) for p in prompts
                       for t in ("Rome", "Paris", "None")},
            "texts": {p: dice.choice(TEXTS) for p in prompts},
        }  # fmt: skip

    given = answers()
    base = answers()
    samples = {(r.text,): [dice.choice(["a b a b", "a a a"])] for c in cases for r in c}
    return cases, {**given, "base": KnownAnswers(base["texts"], base["scores"]), "samples": samples}


def measured(cases: Sequence[Sequence[Request]], given: dict[str, Any]) -> list[Measurement]:
    requests = [request for case in cases for request in case]
    return [m for protocol in MEANS for m in ask(protocol, requests, **given).values()]


@settings(max_examples=12)
@given(worlds())
def test_pooling_single_cases_is_evaluating_all_at_once(
    world: tuple[list[list[Request]], dict[str, Any]],
) -> None:
    cases, given = world
    together = {(m.metric, m.protocol): m for m in measured(cases, given)}
    pooled = pool([measured([case], given) for case in cases])
    assert {(m.metric, m.protocol) for m in pooled} == set(together)
    for one in pooled:
        whole = together[one.metric, one.protocol]
        assert one.value == pytest.approx(whole.value, abs=1e-12)
        assert (one.n, one.cases, one.case_ids) == (whole.n, whole.cases, whole.case_ids)
        assert (one.unit, one.direction, one.of) == (whole.unit, whole.direction, whole.of)
        assert one.answers == whole.answers
        assert one.interval == pytest.approx(whole.interval, abs=1e-12)


@settings(max_examples=12)
@given(worlds(), st.randoms(use_true_random=False))
def test_values_do_not_depend_on_the_order(
    world: tuple[list[list[Request]], dict[str, Any]], random: Any
) -> None:
    cases, given = world
    groups = [measured([case], given) for case in cases]
    shuffled = list(groups)
    random.shuffle(shuffled)
    one = {(m.metric, m.protocol): m for m in pool(groups)}
    two = {(m.metric, m.protocol): m for m in pool(shuffled)}
    assert {key: m.value for key, m in one.items()} == {key: m.value for key, m in two.items()}
    for key, found in one.items():
        pairs = zip(found.case_ids, found.cases, strict=True)
        assert sorted(pairs) == sorted(zip(two[key].case_ids, two[key].cases, strict=True))


def mean(metric: str, cases: Sequence[float], ids: str = "", **more: Any) -> Measurement:
    return Measurement.mean(metric, cases, "p: x", case_ids=tuple(ids), **more)


def test_means_are_over_all_cases_with_their_interval() -> None:
    answer = Answer("a", "q", ("x",), "x", True, "ES")
    one = pool([[mean("ES", [1, 0, 1], "abc", answers=[answer])], [mean("ES", [0], "d")]])
    assert [m.value for m in one] == [0.5]
    assert one[0].interval == wilson(2, 4)
    assert one[0].case_ids == ("a", "b", "c", "d")
    assert one[0].answers == (answer,)


def test_a_harmonic_mean_is_computed_anew() -> None:
    groups = []
    for case, values in (("a", (1, 1)), ("b", (0, 1)), ("c", (1, 0))):
        parts = [mean(name, [v], case) for name, v in zip(("ES", "PS"), values, strict=True)]
        groups.append([*parts, *harmonic_mean("Score", parts, "p: h")])
    groups.append([mean("ES", [0], "d")])  # has no PS: counts for ES alone
    found = {m.metric: m for m in pool(groups)}
    assert found["ES"].value == 0.5
    assert found["Score"].value == pytest.approx(2 / 3)  # not the mean of 1, 0 and 0
    assert (found["Score"].n, found["Score"].cases) == (3, ())
    again = pool([pool(groups[:2]), pool(groups[2:])])
    assert {m.metric: m.value for m in again} == {m: found[m].value for m in found}


def test_harmonic_means_need_cases_that_have_every_part() -> None:
    assert harmonic_mean("Score", [mean("ES", [1], "a"), mean("PS", [1], "b")], "p: h") == []
    one = harmonic_mean("Score", [mean("ES", [1, 0], "ab"), mean("PS", [0.5], "a")], "p: h")
    assert [(m.n, m.value) for m in one] == [(1, pytest.approx(2 / 3))]


def test_what_is_no_mean_is_averaged_over_the_evaluations_and_says_so() -> None:
    perplexities = [Measurement("perplexity", v, 2, "general: x", cases=(v, 3 * v)) for v in (4, 8)]
    assert pool([[perplexities[0]]]) == [perplexities[0]]
    (one,) = pool([[m] for m in perplexities])
    assert (one.value, one.cases, one.case_ids) == (6, (4.0, 8.0), ())
    assert one.protocol == "general: x; mean over evaluations"
    assert one.name == "general"


def retained(hits: Sequence[float], how: str = "lifelong: x") -> Measurement:
    ids = [f"retain-{i}" for i in range(len(hits))]
    return Measurement.mean("TRR", hits, how, case_ids=ids)


def test_what_asks_every_evaluation_the_same_is_one_value_of_each() -> None:
    # Ten edits of one case each: the first leaves all hundred probes, the others destroy all.
    edits = [
        [mean("ES", [1], name), retained([1.0 if name == "a" else 0.0] * 100)]
        for name in "abcdefghij"
    ]
    found = {one.metric: one for one in pool(edits)}
    assert found["ES"].n == 10
    trr = found["TRR"]
    assert (trr.value, trr.n, trr.case_ids) == (0.1, 10, tuple("abcdefghij"))
    assert trr.interval == wilson(1, 10)  # not that of a thousand independent answers
    assert trr.protocol == "lifelong: x; mean over evaluations"
    assert pool([pool(edits[:5]), pool(edits[5:])])[1] == trr
    other = [[edits[0][0], retained([0.0] * 100)], *edits[1:]]
    pytest.importorskip("scipy", reason="the extra 'measure' is not installed")
    between = compare(trr, pool(other)[1])
    assert (between.n, between.higher, between.p) == (10, 1, 1.0)  # they differ in one edit


def test_evaluations_without_a_case_of_their_own_count_one_value_each() -> None:
    (one,) = pool([[retained([1.0, 1.0, 0.0])], [retained([0.0, 0.0, 0.0])]])
    assert (one.value, one.cases, one.case_ids) == (pytest.approx(1 / 3), (2 / 3, 0.0), ())
    alone = retained([1.0, 0.0])
    assert pool([[alone]]) == [alone]  # of one model the probes are the cases


def test_a_case_that_comes_twice_stays_two_values() -> None:
    (one,) = pool([[mean("ES", [1], "a")], [mean("ES", [0], "a")]])
    assert (one.cases, one.case_ids, one.protocol) == ((1.0, 0.0), ("a", "a"), "p: x")


def test_different_protocols_are_never_mixed() -> None:
    others = [Measurement.mean("ES", [v], how) for v, how in ((1, "p: x"), (0, "p: y"))]
    assert pool([[m] for m in others]) == others
    assert pool([]) == []


def test_numbers_that_are_none_stay_visible() -> None:
    (one,) = pool([[mean("EM", [1.0], "a")], [mean("EM", [math.nan], "b")]])
    assert math.isnan(one.value)
    assert one.n == 2


def test_metrics_keep_their_order() -> None:
    groups = [[mean(m, [1], "a") for m in row] for row in ("AD", "ABD", "BCD", "E")]
    assert [m.metric for m in pool(groups)] == ["A", "B", "C", "D", "E"]


def test_only_a_share_of_successes_has_wilsons_interval() -> None:
    share = Measurement.mean("ES", [1.0, 1.0], "counterfact: share")
    assert share.interval == pytest.approx((0.342, 1.0), abs=1e-3)
    ratio = Measurement.mean("perplexity_ratio", [1.0, 1.0], "general: ratio", unit="ratio")
    assert ratio.interval is None  # no proportion of successes, and two alike prove nothing
