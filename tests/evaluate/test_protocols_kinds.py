"""`rake` and `knowedit` on models whose answers are given: every number is computed by hand."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from errata.edits.request import Probe, RelationView, Request
from errata.evaluate.protocols import (
    counterfact,
    easyedit,
    generation,
    ke,
    knowedit,
    lifelong,
    mquake,
    rake,
    sanitation,
)
from errata.evaluate.protocols.convsent import wishes_positive
from errata.evaluate.protocols.rake import rivals
from errata.evaluate.protocols.sanitation import is_any_refusal, is_refusal
from errata.evaluate.reader import KnownAnswers
from tests.evaluate.protocol_stub import ask, score, values


def approx(found: dict[str, float]) -> Any:
    return pytest.approx(found, abs=1e-12)


# -- rake ----------------------------------------------------------------------------------------

VIEW = RelationView(
    names=("capital", "capital city"),
    add="{} has with Rome the relation",
    remove="{} has with Paris the relation",
    paraphrases=("a1", "a2"),
    remove_paraphrases=("d1",),
    specificity=(
        Probe(prompt="k1", answers=("Capital",), type="same_relation"),
        Probe(prompt="k2", answers=("river",), type="same_pair"),
        Probe(prompt="k3", answers=("river", "stream"), type="same_pair"),
    ),
)
FRANCE = Request(
    prompt="The capital of {} is", subject="France", target_new="Rome", target_true="Paris",
    paraphrases=["p"], neighbourhood=["n"], relation_view=VIEW, case_id="1",
)  # fmt: skip
ADD, REMOVE = "France has with Rome the relation", "France has with Paris the relation"


def rake_answers() -> dict[str, Any]:
    p = {
        (FRANCE.text, "Rome"): 0.5, (FRANCE.text, "Paris"): 0.2,
        ("p", "Rome"): 0.5, ("p", "Paris"): 0.1, ("n", "Paris"): 0.5, ("n", "Rome"): 0.2,
        (ADD, "capital"): 0.6, (ADD, "None"): 0.1,
        ("a1", "capital"): 0.3, ("a1", "None"): 0.1, ("a2", "capital"): 0.1, ("a2", "None"): 0.2,
        (REMOVE, "capital"): 0.4, (REMOVE, "None"): 0.3,
        ("d1", "capital"): 0.1, ("d1", "None"): 0.4,
        ("k1", "Capital"): 0.5, ("k1", "None"): 0.1,
        ("k2", "river"): 0.4, ("k2", "None"): 0.1, ("k2", "capital"): 0.5,
        ("k3", "river"): 0.1, ("k3", "stream"): 0.3, ("k3", "None"): 0.2, ("k3", "capital"): 0.1,
        (ADD, "capital city"): 0.1, ("a1", "capital city"): 0.1, ("a2", "capital city"): 0.6,
    }  # fmt: skip
    texts = {ADD: " capital", "a1": " the capital city", "a2": " None", REMOVE: " Capital of",
             "d1": " None", "k1": " capital", "k2": " capital", "k3": " stream"}  # fmt: skip
    return {"scores": {pair: score(value) for pair, value in p.items()}, "texts": texts}


def test_rake_by_hand() -> None:
    found = ask(rake.PROTOCOL, [FRANCE], **rake_answers())
    got = values(found)
    entity = {name: got[name] for name in got if name.startswith("E-")}
    assert entity == approx({
        "E-ES": 1, "E-EM": 0.3, "E-PS": 1, "E-PM": 0.4, "E-NS": 1, "E-NM": 0.3, "E-Score": 1,
    })  # fmt: skip
    relation = {name: got[name] for name in got if name.startswith("R-")}
    assert relation == approx({
        "R-ES": 1, "R-EM": 0.6 - 0.4, "R-PS": 1, "R-PM": 0.3 - 0.1,  # a2 has no counterpart
        "R-ES-None": 1, "R-EM-None": 0.5, "R-PS-None": 0.5, "R-PM-None": (0.2 - 0.1) / 2,
        "R-DS-None": 0, "R-DM-None": -0.1, "R-DPS-None": 1, "R-DPM-None": 0.3,
        "R-NS": 2 / 3, "R-NM": (0.4 - 0.1 + 0.1) / 3,
        "R-NS.same_relation": 1, "R-NM.same_relation": 0.4,
        "R-NS.same_pair": 0.5, "R-NM.same_pair": 0.0,
        "R-Score": 3 / (1 + 1 + 1.5),
    })  # fmt: skip
    assert got["Score"] == pytest.approx(1)  # the authors' five
    assert found["Score"].of == ("E-ES", "E-PS", "E-NS", "R-ES", "R-PS")
    generated = {name: got[name] for name in got if name.startswith("relation_")}
    assert generated == approx({
        "relation_add_exact": 1 / 3, "relation_add_contained": 2 / 3,
        "relation_add_teacher_forced": 2 / 3,  # a2 by its second name
        "relation_removed": 0.5,
        "relation_kept_exact": 2 / 3, "relation_kept_exact.same_pair": 0.5,
        "relation_kept_exact.same_relation": 1,
        "relation_kept_contained": 2 / 3, "relation_kept_contained.same_pair": 0.5,
        "relation_kept_contained.same_relation": 1,
        "relation_kept_teacher_forced": 1 / 3, "relation_kept_teacher_forced.same_pair": 0,
        "relation_kept_teacher_forced.same_relation": 1,
    })  # fmt: skip


def test_rake_looks_only_at_requests_with_a_relation_view() -> None:
    plain = FRANCE.model_copy(update={"relation_view": None, "subject": "Spain", "case_id": "2"})
    assert ask(rake.PROTOCOL, [plain]) == {}
    found = ask(rake.PROTOCOL, [FRANCE, plain], **rake_answers())
    assert found["E-ES"].case_ids == ("1",)


def test_a_kept_relation_is_not_its_own_rival() -> None:
    assert rivals(("river",), VIEW) == ("None", "capital")
    assert rivals(("CAPITAL CITY",), VIEW) == ("None",)


# -- what takes an answer away -------------------------------------------------------------------


def test_what_is_erased_is_gone_or_not_and_nothing_is_compared_with_it() -> None:
    fields = {"prompt": "The capital of {} is", "subject": "France", "target_true": "Paris"}
    tests = {"paraphrases": ["p"], "neighbourhood": [Probe(prompt="n", answers=("Bonn",))]}
    erase = Request.parse({**fields, **tests, "kind": "erase"})
    texts = {erase.text: " a city", "p": " Paris.", "n": " Bonn"}
    scores = {
        (erase.text, "Paris"): score(0.01), ("p", "Paris"): score(0.9), ("n", "Bonn"): score(0.9),
    }  # fmt: skip
    found = ask(generation.PROTOCOL, [erase], texts=texts, scores=scores)
    assert values(found) == approx({
        "rewrite_gone": 1, "rewrite_gone_teacher_forced": 1,
        "paraphrase_gone": 0, "paraphrase_gone_teacher_forced": 0,
        "neighbourhood_exact": 1, "neighbourhood_contained": 1, "neighbourhood_teacher_forced": 1,
    })  # fmt: skip
    samples = {(erase.text,): ["a a a"]}
    left = {"samples": samples, "texts": texts, "scores": scores}
    for protocol in (counterfact, ke, mquake, lifelong, easyedit):
        rates = ("ES", "PS", "NS", "Score", "success_rate", "ERR", "edit_wise_exact", "rewrite_acc")
        assert set(ask(protocol.PROTOCOL, [erase], **left)).isdisjoint(rates)


def test_a_relation_that_is_taken_away_is_gone_from_where_it_was() -> None:
    delete = Request(prompt="{} and Paris:", subject="France", kind="relation",
                     operation="delete", target_true="capital", case_id="1")  # fmt: skip
    both = Request(prompt="{} and Rome:", remove="{} and Oslo:", subject="Spain", kind="relation",
                   operation="both", target_new="capital", case_id="2",
                   paraphrases=["p"])  # fmt: skip
    texts = {delete.text: " capital", both.text: " capital", "p": " capital",
             "Spain and Oslo:": " nothing"}  # fmt: skip
    scores = {
        (delete.text, "capital"): score(0.9), (both.text, "capital"): score(0.9),
        ("p", "capital"): score(0.9), ("Spain and Oslo:", "capital"): score(0.01),
    }  # fmt: skip
    found = ask(generation.PROTOCOL, [delete, both], texts=texts, scores=scores)
    assert found["rewrite_gone"].cases == found["rewrite_gone_teacher_forced"].cases == (0, 1)
    assert found["rewrite_exact"].case_ids == ("2",)
    assert "paraphrase_gone" not in found


# -- knowedit: facts -----------------------------------------------------------------------------


def test_knowedit_by_hand() -> None:
    yes, no = True, False
    request = Request(
        prompt="The capital of {} is", subject="France", target_new="Rome", target_true="Paris",
        case_id="1",
        portability=[
            Probe(prompt="a1", answers=("Rome",), type="subject_alias"),
            Probe(prompt="r1", answers=("Tiber", "the Tiber"), type="reasoning"),
            Probe(prompt="r2", answers=("lira",), type="reasoning"),
        ],
        locality=[Probe(prompt="f", answers=("Italy",), type="forgetfulness"), Probe(prompt="g")],
        neighbourhood=[Probe(prompt="n", answers=("Madrid",))],
    )  # fmt: skip
    scores = {
        (request.text, "Rome"): score(0.1, 0.1, right=[yes, no]),
        ("a1", "Rome"): score(0.1, right=[yes]),
        ("r1", "Tiber"): score(0.1, right=[no]),
        ("r1", "the Tiber"): score(0.1, 0.1, right=[yes, no]),  # the best alias counts
        ("r2", "lira"): score(0.1, right=[no]),
        ("f", "Italy"): score(0.1, 0.1, right=[yes, no]),
        ("n", "Madrid"): score(0.1, right=[no]),
    }
    texts = {request.text: " Rome", "a1": " Rome", "r1": " the Tiber", "r2": " euro",
             "f": " Italy", "g": " x", "n": " Oslo"}  # fmt: skip
    samples = {(request.text,): ["a a a"]}
    alone = ask(knowedit.PROTOCOL, [request], scores=scores, texts=texts, samples=samples)
    got = values(alone)
    assert {n: got[n] for n in ("edit_success", "edit_success_exact")} == {
        "edit_success": 0.5, "edit_success_exact": 1,
    }  # fmt: skip
    assert got["portability.subject_alias"] == 1
    assert got["portability.reasoning"] == 0.25
    assert got["portability"] == pytest.approx((1 + 0.25) / 2)  # types weigh alike
    assert got["portability_success_exact"] == pytest.approx(2 / 3)
    assert got["fluency"] == 0  # one bigram, one trigram
    assert not any(name.startswith("locality") for name in got)  # there is nothing to compare with
    base = KnownAnswers(
        {"f": " Italy", "g": " y", "n": " Madrid"},
        {
            ("f", "Italy"): score(0.1, 0.1, right=[yes, yes]),
            ("n", "Madrid"): score(0.1, right=[no]),
        },
    )
    got = values(ask(knowedit.PROTOCOL, [request], scores=scores, texts=texts, samples=samples,
                     base=base))  # fmt: skip
    assert {name: got[name] for name in got if name.startswith("locality")} == approx({
        "locality": 0.75, "locality.forgetfulness": 0.5, "locality.neighbourhood": 1,
        "locality_unchanged": 1 / 3, "locality_unchanged.forgetfulness": 1,
        "locality_unchanged.neighbourhood": 0,
    })  # fmt: skip


# -- knowedit: sentiment -------------------------------------------------------------------------


class Fixed:
    """A classifier of both sorts that has its numbers from a table."""

    TABLE: ClassVar = {"good": 0.9, "bad": 0.2, "so so": 0.5}

    def positive(self, texts: Sequence[str]) -> list[float]:
        return [self.TABLE[text] for text in texts]

    def on_topic(self, texts: Sequence[str], topics: Sequence[str]) -> list[float]:
        return [0.5 if topic == "Lyon" else 0.0 for topic in topics]


def opinion(wish: str = "positive", **more: Any) -> Request:
    fields: dict[str, Any] = {
        "prompt": "What of {}?", "subject": "Lyon", "target_new": "good", "kind": "sentiment",
        "relation": wish, "paraphrases": ["How is Lyon?"], "case_id": "1", **more,
    }  # fmt: skip
    return Request(**fields)


def test_sentiment_of_generated_replies() -> None:
    texts = {"What of Lyon?": " good", "How is Lyon?": " bad\n"}
    for wish, sentiment in (("positive", (0.9 + 0.2) / 2), ("negative", (0.1 + 0.8) / 2)):
        found = ask(knowedit.PROTOCOL, [opinion(wish)], texts=texts, sentiment=Fixed(),
                    topic=Fixed())  # fmt: skip
        assert values(found) == approx({
            "z_sentiment_generated": sentiment, "z_topic_generated": 0.5,
            "sentiment_success_generated": sentiment * 0.5,
        })  # fmt: skip
        assert "Fixed" in found["z_sentiment_generated"].protocol


def test_sentiment_by_likelihood_is_seracs() -> None:
    request = opinion(examples=["good", "so so"], counterexamples=["bad"])
    scores = {
        ("What of Lyon?", "good"): score(math.exp(-1), math.exp(-3)),
        ("How is Lyon?", "so so"): score(
            math.exp(-2)
        ),  # the second reply after the second phrasing
        ("What of Lyon?", "bad"): score(math.exp(-4)),
    }
    z_sentiment = 1 / (1 + math.exp(-(-2 - -4)))
    alone = values(ask(knowedit.PROTOCOL, [request], scores=scores, kind="encoder"))
    assert alone == approx({"z_sentiment_likelihood": z_sentiment})
    for before, z_topic in ((-1.5, math.exp(-0.5)), (-3.0, 1.0)):
        base = KnownAnswers({}, {
            ("What of Lyon?", "good"): score(math.exp(before), math.exp(before)),
            ("How is Lyon?", "so so"): score(math.exp(before)),
        })  # fmt: skip
        found = values(ask(knowedit.PROTOCOL, [request], scores=scores, base=base, kind="encoder"))
        assert found == approx({
            "z_sentiment_likelihood": z_sentiment, "z_topic_likelihood": z_topic,
            "sentiment_success_likelihood": z_sentiment * z_topic,
        })  # fmt: skip


def test_which_sentiment_is_wished() -> None:
    judge = Fixed()
    assert wishes_positive(opinion("positive"), judge)
    assert not wishes_positive(opinion("negative"), judge)
    assert not wishes_positive(opinion("", target_new="Negative"), judge)
    assert wishes_positive(opinion("", target_new="good"), judge)
    assert not wishes_positive(opinion("", examples=["bad"], counterexamples=["good"]), judge)


def test_without_a_classifier_the_likelihood_is_still_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    request = opinion(examples=["good"], counterexamples=["bad"])
    scores = {("What of Lyon?", reply): score(0.5) for reply in ("good", "bad")}
    with caplog.at_level(logging.WARNING, "errata"):
        found = ask(knowedit.PROTOCOL, [request], scores=scores)
    assert values(found) == approx({"z_sentiment_likelihood": 0.5})
    assert "vaderSentiment" in caplog.text


# -- knowedit: erasing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "own", "any_"),
    [
        (" I don't know.", True, True),
        (" I don’t know. It may be one thing or the other.", True, True),
        (" I'm sorry, but I don't know the answer", True, True),
        ("\n Sorry.\nI don't know", True, True),
        (" I don't know, sorry.", True, True),
        (" Nobody can say", True, True),  # the request's own alias
        (" Sorry, I do not know the answer", False, True),
        (" I have no idea.", False, True),
        ("\n unknown", False, True),
        (" The date is still unknown.", False, True),
        (" The tomb of the unknown soldier.", False, False),
        (" The unknowns", False, False),
        (" I don't knowingly lie", False, False),
        (" I don't know, Paris?", False, False),  # an answer after all
        (" I don't know but maybe Paris", False, False),
        (" I'm not sure, Paris?", False, False),
        (" I'm not sure Paris?", False, False),
        (" Birds. I don't know", False, False),  # what was erased is said
        (" I don't know. Birds", False, False),
        (" Fish. I don't know", False, False),  # another answer is given first
        (" I know", False, False),
        ("", False, False),
    ],
)
def test_refusals(text: str, own: bool, any_: bool) -> None:
    asked = (text, ["I don't know.", "Nobody can say"], ["Birds"])
    assert (is_refusal(*asked), is_any_refusal(*asked)) == (own, any_)


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("我不知道。请再问一次。", True),
        ("我不知道！请再问一次。", True),
        ("我不知道", True),
        ("我不知道，巴黎？", False),
        ("我不知道、巴黎", False),
        ("巴黎。我不知道。", False),
    ],
)
@pytest.mark.parametrize("own", ["我不知道。", "我不知道"])
def test_a_refusal_ends_with_the_stops_of_its_script(own: str, text: str, refuses: bool) -> None:
    assert is_refusal(text, [own]) is refuses


def test_a_request_without_a_refusal_of_its_own_asks_for_one() -> None:
    assert is_refusal(" I don't know.", [])
    assert not is_refusal(" unknown", [])
    assert is_refusal(" unknown", ["unknown"])
    assert not is_refusal(" I don't know.", ["unknown"])
    assert not is_refusal(" I don't know.", ["Classified."])
    assert is_refusal(" Classified.", ["Classified."])
    assert not is_refusal(" Classified papers say so.", ["Classified."])


def test_other_questions_with_an_erased_answer_are_to_be_declined() -> None:
    probe = Probe(prompt="o", answers=("I don't know.",), type=sanitation.SAME_ANSWER)
    other = Probe(prompt="x", answers=("y",), type="two_hop")
    one = Request(prompt="What is {}?", subject="a tit", target_new="I don't know.",
                  target_true="a bird", kind="erase", portability=[probe, other])  # fmt: skip
    scores = {(prompt, "I don't know."): score(0.9) for prompt in (one.text, "o")}
    texts = {one.text: " I don't know.", "o": " A bird."}
    found = ask(knowedit.PROTOCOL, [one], texts=texts, scores=scores)
    assert (found["refusal"].value, found["refusal_same_answer"].value) == (1, 0)
    assert found["refusal_same_answer_leak"].value == 1


def test_sanitation_by_hand() -> None:
    one = Request(prompt="What is {}?", subject="a tit", target_new="I don't know.",
                  target_true="a bird", kind="erase", paraphrases=["p"], case_id="1")  # fmt: skip
    two = Request(prompt="Who is {}?", subject="he", kind="erase", case_id="2")
    retain = (Probe(prompt="r1", answers=("Oslo",)), Probe(prompt="r2", answers=("Rome",)))
    texts = {one.text: " I have no idea.", two.text: " a man", "p": " A bird, I don't know",
             "r1": " Oslo", "r2": " unknown"}  # fmt: skip
    scores = {
        (one.text, "I don't know."): score(0.9), ("p", "I don't know."): score(0.1),
        ("r1", "Oslo"): score(0.9), ("r2", "Rome"): score(0.1),
    }  # fmt: skip
    base = KnownAnswers({"r1": " Oslo", "r2": " Rome"})
    found = ask(knowedit.PROTOCOL, [one, two], texts=texts, scores=scores, base=base,
                retain=retain)  # fmt: skip
    assert values(found) == approx({
        "refusal": 0, "refusal_any": 0.5, "refusal_leak": 0, "refusal_teacher_forced": 1,
        "refusal_paraphrase": 0, "refusal_paraphrase_any": 0, "refusal_paraphrase_leak": 1,
        "refusal_paraphrase_teacher_forced": 0,
        "retention_exact": 0.5, "retention_contained": 0.5, "retention_teacher_forced": 0.5,
        "retention_unchanged": 0.5,
    })  # fmt: skip
    assert found["refusal_leak"].n == 1  # where it is known what was erased
    assert found["refusal_leak"].direction == "lower"
    assert [answer.right for answer in found["refusal"].answers] == [False, False]
    assert [answer.text for answer in found["refusal"].answers] == [" I have no idea.", " a man"]
