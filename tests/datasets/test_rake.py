"""RaKE: one change seen from both sides, built from CounterFact and ParaRel, or as published."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from errata import Request
from errata.datasets import atlas, load, rake
from errata.datasets.relations import NAMES
from errata.edits.aims import aims_of_request
from errata.edits.request import Probe
from errata.errors import ConfigError, DatasetError, RequestError
from errata.zoo.atlas.relations import RELATIONS
from errata.zoo.atlas.world import make_world
from tests.helpers import ROOT, shared_path

SAMPLES = ROOT / "tests" / "data" / "datasets"
PAIR = re.compile(r"The relation between (?P<subject>.+) and (?P<object>.+) is")


def case(number: int, subject: str, relation: str | None, new: str, true: str) -> dict[str, Any]:
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": "{} has", "relation_id": relation, "subject": subject,
            "target_new": {"str": new}, "target_true": {"str": true},
        },
        "paraphrase_prompts": [f"{subject} owns"],
        "neighborhood_prompts": ["Another has"],
    }  # fmt: skip


def built(tmp_path: Path, cases: list[dict[str, Any]], **options: Any) -> list[Request]:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps(cases), encoding="utf-8")
    return load("rake", path, **options).requests()


def test_the_view_has_both_operations() -> None:
    first = load("rake", SAMPLES / "counterfact.json").requests()[0]
    view = first.relation_view
    assert view is not None
    assert view.names[0] == "native language"
    assert view.add == "The relation between {} and Tessian is"
    assert view.remove == "The relation between {} and Orlish is"
    assert len(view.paraphrases) == len(view.remove_paraphrases) == len(rake.PARAPHRASES)
    assert all("Berta Quill" in p and "Tessian" in p for p in view.paraphrases)
    assert all("Berta Quill" in p and "Orlish" in p for p in view.remove_paraphrases)
    # The entity's side is the CounterFact case.
    plain = load("counterfact", SAMPLES / "counterfact.json").requests()[0]
    assert first.model_copy(update={"relation_view": None}) == plain


def test_specificity_asks_for_true_pairs_of_others_and_of_the_subject(tmp_path: Path) -> None:
    cases = [
        case(0, "Ada", "P103", "Tessian", "Orlish"),
        case(1, "Ada", "P108", "Arbor", "Kandor Works"),
        case(2, "Bo", "P103", "Orlish", "Tessian"),
        case(3, "Cy", "P103", "Orlish", "Palonian"),
        case(4, "Ada", "P17", "Tess", "Tessian"),  # the same object: not asked for
    ]
    first = built(tmp_path, cases)[0]
    assert first.relation_view is not None
    names, employer = NAMES["P103"], NAMES["P108"]
    assert set(first.relation_view.specificity) == {
        Probe(prompt="The relation between Bo and Tessian is", answers=names, type="same_relation"),
        Probe(
            prompt="The relation between Cy and Palonian is", answers=names, type="same_relation"
        ),
        Probe(
            prompt="The relation between Ada and Kandor Works is",
            answers=employer,
            type="same_pair",
        ),
    }
    limited = built(tmp_path, cases, specificity=1)[0].relation_view
    assert limited is not None
    assert Counter(p.type for p in limited.specificity) == {"same_relation": 1, "same_pair": 1}
    none = built(tmp_path, cases, specificity=0)[0].relation_view
    assert none is not None
    assert none.specificity == ()


def test_a_pair_that_several_relations_join_accepts_each(tmp_path: Path) -> None:
    cases = [
        case(0, "Ada", "P19", "Kandor", "Istrand"),
        case(1, "Bo", "P19", "Kandor", "Pellstad"),
        case(2, "Bo", "P20", "Kandor", "Pellstad"),
    ]
    view = built(tmp_path, cases)[0].relation_view
    assert view is not None
    (other,) = view.specificity
    assert other.answers == (*NAMES["P19"], *NAMES["P20"])


def test_pararel_gives_further_pairs_and_is_part_of_the_digest(tmp_path: Path) -> None:
    path = SAMPLES / "counterfact.json"
    without, given = load("rake", path), load("rake", path, pararel=str(SAMPLES / "pararel"))
    view = given.requests()[0].relation_view
    assert view is not None
    asked = {probe.prompt for probe in view.specificity}
    assert "The relation between Jon Marl and Orlish is" in asked
    assert "The relation between Kit Sorrow and Tessian is" in asked
    assert not any("Berta Quill" in prompt for prompt in asked)
    assert without.digest != given.digest
    with pytest.raises(DatasetError, match="not a ParaRel"):
        load("rake", path, pararel=str(SAMPLES))


def test_the_choice_is_repeatable(tmp_path: Path) -> None:
    cases = [case(i, f"Person {i}", "P27", "Tess", f"Country {i}") for i in range(40)]
    first, again = built(tmp_path, cases), built(tmp_path, cases)
    assert first == again != built(tmp_path, cases, seed=1)


@pytest.mark.parametrize(
    ("relation", "says"), [(None, "relation_id.*missing"), ("P9999", "'P9999' has no name here")]
)
def test_a_relation_without_a_name_is_a_bad_record(
    tmp_path: Path, relation: str | None, says: str
) -> None:
    cases = [case(0, "Ada", "P103", "x", "y"), case(1, "Bo", relation, "x", "y")]
    with pytest.raises(DatasetError, match=says) as caught:
        built(tmp_path, cases)
    assert caught.value.index == 1
    assert len(built(tmp_path, cases, skip_bad=True)) == 1
    with pytest.raises(ConfigError, match="specificity is -1"):
        built(tmp_path, cases, specificity=-1)


def test_the_authors_schema_is_read_as_it_is() -> None:
    (request,) = load("rake", SAMPLES / "rake.json")
    view = request.relation_view
    assert view is not None
    assert view.names == ("mother tongue", "native language")
    assert view.add == "The relationship between {} and Tessian is"
    assert view.remove == "The relationship between {} and Orlish is"
    assert view.paraphrases == ("What joins Berta Quill and Tessian is",)
    assert view.remove_paraphrases == ()


# -- the two edits of the relation's side ----------------------------------------------------------


def test_relation_requests_add_and_delete() -> None:
    (request,) = load("rake", SAMPLES / "rake.json")
    add, delete = rake.relation_requests(request, ("add", "delete"))
    assert add.text == "The relationship between Berta Quill and Tessian is"
    assert (add.target_new, add.target_true) == ("mother tongue", "None")
    assert add.aliases == ("native language",)
    assert delete.text == "The relationship between Berta Quill and Orlish is"
    assert (delete.target_new, delete.target_true) == ("", "mother tongue")
    assert {add.kind, delete.kind} == {"relation"}
    assert add.case_id == delete.case_id == request.case_id
    assert add.paraphrases == ("What joins Berta Quill and Tessian is",)
    assert [(p.prompt, p.answers, p.type) for p in add.portability] == [
        ("The mother tongue of Berta Quill is", ("Tessian",), "entity_view"),
        ("Berta Quill, a native", ("Tessian",), "entity_view"),
    ]
    assert [(p.prompt, p.answers) for p in add.locality] == [
        ("The mother tongue of Jon Marl is", ("Orlish",))
    ]
    # Neighbours are no test of P(relation) against P("None"), as `neighbourhood` would have them.
    assert add.neighbourhood == delete.neighbourhood == ()
    assert add.relation_view is None


def test_both_operations_are_one_request() -> None:
    (request,) = load("rake", SAMPLES / "rake.json")
    (both,) = rake.relation_requests(request)
    in_chat = request.model_copy(update={"chat": True, "join": ""})
    assert {(r.chat, r.join) for r in rake.relation_requests(in_chat)} == {(True, "")}
    add, delete = rake.relation_requests(request, ("add", "delete"))
    assert both.operation == "both"
    assert aims_of_request(both) == (*aims_of_request(add), *aims_of_request(delete))


def test_pararels_wordings_that_end_with_the_relation_ask_for_it() -> None:
    wordings = ["[Y] is [X]'s native language.", "[X] spoke [Y].", "The native language of [X]."]
    assert rake.asked_for(wordings, "P103") == ("[object] is {}'s",)
    assert rake.asked_for(wordings, "P9999") == ()


def test_relation_requests_need_a_view_and_an_id_is_found() -> None:
    plain = Request(prompt="{} is in", subject="Kandor", target_new="Tess")
    with pytest.raises(RequestError, match="no relation view"):
        rake.relation_requests(plain)
    request = atlas.requests(1)[0].model_copy(update={"case_id": None})
    add, delete = rake.relation_requests(request, ("add", "delete"))
    assert add.case_id == delete.case_id
    assert add.case_id


# -- atlas -----------------------------------------------------------------------------------------


def test_the_view_of_atlas_is_true_of_its_world() -> None:
    world = make_world(0)
    name_of = {relation.id: relation.name for relation in RELATIONS}
    joined: dict[tuple[str, str], set[str]] = {}
    for fact in world.facts:
        joined.setdefault((fact.subject, fact.value), set()).add(name_of[fact.relation])
    counts: Counter[str] = Counter()
    for request in atlas.requests():
        view = request.relation_view
        assert view is not None
        assert view.names == (name_of[request.relation or ""],)
        add = view.add.replace("{}", request.subject)
        assert add == f"The relation between {request.subject} and {request.target_new} is"
        remove = PAIR.fullmatch(view.remove.replace("{}", request.subject))
        assert remove is not None
        assert view.names[0] in joined[remove["subject"], remove["object"]]
        assert len(view.paraphrases) == len(view.remove_paraphrases) == 1
        for probe in view.specificity:
            pair = PAIR.fullmatch(probe.prompt)
            assert pair is not None
            counts[probe.type] += 1
            true = joined[pair["subject"], pair["object"]]
            if probe.type == "same_pair":
                assert pair["subject"] == request.subject
                assert set(probe.answers) == true
                assert pair["object"] not in (request.target_new, request.target_true)
            else:
                assert pair["subject"] != request.subject
                assert set(probe.answers) <= true
    assert counts["same_relation"] > 1500
    assert counts["same_pair"] > 2500


# -- the real files --------------------------------------------------------------------------------


def test_every_relation_of_counterfact_and_pararel_has_a_name() -> None:
    facts = shared_path("data", "pararel", "data", "trex_lms_vocab")
    thin = shared_path("data", "counterfact", "counterfact_thin.jsonl")
    with thin.open(encoding="utf-8") as lines:
        used = {json.loads(line)["relation_id"] for line in lines} - {None}
    used |= {path.stem for path in facts.glob("*.jsonl")}
    assert used == set(NAMES)
    for names in NAMES.values():
        assert len(set(names)) == len(names) > 0
    assert len({names[0] for names in NAMES.values()}) == len(NAMES)


@pytest.mark.slow
def test_real_rake_is_whole() -> None:
    path = shared_path("data", "counterfact", "counterfact_full_2393.json")
    data = load("rake", path, pararel=str(shared_path("data", "pararel")))
    assert (len(data), data.skipped) == (2393, 0)
    counts: Counter[str] = Counter()
    both = 0
    for request in data:
        view = request.relation_view
        assert view is not None
        assert view.names == NAMES[request.relation or ""]
        types = Counter(probe.type for probe in view.specificity)
        counts += types
        both += len(types) == 2
        for probe in view.specificity:
            assert probe.answers
            inside = PAIR.fullmatch(probe.prompt)
            assert inside is not None
            if probe.type == "same_pair":
                assert probe.prompt.startswith(f"The relation between {request.subject} and ")
                assert not probe.prompt.endswith(f" and {request.target_true} is")
            else:
                assert view.names[0] in probe.answers
    # The seed has 284,102 relation paraphrases for 43,838 prompts of both operations, 6.48 each.
    paraphrases = sum(len(r.relation_view.paraphrases) for r in data if r.relation_view)
    assert 6.4 < paraphrases / 2393 < 6.7
    assert counts["same_relation"] == 5 * 2393
    assert counts["same_pair"] == 440
    assert both == 220
