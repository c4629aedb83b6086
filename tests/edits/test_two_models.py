"""Edits of two models in one ledger: what is refused, and what the log then says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata.cli.app import app
from tests.families import build, saved

FACT = ("edit", "{} lives in", "--subject", "Ada", "--target", "Rome", "--method", "ft",
        "--set", "steps=1", "--guard", "efficacy=off")  # fmt: skip


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    first = saved("gpt2", tmp_path / "first")
    for part in build("gpt2", seed=1):
        part.save_pretrained(tmp_path / "second")
    return [first, str(tmp_path / "second")]


def run(*args: str, code: int = 0, width: int = 140) -> Any:
    found = CliRunner(env={"COLUMNS": str(width)}).invoke(app, list(args))
    assert found.exit_code == code, f"{found.stdout}\n{found.stderr}\n{found.exception!r}"
    return found


def test_another_model_is_refused_with_the_way_out(models: list[str]) -> None:
    run(*FACT, "--model", models[0])
    said = run(*FACT, "--model", models[1], code=1, width=1000).stderr
    assert f"errata-ledger has active edits of {models[0]}: give that model with --model" in said
    run(*FACT, "--model", models[1], "--ledger", "other")


def test_the_log_says_of_which_model_each_edit_is(models: list[str]) -> None:
    run(*FACT, "--model", models[0])
    assert "model:" not in run("log").stdout
    run("revert", "--all")
    run(*FACT, "--model", models[1])
    run(*FACT, "--model", models[1])
    shown = run("log", width=300).stdout
    assert [shown.count(f"model: {name}") for name in models] == [1, 2]
    edits = json.loads(run("log", "--json").stdout)["edits"]
    assert [edit["model"] for edit in edits] == [models[0], models[1], models[1]]


@pytest.mark.parametrize("width", [80, 100, 140])
def test_conflicts_stand_below_the_request(models: list[str], width: int) -> None:
    run(*FACT, "--model", models[0])
    run(*[{"Rome": "Oslo"}.get(part, part) for part in FACT], "--model", models[0])
    shown = run("log", width=width).stdout
    assert "Ada lives in → Oslo" in shown
    assert any(line.strip().startswith("conflicts ") for line in shown.splitlines())
