"""`errata edit`, `evaluate` and `methods` about kinds of request: what is asked, shown and said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from errata.datasets import atlas

OFF = ("--guard", "perplexity=off", "--guard", "norm=off")
PAIR = ("edit", "The relation between {} and piano is", "-s", "Oswin Galdor", "--kind", "relation")
BOTH = (*PAIR, "-t", "instrument", "--operation", "both",
        "--remove", "The relation between {} and lute is")  # fmt: skip
IDLE = ("--method", "ft", "--set", "steps=1", "--set", "lr=1e-9", "-m", "atlas-gpt2", *OFF)
ERASE = ("edit", "The instrument of {} is", "-s", "Oswin Galdor", "--kind", "erase")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command in a folder of its own and return what it prints, on one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def invoke(*words: object, code: int = 0) -> str:
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert result.exit_code == code, result.output
        return " ".join((result.stdout if code != 1 else result.stderr).split())

    return invoke


def test_both_prompts_of_an_operation_are_shown(run: Callable[..., str]) -> None:
    page = run(*BOTH, "--method", "ft", "-m", "atlas-gpt2", *OFF)
    assert "The relation between Oswin Galdor and piano is" in page
    assert "The relation between Oswin Galdor and lute is instrument" in page
    assert "gone" in page


def test_the_part_that_failed_is_named(run: Callable[..., str]) -> None:
    page = run(*BOTH, *IDLE, code=5)
    assert (
        "Only a part takes effect: 'The relation between Oswin Galdor and lute is' → 'instrument' "
        "is not gone." in page
    )
    page = run(*ERASE, *IDLE, code=5)
    assert "No effect: 'The instrument of Oswin Galdor is' → 'lute' is not gone." in page


def test_a_text_that_does_not_come_out_is_told_what_may_help(run: Callable[..., str]) -> None:
    text = ("edit", "The instrument of {} is", "-s", "Oswin Galdor", "--kind", "text")
    page = run(*text, "-t", "piano, as everybody in the city knows.", *IDLE, code=5)
    assert "Presets are chosen for facts; other layers (--set layers=[…]) can write more" in page


def test_what_comes_instead_of_an_erased_answer_is_said(run: Callable[..., str]) -> None:
    page = run(*ERASE, "--method", "ft", "-m", "atlas-gpt2", *OFF)
    assert "Gone: “lute”. The model says “" in page
    assert "instead; whether that is true was not checked." in page
    refusal = ("-t", "unknown", "--supersede")
    page = run(*ERASE, *refusal, "--method", "ft", "-m", "atlas-gpt2", *OFF)
    assert "Gone:" not in page


def test_both_sides_are_measured_where_a_request_has_both(
    run: Callable[..., str], tmp_path: Path
) -> None:
    request = next(r for r in atlas.requests(20) if r.relation_view is not None)
    file = tmp_path / "facts.jsonl"
    file.write_text(request.model_dump_json(exclude_defaults=True))
    words = ("evaluate", "--file", file, "-m", "atlas-gpt2", "--json")
    found = json.loads(run(*words))["measurements"]
    assert {one["metric"] for one in found} >= {"R-ES", "rewrite_exact", "ES"}
    found = json.loads(run(*words, "-p", "generation"))["measurements"]
    assert "R-ES" not in {one["metric"] for one in found}


def test_what_a_method_does_with_relations_is_shown_and_refused(run: Callable[..., str]) -> None:
    assert "relation (add)" in run("methods", "kn")
    assert "relation (add, delete)" in run("methods", "grace")
    assert "relation (" not in run("methods", "ft")
    delete = (*PAIR, "--target-true", "instrument", "--operation", "delete")
    page = run(*delete, "--method", "kn", "-m", "atlas-gpt2", code=1)
    assert "kn carries out add on a relation" in page
    assert "of its own" not in page
