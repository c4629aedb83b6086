"""The demo: on the embedded model, from the command line, once with all three methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import zoo
from errata.cli.app import app
from errata.cli.demo import EMBEDDED_METHODS as METHODS
from errata.cli.demo import MODEL_NAME
from errata.evaluate import exact_match
from tests.conftest import base_folder

pytestmark = pytest.mark.skipif(
    not zoo.MODELS[MODEL_NAME].is_present, reason=f"the weights of {MODEL_NAME} are not here"
)


ONE = "rome"


def run(*words: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["demo", "--model", MODEL_NAME, *words])
    assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module", params=[ONE, pytest.param("all", marks=pytest.mark.slow)])
def report(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What `errata demo --json` says: of one method, and (slow) of all that it shows."""
    words = () if request.param == "all" else ("--method", request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ERRATA_CACHE", str(base_folder(tmp_path_factory) / "errata-cache"))
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("no-user-config")))
        patch.chdir(tmp_path_factory.mktemp("demo"))
        found: dict[str, Any] = json.loads(run("--json", *words).stdout)
        assert list(Path.cwd().iterdir()) == []  # it leaves nothing behind
    return {**found, "asked": [ONE] if words else list(METHODS)}


def test_the_base_answers_every_chosen_fact(report: dict[str, Any]) -> None:
    facts = report["facts"]
    assert len({fact["subject"] for fact in facts}) == len(facts) == len(report["asked"])
    for fact in facts:
        assert exact_match(fact["answer"], [fact["target_true"]])
    assert "seed 0" in report["chosen"]


def test_each_method_edits_one_fact_on_top_of_the_others(report: dict[str, Any]) -> None:
    edits = report["edits"]
    assert [edit["method"] for edit in edits] == report["asked"]
    ids = [edit["id"] for edit in edits]
    assert [edit["parents"] for edit in edits] == [ids[:n] for n in range(len(ids))]
    for edit, fact in zip(edits, report["facts"], strict=True):
        (request,) = edit["requests"]
        assert (request["subject"], request["target_new"]) == (fact["subject"], fact["target_new"])


def test_it_asks_in_other_words_and_about_a_neighbour(report: dict[str, Any]) -> None:
    rows = report["answers"]["rows"]
    assert {row["what"] for row in rows} == {"asked", "in other words", "neighbour"}
    assert all(row["before"] and row["now"] and row["wanted"] for row in rows)
    assert len(report["free_text"]["rows"]) == len(report["asked"])
    for part in ("answers", "free_text"):
        assert report[part]["protocol"].startswith("generated: greedy")


def test_every_number_has_its_protocol(report: dict[str, Any]) -> None:
    for part in ("measurements", "base_measurements"):
        assert {one["protocol"].partition(":")[0] for one in report[part]} >= {
            "counterfact",
            "generation",
            "general",
        }
        assert all(one["n"] for one in report[part])
    assert report["location"]["protocol"].startswith("causal trace")


def test_the_middle_edit_goes_first_and_the_base_comes_back(report: dict[str, Any]) -> None:
    stages, asked = report["reverts"], report["asked"]
    assert [stage["stage"] for stage in stages] == [
        "all edits on",
        f"without {asked[len(asked) // 2]}",
        "all reverted",
    ]
    for answer, fact in zip(stages[-1]["answers"], report["facts"], strict=True):
        assert exact_match(answer, [fact["target_true"]])
    assert report["identical"]
    assert report["differing"] == []
    assert report["bytes"] > 1_000_000


@pytest.mark.slow
def test_people_see_the_steps_and_the_verdict() -> None:
    page = " ".join(run("--method", "rome", "--seed", "1").stdout.split())
    for text in (
        "1 What the model says",
        "Not picked by hand: the first 1 on different subjects, in random order (seed 1)",
        "Where it keeps the first one",
        "What it says now",
        "Measured",
        "Is it the base again? Yes, bit for bit.",
    ):
        assert text in page


def test_a_misspelt_method_is_refused_before_anything_is_loaded() -> None:
    assert "Did you mean 'rome'?" in " ".join(run("--method", "roma", code=1).stderr.split())
