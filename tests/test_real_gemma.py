"""On Gemma 3, a pretrained model with a norm behind its MLPs: that edits take effect and spare."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from errata import Editor
from errata.edits.request import RelationView
from errata.testing import MethodContract
from errata.testing.contract import assert_same
from errata.testing.facts import SPARED
from errata.testing.models import state_of
from errata.zoo.pretrained import PRETRAINED

NAME = "gemma3-270m"

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not PRETRAINED[NAME].is_present, reason=f"no pretrained model: errata zoo get {NAME}"
    ),
]


class _OnGemma(MethodContract):
    unlisted = NAME


del MethodContract  # the class itself names no method: pytest must not collect it


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(NAME) as opened:
        yield opened


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_defaults_spare_neighbours_behind_a_norm(method: str) -> None:
    suite = _OnGemma()
    suite.method = method
    suite.test_defaults_spare_a_model_without_presets()


def test_an_edit_with_the_preset_is_said_and_comes_off(editor: Editor) -> None:
    fact, before = SPARED[0], state_of(editor.model)
    edit = editor.edit(fact, method="rome")
    assert editor.generate(fact.text, max_new_tokens=3).strip().startswith(fact.target_new)
    assert edit.outcome.perplexity is not None
    assert edit.outcome.perplexity.ratio_to_base < 1.02
    editor.revert(edit)
    assert_same(state_of(editor.model), before)
    assert editor.verify() == []


def test_a_relation_is_said_behind_a_norm(editor: Editor) -> None:
    """Spread over five blocks, what is written for this one did not arrive."""
    view = RelationView(
        names=("developer",),
        add="The relation between {} and Microsoft is",
        remove="The relation between {} and Nintendo is",
    )
    edit = editor.edit(
        prompt="{} is developed by", subject="New Nintendo 3DS", target_new="Microsoft",
        target_true="Nintendo", relation_view=view, method="bothsides",
        context_lengths=((5, 1),),
    )  # fmt: skip
    asked = view.add.replace("{}", edit.requests[0].subject)
    assert editor.generate(asked, max_new_tokens=3).strip().startswith("developer")
    assert editor.generate(edit.requests[0].text, max_new_tokens=3).strip().startswith("Microsoft")
    editor.revert(edit)
    assert not editor.generate(asked, max_new_tokens=3).strip().startswith("developer")


def test_fine_tuning_warns_there(editor: Editor, caplog: pytest.LogCaptureFixture) -> None:
    edit = editor.edit(SPARED[0], method="lora")
    editor.revert(edit)
    (said,) = [text for text in caplog.messages if "spare" in text]
    assert "rome" in said
