"""Edits of a stranger's kind that hangs hooks of its own: they are edits, and no foreign code."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from errata import Editor, Request
from errata.errors import ConfigError
from errata.evaluate import Baseline
from tests.families import build, saved

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
ADA, ALAN = (
    Request(prompt="{} lives in", subject=name, target_new="Rome", target_true="Paris")
    for name in ("Ada", "Alan")
)
WARNED = "hooks on the model"


def test_the_base_of_a_model_with_such_an_edit_is_the_same_base(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def looked_at(*_: object) -> None:
        pass

    with Editor(*build("gpt2"), guards=QUIET) as editor:
        base = Baseline.capture(editor.model, [ADA], ["counterfact"])
        was = editor.model.fingerprint
        editor.edit(ADA, method="toy-gain")
        with caplog.at_level(logging.WARNING, logger="errata"):
            (success, *_) = editor.evaluate([ADA], "counterfact", baseline=base)
            assert (success.metric, success.n) == ("ES", 1)
            editor.prepare("rome", {"tokens": 2000})
            editor.edit(ALAN, method="rome", tokens=2000, steps=2)  # reads what was prepared
            assert editor.model.fingerprint == was
        assert WARNED not in caplog.text
        handle = editor.model.module.get_submodule("transformer.h.1").register_forward_hook(
            looked_at
        )
        assert editor.model.fingerprint != was  # that one is nobody's edit
        handle.remove()
        assert editor.model.fingerprint == was


def test_what_a_later_edit_keeps_of_the_base_is_found_again(tmp_path: Path) -> None:
    folder, ledger = saved("gpt2", tmp_path / "model"), tmp_path / "ledger"
    with Editor(folder, ledger=ledger, guards=QUIET) as editor:
        was = editor.model.fingerprint
        editor.edit(ADA, method="toy-gain")
        edit = editor.edit(ALAN, method="memory", steps=2)  # records whose network it changes
        assert edit.delta.metadata()["fingerprint"] == was
        said = editor.generate(ALAN.text, max_new_tokens=4)
    with Editor(folder, ledger=ledger, guards=QUIET) as editor:
        assert editor.damaged == {}
        assert editor.generate(ALAN.text, max_new_tokens=4) == said
        assert editor.verify() == []


def test_a_model_that_still_carries_such_an_edit_is_refused(tmp_path: Path) -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, ledger=tmp_path / "one", guards=QUIET) as editor:
        edit = editor.edit(ADA, method="toy-gain")
    with pytest.raises(ConfigError, match="still carries edits"):
        Editor(module, tokenizer, ledger=tmp_path / "other")
    with Editor(module, tokenizer, ledger=tmp_path / "one", guards=QUIET) as editor:
        editor.revert(edit)
    with Editor(module, tokenizer, ledger=tmp_path / "other"):
        pass  # nothing was left
