"""Loading: what a dataset says about itself, what is refused, and readers of other packages."""

from __future__ import annotations

import doctest
import gzip
import hashlib
import json
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import errata.datasets
from errata import Request
from errata.datasets import READERS, atlas, cases_of, dataset, load, pararel, probes
from errata.edits.subjects import subject_place as place
from errata.errors import ConfigError, DatasetError, PluginError, RequestError, UnknownNameError
from errata.evaluate import PROTOCOLS
from tests.helpers import ROOT

SAMPLES = ROOT / "tests" / "data" / "datasets"


def request(number: int, case: str | None) -> dict[str, Any]:
    fields = {"prompt": "{} lies in", "subject": f"Town {number}", "target_new": "Palonia"}
    return fields if case is None else {**fields, "case_id": case}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


# -- what a dataset is -----------------------------------------------------------------------------


def test_a_dataset_is_read_again_at_each_iteration() -> None:
    data = load("counterfact", SAMPLES / "counterfact.json")
    assert list(data) == list(data) == data.requests()
    assert (len(data), data.case_count, data.skipped, data.retain) == (2, 2, 0, ())
    assert data.protocols == ("counterfact", "generation")
    assert data.source == str(SAMPLES / "counterfact.json")


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    content = (SAMPLES / "zsre.json").read_bytes()
    (tmp_path / "a.json").write_bytes(content)
    (tmp_path / "b.json").write_bytes(content.replace(b"kites", b"kilts"))
    first, second = (load("zsre", tmp_path / name).digest for name in ("a.json", "b.json"))
    assert first == hashlib.sha256(content).hexdigest()
    assert first != second


def test_compressed_and_marked_files_hold_the_same_requests(tmp_path: Path) -> None:
    content = (SAMPLES / "counterfact.json").read_bytes()
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(content))
    (tmp_path / "c.json").write_bytes(b"\xef\xbb\xbf" + content)
    write(tmp_path / "c.jsonl", json.loads(content))
    expected = load("counterfact", SAMPLES / "counterfact.json").requests()
    for name in ("c.json.gz", "c.json", "c.jsonl"):
        assert load("counterfact", tmp_path / name).requests() == expected


def test_limit_counts_whole_cases_and_reads_no_further(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    ids = ["a", "a", "b", "b", "b", None, None, "c"]
    write(path, [request(i, case) for i, case in enumerate(ids)])
    assert [len(load("jsonl", path, limit=n)) for n in (1, 2, 3, 4, 5, 9)] == [2, 5, 6, 7, 8, 8]
    every = load("jsonl", path).requests()
    later = load("jsonl", path, start=2, limit=2)
    assert later.requests() == every[5:7]
    assert later.case_count == 2
    assert load("jsonl", path, start=1).requests() == every[2:]
    with pytest.raises(ConfigError, match="has no more cases"):
        load("jsonl", path, start=5)
    with path.open("a") as handle:
        handle.write('{"prompt": "cut off')
    assert load("jsonl", path, limit=4).case_count == 4
    with pytest.raises(DatasetError, match="cut off"):
        load("jsonl", path)


def test_cases_are_neighbours_of_one_id() -> None:
    data = load("jsonl", SAMPLES / "requests.jsonl")
    assert [[r.subject for r in case] for case in data.cases()] == [
        ["Veldonia", "Kandor"],
        ["Jon Marl"],
    ]
    assert data.case_count == 2
    assert len(list(data.cases(1))) == 1
    assert [r.subject for r in data.requests(1)] == ["Veldonia"]


@given(st.lists(st.sampled_from(["a", "b", None]), max_size=12))
def test_grouping_loses_and_reorders_nothing(ids: list[str | None]) -> None:
    requests = [Request(**request(i, case)) for i, case in enumerate(ids)]
    cases = list(cases_of(requests))
    assert [r for case in cases for r in case] == requests
    for case in cases:
        assert len(case) == 1 or len({r.case_id for r in case} - {None}) == 1


def test_a_case_that_comes_back_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [request(i, c) for i, c in enumerate("aba")])
    with pytest.raises(DatasetError, match=r"'a' comes back after other .* 2 .*as request 0 "):
        load("jsonl", path)
    data = load("jsonl", path, skip_bad=True)
    assert [r.case_id for r in data] == ["a", "b"]
    assert (data.size, data.case_count, data.skipped) == (2, 2, 1)


def test_split_picks_records_that_name_it(tmp_path: Path) -> None:
    records = json.loads((SAMPLES / "counterfact_flat.json").read_text())
    path = write(
        tmp_path / "s.jsonl", [{**records[0], "split": "train"}, {**records[1], "split": "edit"}]
    )
    assert [r.subject for r in load("counterfact", path, split="edit")] == ["Jon Marl"]
    with pytest.raises(DatasetError, match="holds no records of the split 'test'"):
        load("counterfact", path, split="test")
    with pytest.raises(DatasetError, match="no field 'split'"):
        load("counterfact", SAMPLES / "counterfact_flat.json", split="edit")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [request(1, "a")])
    data = load("jsonl", path)
    write(path, [request(1, "a"), request(2, "b")])
    with pytest.raises(DatasetError, match="has changed since it was loaded"):
        data.requests()


# -- what is refused -------------------------------------------------------------------------------


def test_a_bad_record_is_named_or_left_out_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    path = SAMPLES / "knowedit_zsre.json"
    with pytest.raises(DatasetError, match="skip_bad") as caught:
        load("knowedit", path)
    error = caught.value
    assert (error.file, error.index, error.field) == (str(path), 1, "prompt")
    assert isinstance(error, ValueError)
    with caplog.at_level(logging.INFO, "errata"):
        data = load("knowedit", path, skip_bad=True)
    assert (len(data), data.skipped) == (1, 1)
    assert data.problems[0].index == 1
    each, summary = caplog.records
    assert each.levelno == logging.INFO
    assert "record 1" in each.getMessage()
    assert summary.levelno == logging.WARNING
    assert "1 left out as bad" in summary.getMessage()
    assert len(data.requests()) == 1


def test_a_damaged_file_is_never_skipped(tmp_path: Path) -> None:
    content = (SAMPLES / "counterfact.json").read_bytes()
    (tmp_path / "half.json").write_bytes(content[: len(content) * 3 // 4])
    with pytest.raises(DatasetError, match=r"half\.json, record 1 .*cut off"):
        load("counterfact", tmp_path / "half.json", skip_bad=True)


def test_a_number_of_thousands_of_digits_is_no_bug_of_errata(tmp_path: Path) -> None:
    digits = "9" * 5000
    text = json.dumps(request(1, "a"))[:-1] + f', "case_id": {digits}}}'
    (tmp_path / "long.jsonl").write_text(f"{text}\n")
    with pytest.raises(DatasetError, match="line 1: a number has more digits"):
        load("jsonl", tmp_path / "long.jsonl")
    with pytest.raises(RequestError, match="case_id: Exceeds"):
        Request.parse({**request(1, "a"), "case_id": 10**5000})


def test_a_file_of_another_format_is_told_by_its_fields() -> None:
    with pytest.raises(DatasetError, match=r"field 'prompt': missing \(the record has the fields"):
        load("counterfact", SAMPLES / "zsre.json")
    with pytest.raises(DatasetError, match="none of 2 records could be read; the first"):
        load("counterfact", SAMPLES / "zsre.json", skip_bad=True)


@pytest.mark.parametrize(
    ("name", "change", "field", "says"),
    [
        ("counterfact", {"requested_rewrite.subject": ""}, "requested_rewrite.subject", "empty"),
        ("counterfact", {"requested_rewrite.target_new.str": 5.5}, None, None),
        ("counterfact", {"requested_rewrite.target_new.str": ["x"]},
         "requested_rewrite.target_new.str", "a list, not a text"),
        ("counterfact", {"requested_rewrite.target_true": None},
         "requested_rewrite.target_true.str", "missing"),
        ("counterfact", {"requested_rewrite.prompt": "{} and {}"},
         "requested_rewrite.prompt", "several {}"),
        ("counterfact", {"paraphrase_prompts": [{"a": 1}]}, "paraphrase_prompts[0]", "an object"),
        ("zsre", {"alt": " "}, "alt", "empty"),
        ("zsre", {"src": "What is made by Arbor Partners, Arbor Partners?"}, "src", "2 times"),
        ("zsre", {"answers": [], "pred": None}, "answers", "no answer"),
        ("mquake", {"requested_rewrite": []}, "requested_rewrite", "no edit"),
        ("mquake", {"questions": []}, "questions", "no multi-hop question"),
        ("mquake", {"new_answer": None}, "new_answer", "missing"),
        ("mquake", {"requested_rewrite": [{"prompt": "{} is", "target_new": {"str": "x"}}]},
         "requested_rewrite[0].subject", "missing"),
        ("ripple_edits", {"edit.relation": "TEXTURE"}, "edit.prompt", "is not worded as"),
        ("ripple_edits", {"edit.original_fact.prompt": "Something else."},
         "edit.original_fact.prompt", "not about the same subject"),
        ("knowedit_wiki", {"locality": [1]}, "locality", "must be an object"),
        ("knowedit_wiki", {"locality": {"Forgetfulness": [{"prompt": "a", "ground_truth": {}}]}},
         "locality.Forgetfulness[0].ground_truth", "an object where a text"),
        ("knowedit_convsent", {"pos": [], "neg": []}, None, "reply"),
        ("klob_r", {"single_knowledge": ["a", "b"]}, "single_knowledge", "[subject, relation"),
        ("klob_c", {"prompts": ["_ speaks it"]}, "prompts", "no prompt that ends"),
        ("scotus", {"label": None}, "label", "missing"),
        ("rake", {"requested_rewrite.add_rel_prompt": "no place"},
         "requested_rewrite.add_rel_prompt", "no place {}"),
    ],
)  # fmt: skip
def test_each_wrong_field_is_named(
    tmp_path: Path, name: str, change: dict[str, Any], field: str | None, says: str | None
) -> None:
    source = next(SAMPLES.glob(f"{name}.json*"))
    text = source.read_text(encoding="utf-8")
    record = json.loads(text)[0] if text.startswith("[") else json.loads(text.splitlines()[0])
    for path, value in change.items():
        inner = record
        *parents, last = path.split(".")
        for key in parents:
            inner = inner[key]
        inner[last] = value
    file = write(tmp_path / "one.jsonl", [record])
    reader = name.split("_")[0] if name.startswith(("knowedit", "klob")) else name
    if says is None:
        assert load(reader, file).requests()[0].target_new == "5.5"
        return
    with pytest.raises(DatasetError) as caught:
        load(reader, file)
    assert says in str(caught.value)
    assert caught.value.index == 0
    assert field is None or caught.value.field == field


@pytest.mark.parametrize("record", [3, "a text", [1], None, True])
@pytest.mark.parametrize("name", sorted(set(READERS) - {"atlas", "calibration", "pararel"}))
def test_a_record_that_is_no_object_is_bad_for_every_reader(
    tmp_path: Path, name: str, record: Any
) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps([record]), encoding="utf-8")
    with pytest.raises(DatasetError) as caught:
        load(name, path)
    assert caught.value.index == 0


def test_wrong_arguments_say_what_is_right(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'counterfact'"):
        load("counterfac", "x.json")
    with pytest.raises(UnknownNameError, match="Did you mean 'subset'"):
        load("knowedit", SAMPLES / "knowedit_wiki.json", subsets="ZsRE")
    with pytest.raises(ConfigError, match="at least 1"):
        load("atlas", limit=0)
    with pytest.raises(ConfigError, match="start is -1"):
        load("atlas", start=-1)
    with pytest.raises(ConfigError, match="It was published at: Meng"):
        load("counterfact")
    with pytest.raises(ConfigError, match="shipped with errata"):
        load("atlas", "x.json")
    with pytest.raises(DatasetError, match="no such file"):
        load("counterfact", tmp_path / "none.json")
    with pytest.raises(DatasetError, match="no such file"):
        load("counterfact", "folder/none.json")
    with pytest.raises(UnknownNameError, match="subset of KnowEdit"):
        load("knowedit", SAMPLES / "knowedit_wiki.json", subset="wiki")
    with pytest.raises(ConfigError, match="sentiment"):
        load("knowedit", SAMPLES / "knowedit_convsent.json", sentiment="good")
    with pytest.raises(ConfigError, match="kind"):
        load("atlas", kind="insert")
    with pytest.raises(ConfigError, match="limit is -1"):
        load("atlas").requests(-1)


# -- where the subject stands ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "subject", "found"),
    [
        ("The capital of {} is", "France", ("The capital of {} is", "France")),
        ("The capital of France is", "France", ("The capital of {} is", "France")),
        ("Ana lives in Banana Town", "Ana", ("{} lives in Banana Town", "Ana")),
        ("where is the eiffel tower?", "Eiffel Tower", ("where is the {}?", "eiffel tower")),
        ("What is France's capital?", " France ", ("What is {}'s capital?", "France")),
        ("法国的首都是", "法国", ("{}的首都是", "法国")),
        ("Is C++ (1985) old?", "C++ (1985)", ("Is {} old?", "C++ (1985)")),
    ],
)
def test_the_subject_is_found(prompt: str, subject: str, found: tuple[str, str]) -> None:
    assert place(prompt, subject) == found


@pytest.mark.parametrize(
    ("prompt", "subject", "says"),
    [
        ("New York, New York", "New York", "2 times"),
        ("Who is the mayor?", "Paris", "does not stand"),
        ("{} or {}", "Paris", "several"),
        ("The artichoke", "art", "part of another word"),
        ("The Finnish language", "Finn", "part of another word"),
        ("the paris of the west, Paris Hall", "PARIS", "2 times"),
        ("The mayor is", " ", "empty"),
    ],
)
def test_a_place_that_is_not_clear_is_refused(prompt: str, subject: str, says: str) -> None:
    found = place(prompt, subject)
    assert isinstance(found, str)
    assert says in found


@given(st.text(min_size=1, max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_a_placed_subject_gives_the_prompt_back(subject: str, before: str, after: str) -> None:
    prompt = f"{before} {subject} {after}"
    found = place(prompt, subject)
    if isinstance(found, tuple) and "{}" not in prompt:
        template, surface = found
        assert template.count("{}") == 1
        assert template.replace("{}", surface) == prompt


# -- the catalogue ---------------------------------------------------------------------------------


def test_every_reader_says_what_it_is_and_is_measured_by_known_protocols() -> None:
    known = {protocol.name for protocol in PROTOCOLS}
    for name, reader in READERS.items():
        assert reader.name == name
        assert reader.summary
        assert reader.source
        assert reader.licence
        assert reader.protocols
        assert set(reader.protocols) <= known
    assert "counterfact" in READERS
    assert "nothing" not in READERS
    assert len(READERS) == len(list(READERS))


@pytest.mark.parametrize("module", [errata.datasets, dataset, pararel, probes, atlas])
def test_the_examples_in_docstrings_run(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


def test_the_docs_name_every_reader_and_option() -> None:
    text = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    for name, reader in READERS.items():
        assert f"`{name}`" in text
        for option in reader.options:
            assert f"`{option}`" in text, f"{name} takes {option}"


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, points: str, code: str = ""
) -> None:
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[errata.datasets]\n{points}\n")
    module = package.replace("-", "_")
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, module, raising=False)


STRANGER = '''
from errata.datasets import DatasetReader
from errata.errors import DatasetError

def towns(record, country="Palonia"):
    """Towns and their countries."""
    return {"prompt": "{} lies in", "subject": record.text("town"), "target_new": country}

def read(source):
    for record in source.records():
        yield from ()

def subscripts(record):
    return {"prompt": "{} lies in", "subject": record["town"], "target_new": "Tess"}

def nothing(record):
    record.text("town")

def letters(record):
    return "abc"

def lazily(record):
    yield {"prompt": "{} lies in", "subject": record.text("town"), "target_new": "Tess"}
    yield 1 / 0

def several(record):
    return [{"prompt": "{} lies in", "subject": record.text("town"), "target_new": target}
            for target in ("Tess", "Vale")]

def ports(record):
    return [towns(record)] if record.get("port") else []

def failing(source):
    for record in source.records():
        yield len(record)

def giving(source):
    yield from source.records()

def given_nothing(source):
    return None

about = {"summary": "s", "source": "x", "licence": "y", "protocols": (), "read": read}
rivers = DatasetReader(name="rivers", **about)
misnamed = DatasetReader(name="other", **about)
read_failing = DatasetReader(name="thing", **{**about, "read": failing})
read_giving = DatasetReader(name="thing", **{**about, "read": giving})
read_nothing = DatasetReader(name="thing", **{**about, "read": given_nothing})
number = 3
'''


def test_a_function_of_another_package_is_a_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = "towns = my_towns:towns\nrivers = my_towns:rivers"
    install(tmp_path / "p", monkeypatch, "my-towns", points, STRANGER)
    assert {"towns", "rivers"} <= set(READERS)
    assert "my_towns" not in sys.modules  # listing imports nothing
    assert READERS["towns"].summary == "Towns and their countries."
    assert READERS["rivers"].licence == "y"
    path = write(tmp_path / "t.jsonl", [{"town": "Kandor"}, {"city": "Istrand"}])
    with pytest.raises(DatasetError, match=r"record 1 .*field 'town': missing"):
        load("towns", path)
    data = load("towns", path, skip_bad=True, country="Tess")
    assert [(r.text, r.target_new) for r in data] == [("Kandor lies in", "Tess")]
    with pytest.raises(UnknownNameError, match="option of towns"):
        load("towns", path, land="Tess")


def test_records_of_which_a_reader_makes_nothing_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    points = "ports = my_towns:ports\nrivers = my_towns:rivers"
    install(tmp_path / "p", monkeypatch, "my-towns", points, STRANGER)
    inland = [{"town": "Kandor"}, {"town": "Istrand"}]
    path = write(tmp_path / "t.jsonl", inland)
    for name in ("ports", "rivers"):
        said = f"t.jsonl: the reader '{name}' made no case of any of its 2 records"
        with pytest.raises(DatasetError, match=said):
            load(name, path)
    with pytest.raises(DatasetError, match="made no case of any of its 2 records"):
        load("ports", path, start=1)
    with pytest.raises(DatasetError, match="none of 1 records could be read, and of 2 more no"):
        load("ports", [*inland, {"port": True}], skip_bad=True)
    assert len(load("ports", [*inland, {"town": "Vale", "port": True}])) == 1
    assert "of 2 of the 3 records read, the reader 'ports' made no case" in caplog.text


def test_two_packages_with_one_name_are_an_error_naming_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "a", monkeypatch, "first-pack", "towns = first_pack:towns", STRANGER)
    install(tmp_path / "b", monkeypatch, "second-pack", "towns = second_pack:towns", STRANGER)
    with pytest.raises(PluginError, match=r"'towns': \S+-pack .* and \S+-pack"):
        list(READERS)


def test_a_stranger_cannot_take_the_name_of_a_reader_that_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "a", monkeypatch, "my-towns", "zsre = my_towns:towns", STRANGER)
    with pytest.raises(PluginError, match="'zsre': errata itself and my-towns"):
        load("atlas")


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("missing", "could not be loaded: AttributeError"),
        ("number", "a function of one record, not int"),
        ("misnamed", "must have name='thing', not 'other'"),
    ],
)
def test_a_broken_stranger_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, says: str
) -> None:
    install(tmp_path / "a", monkeypatch, "my-towns", f"thing = my_towns:{target}", STRANGER)
    with pytest.raises(PluginError) as caught:
        READERS["thing"]
    assert says in str(caught.value)
    assert "my-towns" in str(caught.value)
    assert READERS["atlas"].name == "atlas"


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("subscripts", r"reader my_towns\.subscripts failed at .*t\.jsonl, record 0 .*TypeError: "),
        ("nothing", r"reader my_towns\.nothing returned None for .*record 0 .*must be a Request"),
        ("letters", r"reader my_towns\.letters returned 'a' for .*record 0"),
        ("lazily", r"reader my_towns\.lazily failed at .*record 0 .*ZeroDivisionError"),
        ("read_failing", r"'thing' \(my_towns:read_failing from my-towns\) failed: TypeError"),
        ("read_giving", r"'thing' \(my_towns:read_giving from my-towns\) gives Record"),
        ("read_nothing", r"'thing' \(my_towns:read_nothing from my-towns\) failed: TypeError"),
    ],
)
def test_a_strangers_reader_that_fails_is_named_with_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, says: str
) -> None:
    install(tmp_path / "a", monkeypatch, "my-towns", f"thing = my_towns:{target}", STRANGER)
    path = write(tmp_path / "t.jsonl", [{"town": "Kandor"}])
    with pytest.raises(PluginError, match=says):
        load("thing", path, skip_bad=True)


def test_a_strangers_function_may_return_the_fields_of_several_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "a", monkeypatch, "my-towns", "thing = my_towns:several", STRANGER)
    path = write(tmp_path / "t.jsonl", [{"town": "Kandor"}, {"city": "Istrand"}])
    data = load("thing", path, skip_bad=True)
    assert [r.target_new for r in data] == ["Tess", "Vale"]
    assert data.skipped == 1
