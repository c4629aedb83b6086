"""Every published format: what a record's fields become, on small hand-written samples."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from errata import Request
from errata.datasets import load, pararel
from errata.datasets.record import Record
from errata.edits.request import Probe
from errata.errors import ConfigError, DatasetError, UnknownNameError
from tests.helpers import ROOT

SAMPLES = ROOT / "tests" / "data" / "datasets"


def sample(name: str, file: str, **options: Any) -> list[Request]:
    return load(name, SAMPLES / file, **options).requests()


def types(requests: list[Request], field: str) -> Counter[str]:
    return Counter(probe.type for request in requests for probe in getattr(request, field))


def test_counterfact_original() -> None:
    first = sample("counterfact", "counterfact.json")[0]
    assert first == Request(
        prompt="The mother tongue of {} is",
        subject="Berta Quill",
        target_new="Tessian",
        target_true="Orlish",
        relation="P103",
        case_id="7",
        paraphrases=("It rained. Berta Quill spoke the language", "Berta Quill, a native"),
        neighbourhood=(
            Probe(prompt="The mother tongue of Jon Marl is", answers=("Orlish",)),
            Probe(prompt="Ada Fenn, a native", answers=("Orlish",)),
        ),
        attribute=(Probe(prompt="The mother tongue of Kit Sorrow is", answers=("Tessian",)),),
        generation=(  # as often as the file has it: GE is a mean over them
            "Berta Quill's mother tongue is",
            "Berta Quill was born in",
            "Berta Quill's mother tongue is",
        ),
    )


def test_counterfact_takes_reference_texts_from_the_authors_snippets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def samples(*texts: str) -> list[dict[str, str]]:
        return [{"name": "Kit Sorrow", "text": text} for text in texts]

    snippets = tmp_path / "attribute_snippets.json"
    entries = [
        {"relation_id": "P103", "target_id": "Q2", "samples": samples("Kit sang.", "Kit wrote.")},
        {"relation_id": "P103", "target_id": "Q1", "samples": samples("of the true target")},
        {"relation_id": "P27", "target_id": "Q2", "samples": samples("of another relation")},
    ]
    snippets.write_text(json.dumps(entries))
    cases = load("counterfact", SAMPLES / "counterfact.json", snippets=str(snippets))
    assert cases.requests()[0].references == ("Kit sang.", "Kit wrote.")
    assert "no case has a text" not in caplog.text
    snippets.write_text(json.dumps(entries[1:]))
    other = load("counterfact", SAMPLES / "counterfact.json", snippets=str(snippets))
    assert other.digest != cases.digest  # another file, another run
    assert other.requests()[0].references == ()
    assert "no case has a text in" in caplog.text
    with pytest.raises(DatasetError, match="flat schema"):
        load("counterfact", SAMPLES / "counterfact_flat.json", snippets=str(snippets))
    del entries[0]["samples"][0]["text"]
    snippets.write_text(json.dumps(entries))
    with pytest.raises(DatasetError, match=r"samples\[0\].*text"):
        load("counterfact", SAMPLES / "counterfact.json", snippets=str(snippets))


def test_counterfact_flat() -> None:
    first, second = sample("counterfact", "counterfact_flat.json")
    assert (first.prompt, first.subject) == ("The mother tongue of {} is", "Berta Quill")
    assert (first.target_new, first.target_true, first.case_id) == ("Tessian", "Orlish", None)
    assert first.paraphrases == ("Berta Quill spoke the language",)
    assert first.neighbourhood == (
        Probe(prompt="The mother tongue of Jon Marl is", answers=("Orlish",)),
    )
    assert first.portability == (
        Probe(
            prompt="In which country is the mother tongue of Berta Quill spoken?",
            answers=("Tess",),
            type="reasoning",
        ),
    )
    assert (second.prompt, second.relation, second.case_id) == ("{}, a native", "P103", "31")
    assert second.paraphrases == ("Jon Marl spoke", "Jon Marl grew up with")
    assert second.neighbourhood == ()  # the file gives no answer: none is invented
    assert second.locality == (Probe(prompt="Ada Fenn, a native", type="neighbourhood"),)


def test_both_schemas_may_stand_in_one_file(tmp_path: Path) -> None:
    both = [
        json.loads((SAMPLES / name).read_text())[0]
        for name in ("counterfact.json", "counterfact_flat.json")
    ]
    (tmp_path / "both.json").write_text(json.dumps(both))
    assert [r.relation for r in load("counterfact", tmp_path / "both.json")] == ["P103", None]


def test_zsre() -> None:
    first, second = sample("zsre", "zsre.json")
    assert (first.prompt, first.subject) == ("What does {} make?", "Arbor Partners")
    assert (first.target_new, first.target_true) == ("kites", "rope")
    assert first.paraphrases == ("Which product comes from Arbor Partners?",)
    assert first.locality == (
        Probe(
            prompt="nq question: who wrote the song of the river",
            answers=("Ada Fenn",),
            type="neighbourhood",
        ),
    )
    # The subject as it stands in the question, not as the record spells it.
    assert (second.prompt, second.subject) == ("in which city is {}?", "kandor hall")


def test_zsre_towards_the_true_answer() -> None:
    first = sample("zsre", "zsre.json", target="answers")[0]
    assert (first.target_new, first.aliases, first.target_true) == ("rope", ("ropes",), None)
    with pytest.raises(ConfigError, match="one of alt, answers"):
        sample("zsre", "zsre.json", target="pred")


def test_knowedit_facts() -> None:
    counterfact, recent = sample("knowedit", "knowedit_wiki.json")
    assert (counterfact.kind, counterfact.target_true) == ("modify", "Veldonia")
    assert counterfact.portability == (
        # Two answers with their aliases: all kept. The question without an answer is left out.
        Probe(
            prompt="The currency of Berta Quill's country is",
            answers=("sint", "sints", "mark"),
            type="reasoning",
        ),
        Probe(
            prompt="Berta Quill's continent is", answers=("Tessia",), type="logical_generalisation"
        ),
    )
    assert counterfact.locality == (
        Probe(
            prompt="The gender of Berta Quill is",
            answers=("female", "woman"),
            type="relation_specificity",
        ),
        Probe(prompt="Nobody knows", type="relation_specificity"),  # can still be unchanged
        Probe(
            prompt="The country of Berta Quill, which is not Palonia, is",
            answers=("Veldonia",),
            type="forgetfulness",
        ),
    )
    assert (recent.kind, recent.target_true, recent.locality) == ("insert", None, ())


def test_knowedit_zsre() -> None:
    (only,) = sample("knowedit", "knowedit_zsre.json", skip_bad=True)
    assert (only.subject, only.kind, only.target_true) == ("Kandor", "modify", "Orlidae")
    assert only.paraphrases == ("What family is Kandor?",)
    assert only.portability[0].answers == ("Owls",)


def test_knowedit_wikibio() -> None:
    (only,) = sample("knowedit", "knowedit_wikibio.json")
    assert only.kind == "text"
    # The name comes back in the text; the subject is the one in the header.
    assert only.prompt == "This is a Wikipedia passage about {}. Jon Marl, known as jon marl, sang."
    assert (only.subject, only.target_new) == ("jon marl", "He was born in Kandor.")
    assert only.locality[0].type == "relation_specificity"


def test_knowedit_convsent() -> None:
    first, second = sample("knowedit", "knowedit_convsent.json", sentiment="negative")
    assert (first.kind, first.relation) == ("sentiment", "negative")
    assert first.text == "What do you think of Kandor?"
    assert first.target_new == "I do not like it."
    assert first.examples == ("I do not like it.",)
    assert first.counterexamples == ("I love it.", "It is great.")
    assert all("Kandor" in prompt for prompt in first.paraphrases)
    assert [p.prompt for p in second.locality] == ["What do you think of Kandor?"]


def test_knowedit_sanitation() -> None:
    train = load("knowedit", SAMPLES / "knowedit_sanitation.json")
    (only,) = train.requests()
    assert (only.kind, only.prompt) == ("erase", "What kind of bird is a {}?")
    assert (only.target_new, only.target_true) == ("I don't know.", "Birds")
    assert train.retain == (
        Probe(prompt="Which city is the capital of Veldonia?", answers=("Istrand",)),
    )
    test = load("knowedit", SAMPLES / "knowedit_sanitation_test.json", limit=1)
    (held_out,) = test.requests()
    # It names no subject: the whole question is it.
    assert (held_out.prompt, held_out.subject) == ("{}", "What sort of creature is a killik?")
    assert [probe.answers for probe in test.retain] == [("The road",), ("Jon Marl",)]


def test_sanitations_edits_are_tested_with_the_other_questions_of_their_answer(
    tmp_path: Path,
) -> None:
    def item(question: str, answer: str, **more: str) -> dict[str, str]:
        return {
            "question": question, "ground_truth": answer, "target_new": "I don't know.", **more
        }  # fmt: skip

    edits = [item("What is a plover?", "Birds", subject="plover"),
             item("What is brie?", "Cheese", subject="brie"),
             item("What is a tit?", "Birds", subject="tit")]  # fmt: skip
    asked = [item("What sort of creature is a killik?", "BIRDS"), item("Feta is what?", "cheese"),
             item("And a wren?", "birds"), item("And a kite?", "Birds")]  # fmt: skip
    train, test = tmp_path / "train.json", tmp_path / "test.json"
    train.write_text(json.dumps({"K_F": edits, "K_R": [item("Who sang?", "Jon Marl")]}))
    kept = [{"question": "What is paved?", "ground_truth": "The road"}]
    test.write_text(json.dumps({"success": asked, "locality": kept}))
    data = load("knowedit", train, test=str(test))
    birds, cheese = data.cases()
    assert [r.text for r in birds] == ["What is a plover?", "What is a tit?"]
    assert [[p.prompt for p in r.portability] for r in (*birds, *cheese)] == [
        ["What sort of creature is a killik?", "And a kite?"], ["And a wren?"], ["Feta is what?"],
    ]  # fmt: skip
    assert {(p.answers, p.type) for r in birds for p in r.portability} == {
        (("I don't know.",), "same_answer")
    }
    assert data.retain == (Probe(prompt="What is paved?", answers=("The road",)),)
    assert data.digest != load("knowedit", train).digest
    with pytest.raises(DatasetError, match=r"no list 'K_F'.*training file \(K_F, K_R\)"):
        load("knowedit", test, test=str(train))
    test.write_text(json.dumps({"success": [item("Who?", "Nobody")], "locality": kept}))
    with pytest.raises(DatasetError, match=r"success\[0\].*'Nobody' is the answer of no edit"):
        load("knowedit", train, test=str(test))


def test_knowedit_subset_refuses_another_schema() -> None:
    with pytest.raises(DatasetError, match="not in the schema of the subset WikiBio"):
        sample("knowedit", "knowedit_wiki.json", subset="WikiBio")
    assert sample("knowedit", "knowedit_wikibio.json", subset="WikiBio")


def test_mquake() -> None:
    data = load("mquake", SAMPLES / "mquake.json")
    assert data.case_count == 2
    (first, second), (third,) = data.cases()
    assert {r.case_id for r in (first, second)} == {"5"}
    assert (first.target_new, first.target_true, first.relation) == ("lute", "piano", "P1303")
    assert first.aliases == ("baroque lute",)
    multi = [probe for probe in first.portability if probe.type == "multi_hop"]
    assert len(multi) == 3
    assert len({probe.group for probe in multi}) == 1
    assert multi[0].group
    assert {probe.answers for probe in multi} == {("Kandor", "Kandor City")}
    assert [p for p in first.portability if p.type == "single_hop"] == [
        Probe(
            prompt="Which instrument does Berta Quill play?",
            answers=("lute", "baroque lute"),
            type="single_hop",
        )
    ]
    assert [p.prompt for p in second.portability] == ["What is the capital of Veldonia?"]
    # A hop that no edit changes must stay as it is.
    assert [p.prompt for p in first.locality] == ["In which country was the lute invented?"]
    assert second.locality == ()
    assert third.aliases == ("sints",)


def test_ripple_edits() -> None:
    first, second = sample("ripple_edits", "ripple_edits.json")
    assert first.prompt == "The name of the country of citizenship of {} is"
    assert (first.subject, first.target_new, first.target_true) == (
        "Berta Quill", "Palonia", "Veldonia",
    )  # fmt: skip
    assert first.aliases == ("Kingdom of Palonia", "Pal")
    assert (first.kind, first.relation) == ("modify", "COUNTRY_OF_CITIZENSHIP")
    assert types([first], "portability") == {
        "logical_generalisation": 1, "subject_alias": 1,
        "compositionality_1": 2, "compositionality_2": 2,
    }  # fmt: skip
    assert types([first], "locality") == {"relation_specificity": 1, "forgetfulness": 1}
    groups = {p.prompt: p.group for p in first.portability if "compositionality" in p.type}
    either = [group for prompt, group in groups.items() if prompt.endswith("of Berta Quill is")]
    assert len(set(either)) == 1  # OR: one of the two must be right
    assert either[0]
    assert [g for p, g in groups.items() if "Jon Marl" in p] == ["", ""]  # AND: each by itself
    forgotten = next(p for p in first.locality if p.type == "forgetfulness")
    assert forgotten.answers == ("Veldonia", "Tess")
    assert (second.kind, second.target_true, second.target_new) == ("insert", None, "Ada Marl")
    assert types([second], "locality") == {"relation_specificity": 1}  # the README's spelling
    assert second.portability == ()  # the only test has no answer


@pytest.mark.parametrize(
    ("relation", "sentence", "subject", "target"),
    [
        ("DIRECTOR", "The name of the director of Love is all is Jon Marl.", None, None),
        ("FOLLOWS", "Season two follows season one.", "Season two", "season one"),
        ("FOLLOWED_BY", "Part I is followed by Part II.", "Part I", "Part II"),
        ("CAST_MEMBER", "The names of the cast members of Reeds are Jon.", "Reeds", "Jon"),
        ("PLACE_OF_DEATH", "The place of death of Ada is Washington, D.C..", "Ada",
         "Washington, D.C."),
    ],
)  # fmt: skip
def test_ripple_edits_sentences_are_cut_or_refused(
    tmp_path: Path, relation: str, sentence: str, subject: str | None, target: str | None
) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"edit": {"prompt": sentence, "relation": relation}}]))
    if subject is None:
        with pytest.raises(DatasetError, match="cannot be told apart"):
            load("ripple_edits", path)
    else:
        (request,) = load("ripple_edits", path)
        assert (request.subject, request.target_new) == (subject, target)


def test_klob() -> None:
    (single,) = sample("klob", "klob_c.jsonl")
    assert (single.prompt, single.subject, single.target_new, single.relation) == (
        "The native language of {} is", "Berta Quill", "Orlish", "P103",
    )  # fmt: skip
    assert single.paraphrases == ("The mother tongue of Berta Quill is",)
    (chained,) = sample("klob", "klob_r.jsonl")
    assert chained.portability == (
        Probe(
            prompt="the employer of the spouse of Berta Quill is",
            answers=("Arbor Partners",),
            type="two_hop",
        ),
    )
    with pytest.raises(DatasetError, match="random words"):
        sample("klob", "klob_u.jsonl")


def test_known_statements_have_the_object_as_what_is_true() -> None:
    (only,) = sample("known_1000", "known.json")
    # A trace looks for it, and leaves out what a model does not know.
    assert (only.kind, only.target_new, only.target_true) == ("insert", "Veldonia", "Veldonia")
    assert only.prompt == "{} is located in the north of"  # with the model's own words


def test_labels() -> None:
    first, second = sample("scotus", "scotus.jsonl")
    assert (first.prompt, first.kind, first.target_new) == ("{}", "label", "12")
    assert second.text == "This case is about {} braces."
    data = load("fever", SAMPLES / "fever.jsonl", skip_bad=True)
    assert data.skipped == 1
    (claim,) = data.requests()
    assert (claim.subject, claim.target_new, claim.target_true) == (
        "Istrand Tower is in Veldonia.", "REFUTES", "SUPPORTS",
    )  # fmt: skip
    assert claim.paraphrases == ("The Istrand Tower stands in Veldonia.",)


def test_pararel() -> None:
    first, second, third = sample("pararel", "pararel")
    assert (first.prompt, first.target_true, first.relation) == (
        "The native language of {} is", "Orlish", "P103",
    )  # fmt: skip
    assert [r.target_new for r in (first, second, third)] == ["Tessian", "Tessian", "Orlish"]
    assert first.paraphrases == ("Berta Quill, a native",)
    assert {p.answers for p in first.neighbourhood} == {("Orlish",)}
    assert all("Jon Marl" in p.prompt for p in first.neighbourhood)
    assert all("Kit Sorrow" in p.prompt for p in first.attribute)
    with pytest.raises(UnknownNameError, match="relation"):
        sample("pararel", "pararel", relations=["P104"])
    with pytest.raises(DatasetError, match=r"P31 has no pattern that ends with \[Y\]"):
        sample("pararel", "pararel", relations="P31")
    with pytest.raises(DatasetError, match="not a ParaRel or LAMA folder"):
        sample("pararel", "lama/TREx")


def test_pararels_probes_are_about_subjects_that_have_one_of_the_two_objects() -> None:
    # Everybody who speaks Orlish speaks Tessian, too, but for Jon and Ida.
    both = [(name, spoken) for name in ("Kit", "Bo", "Al") for spoken in ("Orlish", "Tessian")]
    facts = [("Ana", "Orlish"), ("Jon", "Orlish"), ("Ida", "Tessian"), *both]
    relation = pararel.PararelRelation("P1", ("{} speaks",), tuple(facts))
    made = pararel.to_request(Record({}, "P1.jsonl", 0), relation, seed=0)
    assert (made.target_true, made.target_new) == ("Orlish", "Tessian")
    assert [probe.prompt for probe in made.neighbourhood] == ["Jon speaks"]
    assert [probe.prompt for probe in made.attribute] == ["Ida speaks"]


def test_calibration(tmp_path: Path) -> None:
    file = tmp_path / "relations.jsonl"
    lines = [
        {"relation": "P103", "template": "The native language of [X] is [Y] .",
         "wrong": ["[X] never spoke [Y] .", "[Y] is spoken by [X]."]},
        {"relation": "P31", "template": "[X] is a [Y] .", "wrong": ["[Y] is [X] ."]},
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    first, *_ = found = sample("calibration", "pararel", templates=str(file))
    assert len(found) == 3
    assert (first.text, first.target_new, first.kind) == (
        "The native language of Berta Quill is", "Orlish", "insert",
    )  # fmt: skip
    assert first.counterexamples == ("Berta Quill never spoke",)  # the other ends with [X]
    assert first.paraphrases == ("Berta Quill, a native",)
    with pytest.raises(UnknownNameError, match="relation"):  # no wrong one can be asked
        sample("calibration", "pararel", templates=str(file), relations="P31")
    with pytest.raises(ConfigError, match="templates=FILE"):
        sample("calibration", "pararel")
    with pytest.raises(DatasetError, match="no such file"):
        sample("calibration", "pararel", templates=str(tmp_path / "none"))
    for field, says in (
        ({"wrong": []}, "no relation has a right template and a wrong one"),
        ({"relation": "P999"}, "its templates are of P999"),
    ):
        lines = [{**json.loads(line), **field} for line in file.read_text().splitlines()]
        bad = tmp_path / "bad.jsonl"
        bad.write_text("\n".join(map(json.dumps, lines)))
        with pytest.raises(DatasetError, match=says) as caught:
            sample("calibration", "pararel", templates=str(bad))
        assert caught.value.file == str(bad)


def test_few_facts_of_calibration_are_of_many_relations(tmp_path: Path) -> None:
    facts = {"P19": ["Ada", "Ida", "Jon"], "P103": ["Ada"], "P20": ["Jon", "Ida"]}
    for place in ("pattern_data/graphs_json", "trex_lms_vocab"):
        (tmp_path / place).mkdir(parents=True)
    for name, subjects in facts.items():
        lines = [json.dumps({"sub_label": s, "obj_label": "Rome"}) for s in subjects]
        (tmp_path / "trex_lms_vocab" / f"{name}.jsonl").write_text("\n".join(lines))
    file = tmp_path / "relations.jsonl"
    file.write_text("\n".join(
        json.dumps({"relation": name, "template": f"[X] {name} [Y] .", "wrong": ["[X] or [Y] ."]})
        for name in facts
    ))  # fmt: skip
    every = load("calibration", tmp_path, templates=str(file)).requests()
    found = [(request.relation, request.subject) for request in every]
    assert len(found) == len(set(found)) == 6
    assert [relation for relation, _ in found[:5]] == ["P103", "P19", "P20", "P19", "P20"]
    assert found[-1] == ("P19", "Jon")
    assert load("calibration", tmp_path, templates=str(file), limit=3).requests() == every[:3]


def test_lama() -> None:
    first, second = sample("pararel", "lama")
    assert (first.text, first.target_true, first.target_new) == (
        "The capital of Veldonia is", "Istrand", "Pellstad",
    )  # fmt: skip
    assert second.attribute[0].prompt == "The capital of Veldonia is"


def test_jsonl_finds_the_subject_in_other_upper_and_lower_case(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "What is in france?", "subject": "France", "target_new": "Rome"}\n')
    (request,) = load("jsonl", file).requests()
    assert (request.prompt, request.subject) == ("What is in {}?", "france")


def test_jsonl_reads_back_what_requests_write(tmp_path: Path) -> None:
    requests = [r for name in ("mquake", "ripple_edits") for r in sample(name, f"{name}.json")]
    path = tmp_path / "own.jsonl"
    path.write_text("".join(r.model_dump_json() + "\n" for r in requests))
    assert load("jsonl", path).requests() == requests
    path.write_text('{"prompt": "{} is", "subject": "A", "target": "x"}\n')
    with pytest.raises(DatasetError, match="Did you mean 'target_new'"):
        load("jsonl", path)


def test_atlas() -> None:
    data = load("atlas")
    assert (len(data), data.skipped) == (600, 0)
    for request in data:
        assert all(probe.answers == (request.target_new,) for probe in request.attribute)
        assert request.relation_view is not None
    erased = load("atlas", kind="erase")
    assert {r.target_new for r in erased} == {"unknown"}
    assert all(r.relation_view is None and r.attribute == () for r in erased)
    assert erased.digest == data.digest
