"""The base of a model in memory: its files, where they still hold what it was loaded with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from errata import Editor, zoo
from errata.testing import state_of
from errata.testing.contract import assert_same

pytestmark = [
    pytest.mark.usefixtures("toys"),
    pytest.mark.skipif(
        not zoo.MODELS["atlas-gpt2"].is_present, reason="the weights of atlas-gpt2 are not here"
    ),
]
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
FACT = {"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}
EDITED = "transformer.h.0.mlp.c_proj.weight"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one's own."""
    return shutil.copytree(zoo.model_path("atlas-gpt2"), tmp_path / "model")


def loaded(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer as transformers loads them."""
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def copied(editor: Editor) -> set[str]:
    """Return which tensors of the base are held in memory: what lies in a file is read anew."""
    pristine = editor.model.pristine
    return {name for name in pristine.names() if pristine[name] is pristine[name]}


def edited_and_reverted(editor: Editor) -> None:
    """Write an edit and take it off; the model has to be what it was, bit for bit."""
    base = state_of(editor.model)
    edit = editor.edit(FACT, method="toy-low-rank")
    assert not torch.equal(editor.model.parameters[EDITED].cpu(), base[EDITED])
    editor.revert(edit)
    assert_same(state_of(editor.model), base)
    assert editor.verify() == []


def test_what_the_files_say_is_not_kept_a_second_time(folder: Path) -> None:
    with Editor(loaded(folder), guards=QUIET) as editor:
        assert "lm_head.weight" not in editor.model.pristine  # tied: once, with the embedding
        assert copied(editor) == set()
        edited_and_reverted(editor)


def test_what_was_changed_after_loading_is_copied(folder: Path) -> None:
    module, tokenizer = loaded(folder)
    with torch.no_grad():
        module.get_parameter(EDITED)[3, 5] += 1e-3
        module.transformer.ln_f.bias.zero_().neg_()  # not the same bits as zeros
    module.register_buffer("extra", torch.arange(3.0))
    changed = module.get_parameter(EDITED).detach().clone()
    with Editor((module, tokenizer), guards=QUIET) as editor:
        assert copied(editor) == {EDITED, "transformer.ln_f.bias", "extra"}
        edited_and_reverted(editor)
        assert torch.equal(editor.model.parameters[EDITED], changed)


def test_a_model_in_another_precision_is_copied(folder: Path) -> None:
    module, tokenizer = loaded(folder)
    with Editor((module.to(torch.bfloat16), tokenizer), guards=QUIET) as editor:
        assert copied(editor) == set(editor.model.pristine.names())
        edited_and_reverted(editor)


@pytest.mark.parametrize(
    ("revision", "here"), [(REVISION, True), (None, True), (REVISION[::-1], False)]
)
def test_a_snapshot_in_the_cache_of_the_hub_counts(
    folder: Path, revision: str | None, here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = tmp_path / "hub" / "models--me--atlas"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(REVISION)
    shutil.copytree(folder, entry / "snapshots" / REVISION)
    module, tokenizer = loaded(folder)
    module.config._name_or_path, module.config._commit_hash = "me/atlas", revision
    with Editor((module, tokenizer), guards=QUIET) as editor:
        assert (copied(editor) == set()) is here
        edited_and_reverted(editor)


@pytest.mark.parametrize("name", ["", "nobody/nothing", "a--b", "../x", "no such folder"])
def test_a_name_that_leads_nowhere_means_a_copy(name: str, folder: Path) -> None:
    module, tokenizer = loaded(folder)
    module.config._name_or_path = name
    with Editor((module, tokenizer), guards=QUIET, keep="auto") as editor:
        assert copied(editor) == set(editor.model.pristine.names())


def test_clone_copies_whatever_the_files_say(folder: Path) -> None:
    with Editor(loaded(folder), guards=QUIET, keep="clone") as editor:
        assert copied(editor) == set(editor.model.pristine.names())
        shutil.rmtree(folder)
        edited_and_reverted(editor)
