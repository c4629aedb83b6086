"""Edits that change nothing, and measurements of nothing: both are said."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.datasets import atlas

FACT = atlas.requests(1)[0]
OLD, NEW = FACT.target_true or "", FACT.target_new
FIELDS = {"prompt": FACT.prompt, "subject": FACT.subject}
SHORT = {"steps": 2}


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards={"perplexity": "off", "norm": "off"}) as opened:
        yield opened


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target_new": OLD}, "the model says this already: 1 of 1 requests held before"),
        ({"kind": "erase", "target_true": "Nonsense"}, "there is nothing to erase: 1 of 1"),
    ],
)
def test_an_edit_of_what_holds_already_has_a_remark(
    editor: Editor, fields: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    edit = editor.edit(method="ft", config=SHORT, **FIELDS, **fields)
    editor.revert(edit)
    assert edit.outcome.efficacy is not None
    assert edit.outcome.efficacy.value == 1
    (remark,) = edit.outcome.warnings
    assert remark.startswith(said)
    assert said in caplog.text
    assert editor.ledger.get(edit.id).outcome.warnings == (remark,)


def test_of_several_only_the_idle_one_has_it(editor: Editor) -> None:
    requests = [{**FIELDS, "target_new": OLD}, {**FIELDS, "prompt": "{} is", "target_new": "xyz"}]
    edits = editor.edit(requests, method="grace")
    editor.revert(*edits)
    assert ["says this already" in " ".join(edit.outcome.warnings) for edit in edits] == [
        True,
        False,
    ]


def test_an_edit_that_is_needed_has_none(editor: Editor) -> None:
    """Neither has one that brings back what an active edit had changed: the base's own answer."""
    first = editor.edit(method="grace", **FIELDS, target_new=NEW)
    back = editor.edit(method="grace", **FIELDS, target_new=OLD)
    editor.revert(back, first)
    assert not any("already" in text for edit in (first, back) for text in edit.outcome.warnings)


def test_the_command_line_shows_the_remark(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("edit", FACT.prompt, "-s", FACT.subject, "-t", OLD, "--method", "ft", "--set",
             "steps=2", "--guard", "perplexity=off", "-m", "atlas-gpt2")  # fmt: skip
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 0
    assert "the model says this already" in " ".join(result.stdout.split())


# -- measuring -------------------------------------------------------------------------------------


def test_one_protocol_may_be_named_by_a_text(editor: Editor) -> None:
    one = editor.evaluate(FACT, "counterfact")
    assert one
    assert [m.as_row() for m in one] == [m.as_row() for m in editor.evaluate(FACT, ["counterfact"])]


def test_what_measures_nothing_says_what_is_missing(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert editor.evaluate([{**FIELDS, "target_new": NEW}], ["counterfact"]) == []
    assert "counterfact: nothing to measure; no request has target_true" in caplog.text
    caplog.clear()
    assert editor.evaluate(FACT, ["counterfact"])
    assert not caplog.text
