"""A classifier of claims: made of facts, resumable, and its claims read as FEVER's files are."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.datasets import load
from errata.errors import ConfigError
from errata.zoo.classifiers.claims import ClaimsRecipe, facts_of, train_claims
from tests.families import saved
from tests.helpers import ROOT, interrupted

NAMES = ("France", "Spain", "Italy", "Texas", "Germany", "London")
REQUESTS = [
    Request(
        prompt="The capital of {} is", subject=name, target_true="Paris", target_new="Rome",
        paraphrases=(f"{name} has the capital", f"In {name} it is", f"{name} has as capital"),
    )
    for name in NAMES
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> ClaimsRecipe:
    return ClaimsRecipe(
        base=saved("bert", tmp_path / "base"), facts=6, dev=2, steps=4, rows=4, warmup=1
    )


def test_phrasings_to_measure_with_are_never_trained_on(recipe: ClaimsRecipe) -> None:
    for fact in facts_of(REQUESTS, recipe):
        assert not set(fact.trained) & set(fact.kept)
        assert fact.phrasings[0] in fact.trained
        claims = dict(fact.claims(fact.trained))
        assert claims[f"{fact.phrasings[0]} Paris."] == 1
        assert claims[f"{fact.phrasings[0]} Rome."] == 0
    with pytest.raises(ConfigError, match=r"has 6 facts.*7 are wanted"):
        facts_of(REQUESTS, ClaimsRecipe(facts=7))


def test_an_interrupted_training_ends_the_same_and_its_claims_can_be_edited(
    recipe: ClaimsRecipe, tmp_path: Path
) -> None:
    whole = interrupted(partial(train_claims, REQUESTS, recipe=recipe), tmp_path)

    parts = [load("fever", whole / f"claims.{name}.jsonl").requests() for name in ("train", "dev")]
    assert [len(part) for part in parts] == [4, 2]
    assert not {r.subject for r in parts[0]} & {r.subject for r in parts[1]}
    request = parts[1][0]
    with Editor(str(whole), guards={"perplexity": "off"}) as editor:
        scores = editor.model.config.label2id
        assert {request.target_true, request.target_new} == set(scores)
        edit = editor.edit(request, method="ft", config={"lr": 1e-2, "steps": 60})
        assert edit.outcome.efficacy is not None
        assert edit.outcome.efficacy.value == 1.0


def test_the_command_asks_for_facts(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["zoo", "train", "claims", "--out", str(tmp_path / "m")])
    assert result.exit_code == 1
    assert "--data NAME=PATH" in result.stderr
    assert not (tmp_path / "m").exists()


def test_questions_make_no_claims_and_bad_records_can_be_left_out(tmp_path: Path) -> None:
    def refused(records: list[dict[str, Any]], *options: str) -> str:
        file = tmp_path / "zsre.json"
        file.write_text(json.dumps(records))
        words = ["zoo", "train", "claims", "--out", str(tmp_path / "m"), "--data", f"zsre={file}"]
        result = CliRunner().invoke(app, [*words, *options])
        assert result.exit_code == 1
        assert not (tmp_path / "m").exists()
        return " ".join(result.stderr.split())

    question, other = json.loads((ROOT / "tests/data/datasets/zsre.json").read_text())
    told = f"{question['src']!r} is a question"
    assert told in refused([question])
    with_a_bad_one = [{**other, "alt": ""}, question]
    assert "--skip-bad" in refused(with_a_bad_one)
    assert told in refused(with_a_bad_one, "--skip-bad")
