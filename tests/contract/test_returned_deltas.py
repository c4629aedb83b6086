"""What becomes of the delta that a hook returns: it is copied, and has to be readable again."""

from __future__ import annotations

from pathlib import Path

import pytest

from errata import Editor, Request
from errata.errors import PluginError
from errata.testing import state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
ONE, TWO = (
    Request(prompt="{} lives in", subject=name, target_new="Rome") for name in ("Ada", "Grace")
)


def open_editor(ledger: Path | None = None) -> Editor:
    module, tokenizer = build("gpt2")
    return Editor(module, tokenizer, ledger=ledger, guards=QUIET)


def test_a_buffer_that_a_method_writes_into_again_changes_no_edit(tmp_path: Path) -> None:
    with open_editor(tmp_path) as editor:
        first = editor.edit(ONE, method="toy-reuses")
        after_one = state_of(editor.model)
        second = editor.edit(TWO, method="toy-reuses")
        after_two = state_of(editor.model)
        for buffer in type(editor._methods.plugin("toy-reuses")).buffers.values():
            buffer.fill_(7.0)  # also when nothing is computed
        editor.revert(second)
        assert_same(state_of(editor.model), after_one)
        assert_same(first.delta.tensors(), editor.ledger.delta(first.id).tensors())
        editor.apply(second)
        assert editor.verify() == []
    with open_editor(tmp_path) as again:
        assert_same(state_of(again.model), after_two)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("unknown", r"No installed package.*errata\.deltas.*toy_unknown = .*:UnknownDelta"),
        ("another", r"'low_rank' is read as errata\..*:LowRankDelta.*ReadAsAnother"),
        ("idle", "'toy_idle'.*implements none of fold"),
        ("object", "type object is no JSON"),
        ("nan", "not JSON compliant"),
        ("meta", "'one' is on the meta device"),
        ("sparse", "layout torch.sparse"),
        ("lost", "KeyError: 'held'"),
    ],
)
def test_a_delta_that_could_not_be_read_again_is_not_recorded(how: str, said: str) -> None:
    with open_editor() as editor:
        before = state_of(editor.model)
        with pytest.raises(PluginError, match=rf"(?s)Method 'toy-stored'.*{said}"):
            editor.edit(ONE, method="toy-stored", how=how)
        assert editor.log() == []
        assert_same(state_of(editor.model), before)


def test_a_number_of_numpy_s_is_stored_as_the_number_that_it_is() -> None:
    with open_editor() as editor:
        edit = editor.edit(ONE, method="toy-stored", how="number")
        assert edit.delta.metadata()["held"] == 2.0
        assert type(edit.delta.metadata()["held"]) is float


def test_a_kind_that_fails_to_fold_is_named_in_one_line() -> None:
    with open_editor() as editor:
        before = state_of(editor.model)
        with pytest.raises(PluginError) as caught:
            editor.edit(ONE, method="toy-stored", how="breaks")
        said = str(caught.value)
        assert "'toy_picky' (errata_toys.promises) failed in `fold`: ZeroDivisionError" in said
        assert "in the fold xxx" in said
        assert len(said) < 500
        assert editor.log() == []
        assert_same(state_of(editor.model), before)
