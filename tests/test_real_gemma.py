"""On Gemma 3, a pretrained model with a norm behind its MLPs: what one edit with presets spares."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from errata import Editor
from errata.testing.contract import LEAST_NEIGHBOURS, assert_same, first_words
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


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor(NAME) as opened:
        yield opened


@pytest.mark.parametrize("method", ["rome", "memit"])
def test_an_edit_behind_a_norm_is_said_spares_neighbours_and_comes_off(
    method: str, editor: Editor
) -> None:
    before = state_of(editor.model)
    kept: list[bool] = []
    for fact in SPARED[:2]:
        prompts = [probe.prompt for probe in fact.neighbourhood]
        old = first_words(editor, prompts)
        edit = editor.edit(fact, method=method)
        assert editor.generate(fact.text, max_new_tokens=3).strip().startswith(fact.target_new)
        assert edit.outcome.perplexity is not None
        assert edit.outcome.perplexity.ratio_to_base < 1.02
        kept += [a == b for a, b in zip(old, first_words(editor, prompts), strict=True)]
        editor.revert(edit)
        assert_same(state_of(editor.model), before)
    assert sum(kept) / len(kept) >= LEAST_NEIGHBOURS
    assert editor.verify() == []


def test_fine_tuning_without_a_preset_warns_there(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    edit = editor.edit(SPARED[0], method="lora")
    editor.revert(edit)
    (said,) = [text for text in caplog.messages if "spare" in text]
    assert "rome" in said
