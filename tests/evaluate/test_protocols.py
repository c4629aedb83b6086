"""The protocols, on models whose answers are given: every number is computed by hand."""

from __future__ import annotations

import doctest
import math
from typing import Any

import pytest

from errata.contract import measurement
from errata.edits.cases import requests_of
from errata.edits.edit import Edit
from errata.edits.request import Probe, Request
from errata.evaluate import Measurement, failures, fluency, pooling
from errata.evaluate.protocols import (
    calibration,
    counterfact,
    easyedit,
    generation,
    ke,
    knowedit,
    lifelong,
    mquake,
    sanitation,
)
from errata.evaluate.protocols import probes as protocols_of_probes
from errata.evaluate.protocols.lifelong import token_f1
from errata.evaluate.reader import KnownAnswers
from errata.model.answers import TargetScore
from tests.evaluate.protocol_stub import ask, score, values


def approx(found: dict[str, float]) -> Any:
    return pytest.approx(found, abs=1e-12)


def fact(subject: str = "France", **more: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": "Rome",
        "target_true": "Paris",
        "case_id": subject,
        **more,
    }
    return Request(**fields)


# -- counterfact ---------------------------------------------------------------------------------


def test_counterfact_by_hand() -> None:
    request = fact(
        paraphrases=["p1", "p2"], neighbourhood=["n1", "n2"], attribute=["a1", "a2"],
    )  # fmt: skip
    scores = {
        ("The capital of France is", "Rome"): score(0.4, 0.1),  # length-normalised: 0.2
        ("The capital of France is", "Paris"): score(0.1),
        ("p1", "Rome"): score(0.5), ("p1", "Paris"): score(0.25),
        ("p2", "Rome"): score(0.125), ("p2", "Paris"): score(0.25),
        ("n1", "Rome"): score(0.1), ("n1", "Paris"): score(0.6),
        ("n2", "Rome"): score(0.2), ("n2", "Paris"): score(0.3),
        ("a1", "Rome"): score(math.exp(-1)), ("a1", "Paris"): score(math.exp(-3)),
        ("a2", "Rome"): score(math.exp(-2)), ("a2", "Paris"): score(math.exp(-4), math.exp(-6)),
    }  # fmt: skip
    found = ask(counterfact.PROTOCOL, [request], scores=scores)
    assert values(found) == approx({
        "ES": 1, "EM": 0.1, "PS": 0.5, "PM": (0.25 - 0.125) / 2, "NS": 1, "NM": 0.3,
        "Score": 3 / (1 + 2 + 1), "attribute_nll_new": 1.5, "attribute_nll_true": 4,
    })  # fmt: skip
    assert found["Score"].of == ("ES", "PS", "NS")
    assert found["attribute_nll_new"].unit == "nats"


def test_calibration_by_hand() -> None:
    known = fact(counterexamples=["w1", "w2"])
    false = fact("Spain", counterexamples=["w3"])
    scores = {
        (known.text, "Rome"): score(0.4, 0.001),  # the first token counts
        ("w1", "Rome"): score(0.1), ("w2", "Rome"): score(0.3, 0.9),
        (false.text, "Rome"): score(0.1), ("w3", "Rome"): score(0.2),
    }  # fmt: skip
    found = ask(calibration.PROTOCOL, [known, false, fact("Peru")], scores=scores)
    assert values(found) == approx({
        "false_rate": 0.5, "log_CKA": (math.log(0.4 / 0.2) + math.log(0.1 / 0.2)) / 2,
    })  # fmt: skip
    assert found["false_rate"].direction == "lower"
    assert ask(calibration.PROTOCOL, [fact()], scores={}) == {}


def test_the_score_is_over_the_requests_that_have_all_three() -> None:
    full = fact(paraphrases=["p"], neighbourhood=["n"])
    bare = fact("Spain")
    scores = {
        (prompt, target): score(0.5 if target == "Rome" else 0.25)
        for prompt in (full.text, bare.text, "p", "n")
        for target in ("Rome", "Paris")
    }
    scores[bare.text, "Rome"] = score(0.1)
    found = ask(counterfact.PROTOCOL, [bare, full], scores=scores)
    assert found["ES"].value == 0.5
    assert found["Score"].n == 1
    assert found["Score"].value == 0  # NS of the only full one is 0
    apart = [fact(paraphrases=["p"]), fact("Spain", neighbourhood=["n"])]
    without = ask(counterfact.PROTOCOL, apart, scores=scores)
    assert "Score" not in without  # no request has all three


def test_a_neighbour_is_held_to_its_own_answer() -> None:
    request = fact(neighbourhood=[Probe(prompt="n", answers=("Oslo", "Kristiania"))])
    scores = _anything(request) | {
        ("n", "Oslo"): score(0.1), ("n", "Kristiania"): score(0.6), ("n", "Rome"): score(0.5),
    }  # fmt: skip
    found = ask(counterfact.PROTOCOL, [request], scores=scores)
    assert found["NS"].value == 1
    assert found["NM"].value == pytest.approx(0.1)


def test_a_request_whose_targets_are_the_same_compares_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = fact(paraphrases=["p"])
    beside = [Probe(prompt="n"), Probe(prompt="own", answers=("Oslo",))]
    same = fact("Spain", target_true="Rome", paraphrases=["q"], neighbourhood=beside)
    scores = {
        (prompt, target): score(0.5 if target == "Rome" else 0.25)
        for prompt in (plain.text, same.text, "p", "q", "n", "own")
        for target in ("Rome", "Paris", "Oslo")
    }
    found = ask(counterfact.PROTOCOL, [plain, same], scores=scores)
    assert (found["ES"].value, found["ES"].n) == (1, 1)
    assert (found["PS"].value, found["PS"].n) == (1, 1)
    assert (found["NS"].value, found["NS"].n) == (0, 1)  # the neighbour with an answer of its own
    assert "1 of 2 requests have the new target as the true one" in caplog.text
    assert not {"ES", "PS"} & set(ask(counterfact.PROTOCOL, [same], scores=scores))


def test_requests_that_share_a_case_id_are_one_case() -> None:
    requests = [fact(s, case_id=c) for s, c in (("France", "1"), ("Spain", "1"), ("Peru", "2"))]
    scores = {
        (request.text, target): score(p if target == "Rome" else 0.25)
        for request, p in zip(requests, (0.5, 0.1, 0.5), strict=True)
        for target in ("Rome", "Paris")
    }
    found = ask(counterfact.PROTOCOL, requests, scores=scores)["ES"]
    assert (found.case_ids, found.cases) == (("1", "2"), (0.5, 1.0))


def test_consistency_is_the_cosine_of_tf_idf_vectors() -> None:
    one = fact(generation=["France"], references=["rome river"])
    two = fact("Spain", generation=["Spain"], references=["rome hill"])
    samples = {("France",): ["rome rome river"], ("Spain",): ["unheard words"]}
    found = ask(counterfact.PROTOCOL, [one, two], samples=samples, scores=_anything(one, two))["RS"]
    # Two documents: idf = ln(3 / (1 + df)) + 1, rome in both, river in one.
    rome, river = 1.0, math.log(1.5) + 1
    said, meant = (2 * rome, river), (rome, river)
    cosine = (said[0] * meant[0] + said[1] * meant[1]) / math.hypot(*said) / math.hypot(*meant)
    assert found.cases == pytest.approx((cosine, 0.0))
    assert found.unit == "cosine"
    # Fitted on given texts, a case does not depend on the others.
    given = {"references": ("rome river", "rome hill")}
    alone = ask(counterfact.PROTOCOL, [one], samples=samples, scores=_anything(one), **given)["RS"]
    assert alone.cases == pytest.approx((cosine,))
    assert "given" in alone.protocol


def test_consistency_needs_references_and_words() -> None:
    samples = {("France",): ["rome"]}
    for references in ([], ["? !"]):
        request = fact(generation=["France"], references=references)
        found = ask(counterfact.PROTOCOL, [request], samples=samples, scores=_anything(request))
        assert "GE" in found
        assert "RS" not in found


def _anything(*requests: Request) -> dict[tuple[str, str], Any]:
    return {(r.text, t): score(0.5) for r in requests for t in ("Rome", "Paris")}


# -- generation, probes --------------------------------------------------------------------------


def test_answers_come_with_what_is_wrong_with_them() -> None:
    request = fact(paraphrases=["p"], neighbourhood=[Probe(prompt="n", answers=("Oslo",))])
    texts = {request.text: " Rome.", "p": " Paris", "n": " Rome"}
    scores = {(request.text, "Rome"): score(0.5), ("p", "Rome"): score(0.5, 0.1),
              ("n", "Oslo"): score(0.1)}  # fmt: skip
    found = ask(generation.PROTOCOL, [request], texts=texts, scores=scores)
    assert values(found) == {
        "rewrite_exact": 1, "rewrite_contained": 1, "rewrite_teacher_forced": 1,
        "paraphrase_exact": 0, "paraphrase_contained": 0, "paraphrase_teacher_forced": 0,
        "neighbourhood_exact": 0, "neighbourhood_contained": 0, "neighbourhood_teacher_forced": 0,
    }  # fmt: skip
    (right,), (wrong,), (leaked,) = (
        found[f"{stem}_exact"].answers for stem in ("rewrite", "paraphrase", "neighbourhood")
    )
    assert (right.case_id, right.text, right.right, right.error) == ("France", " Rome.", True, "")
    assert (wrong.prompt, wrong.expected, wrong.error) == ("p", ("Rome",), "knowledge_irrelevant")
    assert (leaked.expected, leaked.metric) == (("Oslo",), "neighbourhood_exact")
    assert not found["rewrite_contained"].answers


def test_phrasings_of_one_question_are_right_if_any_is() -> None:
    request = fact(portability=[
        Probe(prompt="a", answers=("Tiber",), type="two_hop", group="river"),
        Probe(prompt="b", answers=("Tiber",), type="two_hop", group="river"),
        Probe(prompt="c", answers=("Tiber",), type="two_hop"),
    ])  # fmt: skip
    texts = {"a": " Seine", "b": " Tiber", "c": " the Tiber"}
    scores = {(p, "Tiber"): score(0.9 if p == "a" else 0.1) for p in "abc"}
    found = ask(protocols_of_probes.PORTABILITY, [request], texts=texts, scores=scores)
    assert values(found) == {
        "portability_exact": 0.5, "portability_exact.two_hop": 0.5,
        "portability_contained": 1, "portability_contained.two_hop": 1,
        "portability_teacher_forced": 0.5, "portability_teacher_forced.two_hop": 0.5,
    }  # fmt: skip
    answers = found["portability_exact"].answers
    assert [(a.prompt, a.right) for a in answers] == [("b", True), ("c", False)]
    assert answers[1].error == "partial_replacement"  # the answer among other words
    # A group is a question of its own case: the same name in another case is another question.
    other = fact("Spain", portability=[Probe(prompt="c", answers=("Tiber",), group="river")])
    both = ask(protocols_of_probes.PORTABILITY, [request, other], texts=texts, scores=scores)
    assert both["portability_exact"].cases == (0.5, 0)


def test_unchanged_is_relative_to_the_base_and_needs_one() -> None:
    request = fact(locality=[Probe(prompt="l1", type="x"), Probe(prompt="l2", type="y")])
    texts = {"l1": " one", "l2": " two"}
    assert ask(protocols_of_probes.LOCALITY, [request], texts=texts) == {}
    base = KnownAnswers({"l1": " one ", "l2": " three"})
    found = ask(protocols_of_probes.LOCALITY, [request], texts=texts, base=base)
    assert values(found) == {
        "locality_unchanged": 0.5, "locality_unchanged.x": 1, "locality_unchanged.y": 0,
    }  # fmt: skip


# -- easyedit ------------------------------------------------------------------------------------


def test_easyedit_counts_tokens() -> None:
    request = fact(
        paraphrases=["p1", "p2"],
        portability=[Probe(prompt="q", answers=("Tiber", "the Tiber"), type="reasoning")],
        locality=[Probe(prompt="l", answers=("Italy",), type="forgetfulness"),
                  Probe(prompt="m", answers=("Italy",), type="forgetfulness")],
        neighbourhood=["n"],
    )  # fmt: skip
    yes, no = True, False
    scores = {
        (request.text, "Rome"): score(0.1, 0.1, right=[yes, no]),
        ("p1", "Rome"): score(0.1, 0.1, right=[yes, yes]),
        ("p2", "Rome"): score(0.1, 0.1, right=[no, no]),
        ("q", "Tiber"): score(0.1, 0.1, 0.1, 0.1, right=[yes, yes, yes, no]),  # the first alone
        ("l", "Italy"): score(0.1, 0.1, right=[yes, no]),
        ("m", "Italy"): score(0.1, right=[no]),
        ("n", "Paris"): score(0.1, right=[no]),
    }
    samples = {(request.text,): ["a b a b"]}
    alone = ask(easyedit.PROTOCOL, [request], scores=scores, samples=samples)
    assert values(alone) == approx({
        "rewrite_acc": 0.5, "rephrase_acc": 0.5, "portability.reasoning_acc": 0.75,
        # Bigrams ab ab ba: H2 = 0.9183 bits; trigrams aba bab: H3 = 1 bit.
        "fluency": (2 / 3 * (math.log2(3) - 2 / 3) + 4 / 3 * 1) / 2,
    })  # fmt: skip
    base = KnownAnswers({}, {
        ("l", "Italy"): score(0.1, 0.1, right=[yes, yes]),
        ("m", "Italy"): score(0.1, right=[no]),  # as wrong as before: unchanged
        ("n", "Paris"): score(0.1, right=[yes]),
    })  # fmt: skip
    edited = ask(easyedit.PROTOCOL, [request], scores=scores, samples=samples, base=base)
    extra = {name: one.value for name, one in edited.items() if name not in alone}
    assert extra == {"locality.forgetfulness_acc": 0.75, "locality.neighbourhood_acc": 0}


# -- ke ------------------------------------------------------------------------------------------


RETAIN = (
    Probe(prompt="r1", answers=("Spain",)),
    Probe(prompt="r2", answers=("Peru",)),
    Probe(prompt="r3", answers=("Chile",)),
    Probe(prompt="r4"),
)


def test_ke_by_hand() -> None:
    request = fact(paraphrases=["p1", "p2"])
    texts = {request.text: " Rome", "p1": " rome.", "p2": " Paris",
             "r1": " Spain", "r2": " nothing", "r3": " Chile", "r4": " x"}  # fmt: skip
    base = KnownAnswers({"r1": "  SPAIN", "r2": " Peru", "r3": " Chile", "r4": " y"})
    found = ask(ke.PROTOCOL, [request], texts=texts, base=base, retain=RETAIN)
    assert values(found) == approx({
        "success_rate": 1, "equivalence_accuracy": 0.5,
        "retain_accuracy": 0.5,  # r1 (but for case and spaces) and r3
        "performance_deterioration": 1 - (2 / 3) / 1,
    })  # fmt: skip
    assert found["performance_deterioration"].direction == "lower"
    assert [a.right for a in found["equivalence_accuracy"].answers] == [True, False]
    alone = ask(ke.PROTOCOL, [request], texts=texts, retain=RETAIN)
    assert set(alone) == {"success_rate", "equivalence_accuracy"}


def test_ke_without_a_right_answer_of_the_base_has_no_deterioration() -> None:
    texts = {fact().text: " Rome", "r1": " Spain"}
    found = ask(
        ke.PROTOCOL, [fact()], texts=texts, base=KnownAnswers({"r1": " Peru"}), retain=RETAIN[:1]
    )
    assert "performance_deterioration" not in found
    assert found["retain_accuracy"].value == 0


def test_ke_falls_back_on_the_requests_own_probes() -> None:
    request = fact(neighbourhood=["n"], locality=[Probe(prompt="l", answers=("Italy",))])
    texts = {request.text: " Rome", "n": " Paris", "l": " Spain"}
    base = KnownAnswers({"n": " Paris", "l": " Italy"})
    found = ask(ke.PROTOCOL, [request], texts=texts, base=base)
    assert found["retain_accuracy"].value == 0.5
    assert found["performance_deterioration"].value == 0.5  # n still has its true target


def test_ke_of_an_encoder_compares_predicted_tokens() -> None:
    request = fact(paraphrases=["p"])
    scores = {(request.text, "Rome"): score(0.9), ("p", "Rome"): score(0.9, 0.1),
              ("r1", "Spain"): score(0.9), ("r2", "Peru"): score(0.1),
              ("r3", "Chile"): score(0.1)}  # fmt: skip
    base = KnownAnswers({}, {("r1", "Spain"): score(0.9), ("r2", "Peru"): score(0.1),
                       ("r3", "Chile"): score(0.9)})  # fmt: skip
    found = ask(ke.PROTOCOL, [request], scores=scores, base=base, kind="encoder", retain=RETAIN)
    assert values(found) == approx({
        "success_rate": 1, "equivalence_accuracy": 0, "retain_accuracy": 2 / 3,
        "performance_deterioration": 0.5,
    })  # fmt: skip


# -- lifelong ------------------------------------------------------------------------------------


def test_lifelong_by_hand() -> None:
    one, two = fact(), fact("Spain", target_new="New Rome")
    texts = {one.text: " Rome", two.text: " Rome hill town", "r1": " Spain", "r2": " Chile"}
    scores = {
        (one.text, "Rome"): score(0.9), (two.text, "New Rome"): score(0.1, 0.9),
        ("r1", "Spain"): score(0.9), ("r2", "Peru"): score(0.1),
    }  # fmt: skip
    base = KnownAnswers({"r1": " Spain", "r2": " Peru"})
    found = ask(lifelong.PROTOCOL, [one, two], texts=texts, scores=scores, base=base,
                retain=RETAIN[:2])  # fmt: skip
    assert values(found) == approx({
        "ERR": 0.75, "ERR_f1": (1 + 2 * 1 / (3 + 2)) / 2, "ERR_exact": 0.5, "ERR_contained": 0.5,
        "ERR_teacher_forced": 0.5, "TRR": 0.5, "TRR_f1": 0.5, "TRR_exact": 0.5,
        "TRR_contained": 0.5, "TRR_teacher_forced": 0.5, "TRR_unchanged": 0.5,
    })  # fmt: skip
    assert found["TRR"].n == 2  # each retained probe is a case
    assert found["ERR_exact"].answers[1].error == "partial_replacement"
    without = ask(lifelong.PROTOCOL, [one, two], texts=texts, scores=scores)
    assert not any(name.startswith("TRR") for name in without)


def test_the_perplexity_of_long_texts() -> None:
    request = fact(kind="text")
    scores = {(request.text, "Rome"): score(0.5, 0.125)}
    found = ask(lifelong.PROTOCOL, [request], texts={request.text: ""}, scores=scores)
    assert found["ERR_perplexity"].value == pytest.approx(4)
    assert found["ERR_perplexity"].direction == "lower"
    sure = {(request.text, "Rome"): TargetScore((0,), (-1000.0,), (1,))}
    found = ask(lifelong.PROTOCOL, [request], texts={request.text: ""}, scores=sure)
    assert found["ERR_perplexity"].value == math.inf


def test_an_answer_longer_than_the_text_may_be_is_not_asked_by_generation() -> None:
    long = " ".join(["word"] * 5)
    texts_, short = (fact(kind="text", target_new=long), fact("Spain", kind="text"))
    scores = {(texts_.text, long): score(0.9), (short.text, "Rome"): score(0.9)}
    texts = {short.text: " Rome", texts_.text: " word word"}
    found = ask(knowedit.PROTOCOL, [texts_, short], texts=texts, scores=scores,
                max_new_tokens=4, leave_out=("fluency",))  # fmt: skip
    exact = found["edit_success_exact"]
    assert (exact.value, exact.n, found["edit_success_contained"].n) == (1, 1, 1)
    assert exact.protocol.endswith("questions whose answers are all longer left out")
    assert found["edit_success_teacher_forced"].n == 2
    alone = ask(knowedit.PROTOCOL, [texts_], texts=texts, scores=scores, max_new_tokens=4,
                leave_out=("fluency",))  # fmt: skip
    assert "edit_success_exact" not in alone
    usual = ask(knowedit.PROTOCOL, [fact(target_new=long)], texts={texts_.text: " Rome"},
                scores=scores, max_new_tokens=4, leave_out=("fluency",))  # fmt: skip
    assert "longer" not in usual["edit_success_exact"].protocol
    whole = ask(knowedit.PROTOCOL, [texts_], texts=texts, scores=scores, max_new_tokens=5,
                leave_out=("fluency",))  # fmt: skip
    assert whole["edit_success_exact"].value == 0


def test_token_f1() -> None:
    assert token_f1(frozenset({1, 2}), frozenset({2, 3, 4})) == pytest.approx(2 / 5)
    assert token_f1(frozenset(), frozenset({1})) == 0


# -- mquake --------------------------------------------------------------------------------------


def test_mquake_by_hand() -> None:
    hop = [Probe(prompt=q, answers=("Lira", "ITL"), type="multi_hop", group="1") for q in "abc"]
    kept = Probe(prompt="k", answers=("Europe",), type="single_hop")
    first = fact(case_id="1", portability=hop, locality=[kept])
    second = fact("Spain", case_id="1", target_new="Oslo")
    third = fact("Peru", case_id="2")
    texts = {first.text: " Rome", second.text: " Oslo town", third.text: " Rome",
             "a": " Euro", "b": " ITL", "c": " Euro", "k": " Asia"}  # fmt: skip
    scores = {
        **{(q, a): score(0.1) for q in "abc" for a in ("Lira", "ITL")},
        (first.text, "Rome"): score(0.9), (second.text, "Oslo"): score(0.9),
        (third.text, "Rome"): score(0.1), ("k", "Europe"): score(0.9),
    }  # fmt: skip
    found = ask(mquake.PROTOCOL, [first, second, third], texts=texts, scores=scores)
    assert values(found) == approx({
        "multi_hop_exact": 1, "multi_hop_exact.multi_hop": 1,
        "multi_hop_contained": 1, "multi_hop_contained.multi_hop": 1,
        "multi_hop_teacher_forced": 0, "multi_hop_teacher_forced.multi_hop": 0,
        "edit_wise_exact": 2 / 3, "edit_wise_contained": 1, "edit_wise_teacher_forced": 2 / 3,
        "all_edits_exact": 0.5, "all_edits_contained": 1, "all_edits_teacher_forced": 0.5,
        # The chain of case 1 also holds a fact that no edit changes, and it is lost.
        "instance_wise_exact": 0.5, "instance_wise_contained": 0.5,
        "instance_wise_teacher_forced": 0.5,
    })  # fmt: skip
    assert found["edit_wise_exact"].case_ids == ("1", "1", "2")
    assert found["all_edits_exact"].case_ids == ("1", "2")
    assert [a.prompt for a in found["multi_hop_exact"].answers] == ["b"]


def test_the_edits_of_a_chain_stay_one_case_beside_others_of_the_same_id() -> None:
    hop = Probe(prompt="a", answers=("Lira",), type="multi_hop", group="1")
    cases = [
        fact("Peru", case_id="1"),
        fact("France", case_id="1", portability=[hop]),
        fact("Spain", case_id="1"),
        fact("Chile", case_id="2"),
        fact("Cuba", case_id=None),
        fact("Togo", case_id=None),
    ]
    edits = [
        Edit(method="m", delta_kind="k", requests=(one,), config={}, fingerprint={})
        for one in cases
    ]
    names = [request.case_id for request in requests_of(edits)]
    chain = f"1 ({edits[1].id})"
    assert names == ["1", chain, chain, "2", None, None]


# -- all -----------------------------------------------------------------------------------------


def test_a_request_without_prompts_gives_nothing_but_the_edit_itself() -> None:
    bare = Request(prompt="{} is in", subject="Rome", target_new="Spain")
    given: dict[str, Any] = {
        "texts": {bare.text: " Spain"},
        "scores": {(bare.text, "Spain"): score(0.9)},
        "samples": {(bare.text,): ["Rome is in Spain"]},
    }
    expected = {
        "counterfact": set(), "portability": set(), "locality": set(),
        "easyedit": {"rewrite_acc", "fluency"}, "ke": {"success_rate"},
    }  # fmt: skip
    for protocol in (counterfact.PROTOCOL, protocols_of_probes.PORTABILITY,
                     protocols_of_probes.LOCALITY, easyedit.PROTOCOL, ke.PROTOCOL):  # fmt: skip
        assert set(ask(protocol, [bare], **given)) == expected[protocol.name]


@pytest.mark.parametrize("module", [failures, fluency, measurement, pooling, sanitation])
def test_the_examples_in_docstrings_run(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_a_harmonic_mean_is_named_by_its_parts() -> None:
    score_of = Measurement("Score", 0.5, 1, "p", of=("ES", "PS"))
    assert Measurement.from_json(score_of.as_json()) == score_of
