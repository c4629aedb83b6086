"""The recorded files of published datasets: nothing is lost, and what is bad is known to be."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from errata.datasets import Dataset, load
from errata.datasets.ripple_edits import FRAMES, WORDINGS
from tests.helpers import shared_path


def real(name: str, *parts: str, **options: Any) -> Dataset:
    return load(name, shared_path("data", *parts), **options)


def source(*parts: str) -> Any:
    return json.loads(shared_path("data", *parts).read_text(encoding="utf-8"))


def test_real_counterfact_is_whole() -> None:
    parts = ("counterfact", "counterfact_full_2393.json")
    data, records = real("counterfact", *parts), source(*parts)
    assert len(data) == data.case_count == len(records) == 2393
    for request, record in zip(data, records, strict=True):
        rewrite = record["requested_rewrite"]
        assert request.text == rewrite["prompt"].replace("{}", rewrite["subject"])
        assert request.target_new == rewrite["target_new"]["str"]
        assert request.target_true == rewrite["target_true"]["str"]
        assert request.relation == rewrite["relation_id"]
        assert request.case_id == str(record["case_id"])
        for field, published in (
            ("paraphrases", "paraphrase_prompts"),
            ("generation", "generation_prompts"),
        ):
            assert list(getattr(request, field)) == [p.strip() for p in record[published]]
        for field, published in (
            ("neighbourhood", "neighborhood_prompts"),
            ("attribute", "attribute_prompts"),
        ):
            found = [p.prompt for p in getattr(request, field)]
            assert found == [p.strip() for p in record[published]]


@pytest.mark.slow
def test_real_counterfact_thin_is_whole() -> None:
    data = real("counterfact", "counterfact", "counterfact_thin.jsonl")
    assert (len(data), data.skipped) == (21_919, 0)
    full = {r.case_id: r for r in real("counterfact", "counterfact", "counterfact_full_2393.json")}
    same = 0
    for request in data:
        whole = full.get(request.case_id)
        if whole is not None:
            assert (request.text, request.target_new, request.relation) == (
                whole.text, whole.target_new, whole.relation,
            )  # fmt: skip
            assert request.neighbourhood[0] in whole.neighbourhood
            same += 1
    assert same == 2393


KNOWEDIT = [
    ("ZsRE_ZsRE-test-all", "ZsRE", "modify", 1304, 3),
    ("wiki_counterfact_train_cf", "wiki_counterfact", "modify", 1428, 0),
    ("wiki_counterfact_test_cf", "wiki_counterfact", "modify", 885, 0),
    ("wiki_recent_recent_train", "wiki_recent", "insert", 570, 0),
    ("WikiBio_wikibio-train-all", "WikiBio", "text", 464, 0),
    ("WikiBio_wikibio-test-all", "WikiBio", "text", 306, 0),
    ("Convsent_blender_test", "ConvSent", "sentiment", 800, 0),
]


@pytest.mark.parametrize(("file", "subset", "kind", "count", "bad"), KNOWEDIT)
def test_real_knowedit_is_whole(file: str, subset: str, kind: str, count: int, bad: int) -> None:
    parts = ("knowedit", f"benchmark_{file}.json")
    data, records = real("knowedit", *parts, subset=subset, skip_bad=True), source(*parts)
    assert len(data) + data.skipped == count == len(records)
    assert data.skipped == bad
    requests = {place: case[0] for place, case in data.placed_cases()}
    assert {r.case_id for r in requests.values()} == {None}  # the files give none
    assert {r.kind for r in requests.values()} == {kind}
    for index, record in enumerate(records):
        request = requests.get(index)
        if request is None:
            assert index in {problem.index for problem in data.problems}
            continue
        if "prompt" in record:
            assert request.text == record["prompt"].strip()
        for field in ("portability", "locality"):
            published = [
                [item["prompt"], item["ground_truth"]]
                for items in record.get(field, {}).values()
                for item in items
            ]
            kept = {(p.prompt, p.answers) for p in getattr(request, field)}
            for prompt, answers in published:
                flat = tuple(dict.fromkeys(flatten(answers)))
                assert (prompt.strip(), flat) in kept or (field == "portability" and not flat)


def flatten(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    return [text for item in value for text in flatten(item)]


@pytest.mark.parametrize("part", ["train", "test"])
def test_real_sanitation_is_whole(part: str) -> None:
    parts = ("knowedit", f"benchmark_trivia_trivia_qa_{part}.json")
    data, record = real("knowedit", *parts), source(*parts)
    forget, keep = record.values()
    assert (len(data), len(data.retain)) == (80, 453) == (len(forget), len(keep))
    assert [r.text for r in data] == [item["question"].strip() for item in forget]
    assert {r.target_new for r in data} == {"I don't know."}
    assert [p.answers for p in data.retain] == [(item["ground_truth"].strip(),) for item in keep]


def test_real_zsre_is_whole() -> None:
    data = real("zsre", "zsre", "zsre_mend_train-1k.json", skip_bad=True)
    assert (len(data), [problem.field for problem in data.problems]) == (998, ["alt", "alt"])
    whole = real("zsre", "zsre", "zsre_mend_train-1k.json", target="answers")
    records = source("zsre", "zsre_mend_train-1k.json")
    assert len(whole) == len(records) == 1000
    for request, record in zip(whole, records, strict=True):
        assert request.text == record["src"].strip()
        assert {request.target_new, *request.aliases} == {a.strip() for a in record["answers"]}
        assert request.locality[0].prompt == record["loc"].strip()


def test_real_known_1000_is_whole() -> None:
    data = real("known_1000", "known_1000", "known_1000.json")
    records = source("known_1000", "known_1000.json")
    assert len(data) == len(records) == 1209
    for request, record in zip(data, records, strict=True):
        assert (request.text, request.target_new) == (record["prompt"], record["attribute"])


@pytest.mark.slow
def test_real_pararel_is_whole() -> None:
    folder = shared_path("data", "pararel")
    data = load("pararel", folder).requests()
    facts: Counter[str] = Counter()
    true: dict[tuple[str, str], set[str]] = {}
    for path in (folder / "data" / "trex_lms_vocab").glob("*.jsonl"):
        pairs = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        facts[path.stem] = len({(p["sub_label"], p["obj_label"]) for p in pairs})
        for pair in pairs:
            true.setdefault((path.stem, pair["sub_label"]), set()).add(pair["obj_label"])
    left_out = {"P31", "P527"}  # no patterns in the repository
    found = Counter(r.relation for r in data)
    assert found == {name: number for name, number in facts.items() if name not in left_out}
    assert sum(found.values()) == 27_593
    for request in data:
        assert request.target_true in true[request.relation or "", request.subject]
        assert request.target_new not in true[request.relation or "", request.subject]
    again = load("pararel", folder, relations=["P37"]).requests()
    assert again == [r for r in data if r.relation == "P37"]
    assert again != load("pararel", folder, relations=["P37"], seed=1).requests()


def test_ripple_edits_sentences_of_real_facts_are_cut_where_knowedit_cuts_them(
    tmp_path: Path,
) -> None:
    """KnowEdit took its wiki facts from RippleEdits, and names subject and object."""
    records, expected = [], []
    for file, *_ in KNOWEDIT[1:4]:
        for fact in source("knowedit", f"benchmark_{file}.json"):
            relation = relation_of(fact["prompt"].replace(fact["subject"], "{}"))
            edit = {"prompt": f"{fact['prompt']} {fact['target_new']}.", "relation": relation}
            true = fact.get("ground_truth")
            if (true or "").strip():
                original = {"prompt": f"{fact['prompt']} {true}.", "relation": relation}
                edit["original_fact"] = original
            records.append({"edit": edit})
            expected.append(
                (fact["subject"], fact["target_new"].strip(), (true or "").strip() or None)
            )
    path = tmp_path / "ripple.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    data = load("ripple_edits", path, skip_bad=True)
    # "The name of the author of The nipah virus fusion protein is cleaved … is Toshio Sato."
    assert (len(data), data.skipped) == (2882, 1)
    for place, (request,) in data.placed_cases():
        assert (request.subject, request.target_new, request.target_true) == expected[place]


def relation_of(template: str) -> str:
    """Return the id that RippleEdits has for a wording."""
    for relation, wording in WORDINGS.items():
        if wording == template:
            return relation
    for frame in FRAMES:
        pattern = re.escape(frame).replace(r"\{noun\}", "(.+?)")
        if match := re.fullmatch(pattern, template):
            return match[1].upper().replace(" ", "_")
    raise AssertionError(f"no wording for {template!r}")


def test_knowedit_sentiments_are_drawn_by_seed_and_place() -> None:
    path = shared_path("data", "knowedit", "benchmark_Convsent_blender_test.json")
    data = [load("knowedit", path, seed=seed).requests() for seed in (0, 0, 1)]
    assert data[0] == data[1] != data[2]
    share = sum(r.relation == "positive" for r in data[0]) / 800
    assert 0.44 < share < 0.56  # 3.4 standard deviations
    assert load("knowedit", path, limit=5).requests() == data[0][:5]
