"""The zoo: its world, its benchmark, its models and its trainer."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errata import zoo
from errata.cli.app import app
from errata.datasets import atlas, load
from errata.errors import ConfigError, UnknownNameError
from errata.zoo.atlas import corpus as corpora
from errata.zoo.atlas.benchmark import beside_the_benchmark, build_cases
from errata.zoo.atlas.relations import RELATIONS, UNKNOWN, relation_by_id
from errata.zoo.atlas.tokenizer import train_tokenizer
from errata.zoo.atlas.train import Recipe, train
from errata.zoo.atlas.two_hops import TWO_HOPS
from errata.zoo.atlas.world import World, make_world
from tests.helpers import interrupted

PRESENT = [name for name, model in zoo.MODELS.items() if model.is_present]


@pytest.mark.parametrize("present", [True, False])
def test_the_list_says_where_an_atlas_model_comes_from(
    present: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo.ZooModel, "is_present", present)
    listed = json.loads(CliRunner().invoke(app, ["zoo", "list", "--json"]).stdout)["models"]
    (row,) = [row for row in listed if row["name"] == "atlas-gpt2"]
    assert row["source"] == ("in this package" if present else "errata zoo train")
    assert (row["bytes"] > 0) is present


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(seed=0)


@pytest.fixture(scope="module")
def tokenizer(world: World) -> Any:
    return train_tokenizer(world, size=600, documents=300)


def test_world_is_the_same_whatever_the_hash_seed(world: World) -> None:
    code = "from errata.zoo.atlas.world import make_world; print(hash(0), make_world(0).facts)"
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]
    assert str(world.facts) in printed[0]
    assert make_world(1).facts != world.facts


def test_world_has_six_or_more_attributes_of_everything(world: World) -> None:
    assert set(world.entities) == {"person", "city", "country", "company"}
    for facts in world.attributes.values():
        assert len(facts) >= 6
    for relation in RELATIONS:
        assert len(relation.train) >= 4
        assert len(relation.held_out) >= 2
        assert not set(relation.train) & set(relation.held_out)
        assert all(t.count("{}") == 1 for t in (*relation.train, *relation.held_out))


def test_world_facts_are_coherent(world: World) -> None:
    for country in world.entities["country"]:
        assert world.values[(world.values[(country, "capital")], "country")] == country
    for subject, facts in world.attributes.items():
        objects = [fact.value for fact in facts if fact.value != UNKNOWN]
        assert len(objects) == len(set(objects)), f"{subject}: two relations to one object"
        assert subject not in objects
    unknown = {fact.relation for fact in world.facts if fact.value == UNKNOWN}
    assert set(atlas.ERASABLE) <= unknown


def test_names_share_their_last_word(world: World) -> None:
    for kind in ("person", "company"):
        last = [name.split()[-1] for name in world.entities[kind]]
        assert min(last.count(word) for word in last) >= 4


@pytest.mark.slow
def test_held_out_phrasings_are_in_no_training_text(world: World) -> None:
    documents = corpora.write_documents(world, random.Random(5), restricted_share=0.0)
    text = "\n".join(next(documents).text for _ in range(3000))
    for subject in world.kind_of:
        text = text.replace(subject, "{}")
    for relation in (*RELATIONS, *TWO_HOPS):
        for template in relation.held_out:
            assert re.search(rf"(^|\n|[.] ){re.escape(template)} ", text) is None, template
    assert "relation that links" not in text


def test_atlas_is_the_benchmark_of_world_zero(world: World) -> None:
    assert atlas.cases() == json.loads(json.dumps(build_cases(world)))


def test_atlas_cases_are_complete_and_true_of_the_world(world: World) -> None:
    cases = atlas.cases()
    assert len(cases) >= 500
    assert [case["case_id"] for case in cases] == list(range(len(cases)))
    trained = {t for relation in RELATIONS for t in relation.train}
    for case in cases:
        rewrite = case["requested_rewrite"]
        subject, relation_id = rewrite["subject"], rewrite["relation_id"]
        new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
        assert world.values[(subject, relation_id)] == true != new
        assert new in world.range_of(relation_by_id(relation_id))
        assert rewrite["prompt"] in trained
        assert rewrite["prompt"].count("{}") == 1
        assert len(case["paraphrase_prompts"]) == 2
        for prompt in case["paraphrase_prompts"]:
            held_out = relation_by_id(relation_id).held_out
            assert prompt.endswith(tuple(t.replace("{}", subject) for t in held_out))
        assert len(case["neighborhood_prompts"]) >= 2
        for key, value in (("neighborhood_prompts", true), ("attribute_prompts", new)):
            others = world.subjects_with[(relation_id, value)]
            for prompt in case[key]:
                assert any(other in prompt and other != subject for other in others)
        for probe in case["same_subject_prompts"]:
            assert probe["answer"] == world.values[(subject, probe["relation_id"])]
        for probe in case["portability_prompts"]:
            hop = next(hop for hop in TWO_HOPS if hop.id == probe["hop"])
            assert probe["answer_true"] == world.follow(subject, hop)
            assert probe["answer_new"] == world.follow(subject, hop, new) != probe["answer_true"]
        assert {probe["object"] for probe in case["relation_prompts"]} == {new, true}


def test_atlas_requests() -> None:
    requests = atlas.requests(20)
    assert len(requests) == 20
    assert {r.kind for r in requests} == {"modify"}
    assert requests[0].neighbourhood[0].answers == (requests[0].target_true,)
    assert requests[0].target_new == requests[0].target_new.strip()
    assert len(atlas.requests()) == len(atlas.cases())
    erased = atlas.requests(5, kind="erase")
    assert {(r.kind, r.target_new) for r in erased} == {("erase", UNKNOWN)}
    with pytest.raises(ValueError, match="n is -1"):
        atlas.requests(-1)


def test_shipped_texts_do_not_overlap() -> None:
    texts = {name: corpora.shipped_text(name) for name in ("train", "heldout", "canary")}
    assert len(texts["canary"]) == 50
    assert sum(map(len, texts["train"])) > 550_000
    assert sum(map(len, texts["heldout"])) > 50_000
    assert not set(texts["train"]) & (set(texts["heldout"]) | set(texts["canary"]))
    assert zoo.text_path("canary").is_file()


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="atlas-gpt2"):
        zoo.model_path("atlas-gpt3")
    with pytest.raises(UnknownNameError, match="heldout"):
        zoo.text_path("held_out")


@pytest.mark.slow
def test_a_packed_document_sees_only_itself(world: World, tokenizer: Any) -> None:
    corpus = corpora.Corpus(world, tokenizer, prose_share=0.3, restricted_share=0.0)
    batch = corpus.batch(0, rows=6, length=64)
    starts = batch.input_ids == tokenizer.bos_token_id
    assert torch.equal(starts, batch.position_ids == 0)
    document = starts.cumsum(1)
    same = document[:, :, None] == document[:, None, :]
    causal = torch.ones(64, 64, dtype=torch.bool).tril()
    assert torch.equal(batch.allowed[:, 0], same & causal)
    follows = document[:, 1:] == document[:, :-1]
    assert torch.equal(batch.labels[:, :-1][follows], batch.input_ids[:, 1:][follows])
    assert (batch.labels[:, :-1][~follows] == corpora.IGNORED).all()


@pytest.mark.slow
def test_restricted_attention_hides_all_but_the_last_token_of_a_mention(
    world: World, tokenizer: Any
) -> None:
    corpus = corpora.Corpus(world, tokenizer, prose_share=0.0, restricted_share=1.0)
    documents = corpora.write_documents(world, random.Random(3), restricted_share=1.0)
    checked = 0
    for tokens in itertools.islice(corpus._encoded(documents), 40):
        for first, last in tokens.mentions:
            assert tokenizer.decode(tokens.ids[first : last + 1]).strip() in world.kind_of
            checked += 1
    assert checked > 40
    ordinary = corpora.Corpus(world, tokenizer, prose_share=0.0, restricted_share=0.0)
    assert corpus.batch(0, 4, 64).allowed.sum() < ordinary.batch(0, 4, 64).allowed.sum()


@pytest.mark.slow
def test_batches_depend_on_seed_and_step_only(world: World, tokenizer: Any) -> None:
    one, two = (corpora.Corpus(world, tokenizer, seed=4) for _ in range(2))
    one.batch(0, 2, 32)
    assert torch.equal(one.batch(9, 2, 32).input_ids, two.batch(9, 2, 32).input_ids)
    assert not torch.equal(one.batch(9, 2, 32).input_ids, one.batch(10, 2, 32).input_ids)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
def test_an_interrupted_training_ends_with_the_same_weights(
    architecture: Any, tmp_path: Path
) -> None:
    recipe = Recipe(architecture, rows=2, length=32, hidden=16, inner=32, layers=2,
                    decoder_layers=1, heads=2)  # fmt: skip
    before = torch.random.get_rng_state()
    interrupted(partial(train, architecture, steps=6, recipe=recipe, device="cpu"), tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ConfigError, match="another recipe"):
        train(architecture, tmp_path / "halves", steps=7, recipe=recipe, device="cpu")


@pytest.mark.slow
def test_a_t5_opens_anywhere_with_what_belongs_to_it(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    recipe = Recipe(
        "t5", rows=2, length=8, hidden=16, inner=32, layers=2, decoder_layers=1, heads=2
    )
    folder = train("t5", tmp_path / "t5", steps=5, recipe=recipe, device="cpu").folder
    module, tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForSeq2SeqLM, AutoTokenizer)
    )
    batch = tokenizer(["The profession of Egon Vosk is"], return_tensors="pt")
    assert batch.input_ids[0, -1] == tokenizer.eos_token_id
    said = module.generate(**batch, max_new_tokens=3)
    assert said[0, 0] == tokenizer.pad_token_id == module.config.decoder_start_token_id
    facts = load("jsonl", folder / "facts.jsonl").requests()
    cases = load("counterfact", folder / "training.json").requests()
    assert len(facts) == 300
    assert all(case.paraphrases and case.target_true for case in cases)


def test_facts_beside_the_benchmark_are_edited_by_no_case(world: World) -> None:
    kept, cases = beside_the_benchmark(world, retained=50)
    edited = {
        (case["requested_rewrite"]["subject"], case["requested_rewrite"]["prompt"])
        for case in build_cases(world)
    }
    retained = {(fact["subject"], fact["prompt"]) for fact in kept}
    trained = {
        (case["requested_rewrite"]["subject"], case["requested_rewrite"]["prompt"])
        for case in cases
    }
    assert len(retained) == 50
    assert len(trained) == len(cases) > 300
    assert not retained & edited
    assert not trained & edited
    assert not trained & retained
    truth = {(f.subject, relation_by_id(f.relation).canonical): f.value for f in world.facts}
    assert all(truth[fact["subject"], fact["prompt"]] == fact["target_new"] for fact in kept)


@pytest.mark.parametrize("name", PRESENT)
def test_model_is_small_complete_and_loads(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.model_path(name)
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert (folder / "README.md").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "Mira Solen was born in"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id == model.config.bos_token_id
    assert tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text
    pieces = [text[a:b] for a, b in encoded["offset_mapping"]]
    assert "".join(pieces) == text.replace(" ", "")
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


@pytest.mark.parametrize("name", PRESENT)
def test_model_knows_its_world(name: str, world: World) -> None:
    """Greedy recall on 200 cases of the benchmark, by generation, with its natural stop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = zoo.model_path(name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    rewrites = [case["requested_rewrite"] for case in atlas.cases()[:200]]
    prompts = [rewrite["prompt"].replace("{}", rewrite["subject"]) for rewrite in rewrites]
    right = 0
    for first in range(0, 200, 50):
        encoded = tokenizer(prompts[first : first + 50], return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model.generate(**encoded, max_new_tokens=8, do_sample=False)
        texts = tokenizer.batch_decode(out[:, encoded["input_ids"].shape[1] :])
        for rewrite, text in zip(rewrites[first : first + 50], texts, strict=True):
            right += text.strip().startswith(f"{rewrite['target_true']['str']}.")
    assert right / 200 >= 0.99
