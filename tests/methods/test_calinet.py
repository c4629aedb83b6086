"""CaliNET: one network for a set of facts, which changes nothing before it has learnt."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from errata import Editor, Request
from errata.datasets import atlas
from errata.edits.delta import NeuronsDelta
from errata.model.scoring import score_targets
from errata.testing import state_of
from errata.testing.contract import assert_same

FACTS = list({fact.subject: fact for fact in atlas.requests()[:40]}.values())[:3]


@pytest.fixture(scope="module")
def opened() -> Iterator[Editor]:
    with Editor("atlas-gpt2") as editor:
        yield editor


@pytest.fixture
def editor(opened: Editor) -> Iterator[Editor]:
    yield opened
    if active := [entry.edit for entry in opened.log() if entry.active]:
        opened.revert(*active)


def said(editor: Editor, facts: list[Request]) -> list[bool]:
    texts = editor.generate([fact.text for fact in facts], max_new_tokens=4)
    return [
        text.strip().startswith(fact.target_new) for fact, text in zip(facts, texts, strict=True)
    ]


def test_a_set_of_facts_is_one_network_and_comes_out_as_one(editor: Editor) -> None:
    before, weights = said(editor, FACTS), state_of(editor.model)
    (edit,) = editor.edit(FACTS, method="calinet", width=16)
    assert isinstance(edit.delta, NeuronsDelta)
    assert len(edit.delta.neurons) == 16  # however many facts
    assert len(edit.requests) == 3
    assert said(editor, FACTS) == [True] * 3 != before
    editor.revert(edit)
    assert said(editor, FACTS) == before
    assert_same(state_of(editor.model), weights)


def test_a_network_that_has_learnt_nothing_changes_nothing(editor: Editor) -> None:
    """W_o begins at zero: what the model says already takes no step."""
    fact = FACTS[0]
    known = fact.model_copy(
        update={"target_new": editor.generate(fact.text, max_new_tokens=1).strip()}
    )
    asked = [fact.text for fact in FACTS]
    targets = [fact.target for fact in FACTS]
    before = score_targets(editor.model, asked, targets)
    edit = editor.edit(known, method="calinet", stop_loss=None)
    assert isinstance(edit.delta, NeuronsDelta)
    assert bool((edit.delta.neurons.keys != 0).any())
    assert not bool((edit.delta.neurons.values != 0).any())
    assert score_targets(editor.model, asked, targets) == before


def test_paraphrases_are_learnt_if_they_are_asked_for(editor: Editor) -> None:
    one, other, third = FACTS
    # Worded like the second fact, so that only who learns it gives the first one's answer.
    worded = Request(prompt=other.prompt, subject=third.subject, target_new=one.target_new)
    facts = [one.model_copy(update={"paraphrases": (worded.text,)}), other]
    answers = []
    for paraphrases in (0, 1):
        (edit,) = editor.edit(facts, method="calinet", config={"paraphrases": paraphrases})
        assert said(editor, facts) == [True, True]
        answers += said(editor, [worded])
        editor.revert(edit)
    assert answers == [False, True]


def test_the_optimiser_is_imported_without_what_bitsandbytes_says(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.optimization as theirs

    levels: list[int] = []

    class Watched(ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name == "Adafactor":
                levels.append(logging.getLogger("bitsandbytes").getEffectiveLevel())
            return getattr(theirs, name)

    monkeypatch.setitem(sys.modules, "transformers.optimization", Watched("optimization"))
    editor.edit(FACTS[0], method="calinet", steps=1, apply=False)
    assert levels == [logging.ERROR]
