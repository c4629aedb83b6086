"""Files as people who edit models have them: paired lists, missing answers, the call's schema."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from errata import Request
from errata.datasets import load
from errata.edits.request import Probe
from errata.errors import DatasetError
from tests.helpers import ROOT

CASES = ROOT / "tests" / "data" / "cases"


def read(name: str, file: str) -> list[Request]:
    return load(name, CASES / file).requests()


@pytest.mark.parametrize("name", ["counterfact", "knowedit"])
def test_lists_of_prompts_and_answers_are_paired(name: str) -> None:
    first, second = read(name, "flat_paired_lists.json")
    beside = [(p.prompt, p.answers) for p in (*second.neighbourhood, *second.locality)]
    assert beside == [("Tom Reed works as", ("tailor",)), ("Ann Reed works as", ("nurse",))]
    assert (first.case_id, second.case_id) == ("17", "18")
    assert [(p.prompt, p.answers) for p in first.locality] == [
        ("The capital of Estland is", ("Ostburg",))
    ]
    assert first.portability[0].answers == ("Ivo Lund",)


@pytest.mark.parametrize("name", ["counterfact", "knowedit"])
def test_lists_of_unequal_length_name_record_and_field(name: str) -> None:
    with pytest.raises(DatasetError, match="holds 1 answers, locality_prompt 2 prompts") as caught:
        read(name, "unequal_lists.json")
    assert (caught.value.index, caught.value.field) == (1, "locality_ground_truth")


@pytest.mark.parametrize("name", ["counterfact", "knowedit"])
def test_no_answer_is_invented_for_a_locality_prompt(name: str) -> None:
    (request,) = read(name, "flat_locality_without_answer.json")
    assert request.target_true == "Mount Ra"
    assert request.neighbourhood == ()
    assert request.locality == (
        Probe(prompt="The longest river of Estland is", type="neighbourhood"),
    )


def test_a_missing_field_is_named_beside_those_that_are_there() -> None:
    rewrite = {"prompt": "{} is in", "subject": "Bo", "target_new": {"id": "Q1"}}
    with pytest.raises(DatasetError, match=r"missing \('requested_rewrite.target_new' has .* id\)"):
        load("counterfact", [{"case_id": 0, "requested_rewrite": rewrite}])
    with pytest.raises(DatasetError, match=r"missing \(the record has the fields subject\)"):
        load("counterfact", [{"subject": "Bo"}])


def test_two_unicode_forms_of_a_name_are_told(tmp_path: Path) -> None:
    record = {"prompt": "Beyonce\u0301 sings in", "subject": "Beyonc\u00e9", "target_new": "x"}
    with pytest.raises(DatasetError, match="another Unicode form"):
        load("counterfact", [record])


def test_a_record_without_an_id_is_no_case_of_another_record() -> None:
    bare = {"prompt": "The town of Bo is", "subject": "Bo", "target_new": "Rome"}
    other = {"prompt": "The tongue of Ada is", "subject": "Ada", "target_new": "English"}
    mixed = load("counterfact", [bare, {**other, "case_id": 0}])
    assert [request.case_id for request in mixed] == [None, "0"]
    assert mixed.case_count == 2


def test_the_edits_of_a_chain_are_one_case_without_an_id_too() -> None:
    file = ROOT / "tests" / "data" / "datasets" / "mquake.json"
    records = json.loads(file.read_text())
    for one in records:
        del one["case_id"]
    data = load("mquake", records)
    assert data.case_count == len(records) < len(data)
    assert all(len({request.case_id for request in case}) == 1 for case in data.cases())
    assert all(p.group == r.case_id for r in data for p in r.portability if p.type == "multi_hop")


def test_the_same_request_twice_in_one_case_is_a_bad_record(tmp_path: Path) -> None:
    fact = {"prompt": "The capital of {} is", "subject": "Vesland", "target_new": "Sudport"}
    other = {**fact, "target_new": "Norhaven"}
    records = [{**fact, "case_id": 1}, {**fact, "case_id": 1}, {**other, "case_id": 1},
               {**fact, "case_id": 2}, fact, fact]  # fmt: skip
    with pytest.raises(DatasetError, match=r"'1' has the same request twice.*0 and 1.*Vesland is'"):
        load("jsonl", records)
    data = load("jsonl", records, skip_bad=True)
    assert (data.size, data.case_count, data.skipped) == (5, 4, 1)
    assert [[r.target_new for r in case] for case in data.cases(2)] == [
        ["Sudport", "Norhaven"], ["Sudport"],
    ]  # fmt: skip
    assert load("jsonl", records, limit=1, skip_bad=True).size == 2


def test_white_space_that_is_taken_off_is_said_once_with_the_record(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fact = {"prompt": "The capital of {} is", "subject": "Vesland", "target_new": "Sudport"}
    file = tmp_path / "own.jsonl"
    rows = [fact, {**fact, "target_new": " Istrand"}, {**fact, "prompt": "{} is in "}]
    file.write_text("\n".join(map(json.dumps, rows)))
    data = load("jsonl", file)
    assert [request.target_new for request in (*data, *data)].count("Istrand") == 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert f"target_new ' Istrand' in {file}, record 1 (counted from 0) and 1 more." in said


@pytest.mark.parametrize("name", ["counterfact", "knowedit"])
def test_the_call_schema_is_the_records_it_means(name: str) -> None:
    capital, job = read(name, "call_schema.json")
    assert (capital.prompt, capital.subject, capital.target_new, capital.target_true) == (
        "The capital of {} is", "Vesland", "Sudport", "Norhaven",
    )  # fmt: skip
    assert (job.text, job.paraphrases) == ("Orla Penn works as", ("The job of Orla Penn is",))
    assert [(p.prompt, p.answers) for p in job.locality] == [("Tom Reed works as", ("tailor",))]
    assert job.portability[0].answers == ("a cockpit",)


def test_a_call_says_what_does_not_fit_and_what_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    call = json.loads((CASES / "call_schema.json").read_text())
    file = tmp_path / "call.json"
    file.write_text(json.dumps({**call, "target_new": ["Sudport"]}))
    with pytest.raises(DatasetError, match="holds 1 entries, prompts 2") as caught:
        load("counterfact", file)
    assert caught.value.field == "target_new"

    file.write_text(json.dumps({**call, "loc_prompts": ["a", "b"]}))
    with caplog.at_level(logging.WARNING, "errata"):
        data = load("counterfact", file)
        assert len(list(data)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{file}: not read, as errata has no use for it: loc_prompts"
    ]


def test_a_call_of_one_request_may_hold_plain_values(tmp_path: Path) -> None:
    file = tmp_path / "call.json"
    file.write_text(
        json.dumps(
            {
                "prompts": "Orla Penn works as", "subject": "Orla Penn", "target_new": "pilot",
                "locality_inputs": {"near": {"prompt": ["Tom Reed works as", "Ann Reed works as"],
                                             "ground_truth": ["tailor", "nurse"]}},
            }
        )
    )  # fmt: skip
    (request,) = load("counterfact", file)
    assert [p.answers for p in request.locality] == [("tailor",), ("nurse",)]


def test_records_in_memory_are_read_as_those_of_a_file() -> None:
    for file in ("flat_paired_lists.json", "call_schema.json"):
        records = json.loads((CASES / file).read_text())
        data = load("counterfact", records)
        assert data.requests() == read("counterfact", file)
        once = iter([records] if isinstance(records, dict) else records)
        assert load("counterfact", once).requests() == data.requests()
        assert (data.source, len(data.digest)) == ("the records given", 64)


def test_a_record_in_memory_that_is_wrong_is_named_by_its_place() -> None:
    records = json.loads((CASES / "unequal_lists.json").read_text())
    with pytest.raises(DatasetError, match="the records given, record 1"):
        load("counterfact", records)
    with pytest.raises(DatasetError, match="the records given, record 0"):
        load("counterfact", ["no record"])  # type: ignore[list-item]


@pytest.mark.parametrize("given", [3, b"file.json"])
def test_what_is_neither_a_path_nor_records_is_refused(given: object) -> None:
    with pytest.raises(DatasetError, match=r"no path: give a file.*or the records themselves"):
        load("counterfact", given)  # type: ignore[arg-type]
