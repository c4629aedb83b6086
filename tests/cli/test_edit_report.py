"""After an edit: who chose the layer, and what the model says around the fact."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from errata import Editor, Request
from errata.edits.edit import Edit
from errata.evaluate import edit_report
from errata.evaluate.neighbours import SUBJECTS, other_subjects
from errata.zoo.atlas.world import make_world
from tests.families import build

FACT = Request(prompt="The instrument of {} is", subject="Oswin Galdor", target_new="piano")
QUICK = {"canary_tokens": 8}


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards=QUICK) as opened:
        yield opened


@pytest.fixture(scope="module")
def edit(editor: Editor) -> Edit:
    made: Edit = editor.edit(FACT, method="ft", lr=0.01, steps=10)
    return made


def test_the_answers_before_and_after_and_those_of_others(editor: Editor, edit: Edit) -> None:
    text = "The mayor of the city Oakmere is"
    report = edit_report(editor, edit, checks=[text], neighbours=3)
    fact, *others = report.answers
    assert (fact.role, fact.prompt) == ("request", FACT.text)
    assert fact.before.startswith(make_world().values["Oswin Galdor", "instrument"])
    assert fact.changed
    assert fact.gives_target
    assert [one.role for one in others] == ["neighbour"] * 3 + ["check"]
    assert [one["about_fact"] for one in report.as_json()["answers"]] == [
        one not in others for one in report.answers
    ]
    people = make_world().entities["person"]
    for one in report.of("neighbour"):
        assert one.prompt.removeprefix("The instrument of ").removesuffix(" is") in people
    assert others[-1].prompt == text
    json.dumps(report.as_json())


VIEW = {
    "names": ["instrument"],
    "add": "The relation between {} and piano is",
    "remove": "The relation between {} and lute is",
}


def test_the_relation_is_asked_with_both_objects(editor: Editor, edit: Edit) -> None:
    request = Request.parse({**FACT.model_dump(), "relation_view": VIEW})
    seen = edit.model_copy(update={"requests": (request,)})
    new, old = edit_report(editor, seen, neighbours=0).of("relation")
    assert new.prompt == "The relation between Oswin Galdor and piano is"
    assert old.prompt == "The relation between Oswin Galdor and lute is"
    assert new.as_asked == ("instrument" in new.after)
    assert old.as_asked == ("instrument" not in old.after)
    assert not old.gives_target


def test_every_prompt_of_a_request_is_asked(editor: Editor) -> None:
    both = Request(
        prompt=VIEW["add"], subject="Oswin Galdor", target_new="instrument", kind="relation",
        operation="both", remove=VIEW["remove"],
    )  # fmt: skip
    made = editor.edit(both, method="ft")
    added, taken = edit_report(editor, made, neighbours=0).answers
    assert (added.role, taken.role) == ("request", "request")
    assert taken.prompt == "The relation between Oswin Galdor and lute is"
    assert (taken.gone, taken.gives_target, taken.as_asked) == (True, False, True)
    assert (added.gone, added.as_asked) == (False, True)
    editor.revert(made)


def test_it_does_not_matter_whether_the_edit_is_on(editor: Editor, edit: Edit) -> None:
    before = edit_report(editor, edit)
    weights = {name: p.clone() for name, p in editor.model.module.named_parameters()}
    editor.revert(edit)
    try:
        assert edit_report(editor, edit) == before
        assert editor.model.stack.ids == []
    finally:
        editor.apply(edit)
    for name, parameter in editor.model.module.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_neighbours_that_take_the_new_answer_are_told_apart(editor: Editor, edit: Edit) -> None:
    fact = FACT.model_copy(update={"target_new": "harp"})
    loud = editor.edit(fact, method="ft", lr=0.05, steps=10)
    try:
        report = edit_report(editor, loud)
    finally:
        editor.revert(loud)
    assert report.disturbed
    assert report.disturbed[0].gives_target
    assert all(one.after.startswith("harp") for one in report.disturbed if one.gives_target)
    assert len(edit_report(editor, edit).disturbed) < len(report.disturbed)


def test_who_chose_the_layer_is_said_and_after_a_rule_how_to_find_a_better_one(
    editor: Editor, edit: Edit
) -> None:
    preset = edit_report(editor, edit, neighbours=0).layer
    assert preset is not None
    assert (preset.layers, preset.chosen_by, preset.advice) == ((1,), "preset", "")
    own = edit_report(editor, edit, neighbours=0, given={"layers": [1]}).layer
    assert own is not None
    assert own.chosen_by == "argument"
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, guards={"perplexity": "off"}) as other:
        rule = edit_report(other, other.edit(FACT, method="ft", steps=1), neighbours=0).layer
    assert rule is not None
    assert rule.chosen_by == "rule"
    assert rule.advice.startswith("errata locate --sweep --method ft --model ")


def test_subjects_are_of_the_same_kind(editor: Editor) -> None:
    with editor.disabled():
        capital = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
        assert other_subjects(editor.model, capital, 2) == ["Germany", "Spain"]
        assert other_subjects(editor.model, capital, 2, but=["Germany"]) == ["Spain", "Japan"]
        unknown = capital.model_copy(update={"subject": "Nobody Inparticular"})
        found = other_subjects(editor.model, unknown, 3)
        assert any(set(found) <= set(names) for names in SUBJECTS.values())
        assert len(found) == 3
