"""`errata datasets`: what can be read, and what a file holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from errata.cli import datasets
from errata.datasets import READERS, load
from tests.helpers import ROOT

SAMPLES = ROOT / "tests" / "data" / "datasets"


@pytest.fixture
def run() -> Callable[..., Any]:
    app = typer.Typer()
    app.callback()(lambda: None)  # with one command alone, typer would drop its name
    datasets.add(app)
    runner = CliRunner()

    def call(*arguments: str | Path, code: int = 0) -> Any:
        done = runner.invoke(app, ["datasets", *map(str, arguments)])
        assert done.exit_code == code, done.output
        return done

    return call


def test_the_list_names_every_dataset(run: Callable[..., Any]) -> None:
    text = run().stdout
    listed = json.loads(run("--json").stdout)["datasets"]
    assert [one["name"] for one in listed] == list(READERS)
    for one in listed:
        assert one["name"] in text
        assert one["licence"]
        assert one["protocols"]


def test_a_wide_terminal_gets_a_table(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    text = run().stdout
    assert "measured by default" in text.splitlines()[0]
    assert all(name in text for name in READERS)


def test_a_format_without_a_file_is_described(run: Callable[..., Any]) -> None:
    text = " ".join(run("knowedit").stdout.split())
    assert "--set subset=" in text
    assert "zjunlp/KnowEdit" in text
    assert json.loads(run("rake", "--json").stdout)["options"]["pararel"]


def test_a_file_is_counted(run: Callable[..., Any]) -> None:
    path = SAMPLES / "mquake.json"
    found = json.loads(run("mquake", path, "--json").stdout)
    whole = load("mquake", path)
    assert (found["cases"], found["requests"], found["skipped"]) == (2, 3, 0)
    assert found["digest"] == whole.digest
    assert found["counts"]["kinds"] == {"modify": 3}
    assert found["counts"]["portability"] == {"multi_hop": 6, "single_hop": 3}
    assert found["counts"]["locality"] == {"single_hop": 2}
    assert found["first"]["prompt"] == "{} plays the"
    text = run("mquake", path).stdout
    assert "6 multi_hop, 3 single_hop" in text
    assert '"prompt": "{} plays the"' in text


def test_limit_and_options_reach_the_reader(run: Callable[..., Any]) -> None:
    assert json.loads(run("atlas", "--limit", "3", "--json").stdout)["cases"] == 3
    arguments = ("knowedit", SAMPLES / "knowedit_convsent.json", "--set", "sentiment=negative")
    assert json.loads(run(*arguments, "--json").stdout)["first"]["relation"] == "negative"
    said = run("atlas", "--set", "kinds=erase", code=1).stderr
    assert "Did you mean 'kind'" in " ".join(said.split())


def test_bad_records_are_listed(run: Callable[..., Any]) -> None:
    path = SAMPLES / "knowedit_zsre.json"
    said = " ".join(run("knowedit", path, code=1).stderr.split())
    assert "record 1" in said
    assert "'prompt'" in said
    text = run("knowedit", path, "--skip-bad").stdout
    assert "record 1, prompt: the subject does not stand in the prompt" in text
    found = json.loads(run("knowedit", path, "--skip-bad", "--json").stdout)
    assert [(one["index"], one["field"]) for one in found["problems"]] == [(1, "prompt")]


def test_retained_probes_and_relation_views_are_counted(run: Callable[..., Any]) -> None:
    found = json.loads(run("knowedit", SAMPLES / "knowedit_sanitation_test.json", "--json").stdout)
    assert found["retain"] == 2
    found = json.loads(run("atlas", "--json").stdout)
    assert found["counts"]["relation view"] == {"requests": 600}
    assert set(found["counts"]["relation specificity"]) == {"same_pair", "same_relation"}
