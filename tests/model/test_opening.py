"""What is no bare, whole model is refused in words, and so is what generation does not take."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from errata import Editor
from errata.cli import render
from errata.errors import (
    CapabilityError,
    ConfigError,
    IntegrityError,
    LedgerChangedError,
    LedgerError,
)
from errata.model.tokens import TokenError
from errata.testing import state_of
from errata.testing.contract import assert_same
from tests.families import build

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
FACT = {"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}


def wrapped(how: str) -> nn.Module:
    module, _ = build("gpt2")
    if how == "lora":
        settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], r=2,
                                   fan_in_fan_out=True)  # fmt: skip
        return peft.get_peft_model(module, settings)
    if how == "prompt":
        return peft.get_peft_model(
            module, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
    if how == "compiled":
        return OptimizedModule(module, lambda forward: forward)  # what torch.compile gives
    return nn.DataParallel(module)


@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("lora", r"merge_and_unload\(\) keeps .* model.unload\(\) leaves it out"),
        ("prompt", r"model.get_base_model\(\)"),
        ("compiled", "model._orig_mod"),
        ("parallel", "model.module"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_wrapper_is_refused_with_what_unwraps_it(how: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"is a wrapper around a model.*{remedy}"):
        Editor(wrapped(how), build("gpt2")[1])


def test_what_is_no_model_or_has_no_data_is_refused_in_words() -> None:
    module, tokenizer = build("gpt2")
    with pytest.raises(ConfigError, match="Linear is no model of transformers"):
        Editor(nn.Linear(2, 2), tokenizer)
    empty = copy.deepcopy(module).to("meta")
    for device in (None, "cpu"):
        with pytest.raises(ConfigError, match=r"without data .*transformer.wte.weight and \d+"):
            Editor(empty, tokenizer, device=device)


def test_nan_in_a_base_weight_is_named_where_it_is_first_used(tmp_path: Path) -> None:
    module, tokenizer = build("gpt2")
    name = "transformer.h.1.mlp.c_fc.weight"
    with torch.no_grad():
        module.get_parameter(name)[0, 0] = float("nan")
    with Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path) as editor:
        for use in (
            lambda: editor.generate("Ada lives in"),
            lambda: editor.generate("Ada lives in", do_sample=True),
            lambda: editor.edit(FACT, method="rome"),
        ):
            with pytest.raises(IntegrityError, match=f"its unedited '{name}' has NaN"):
                use()
        assert editor.ledger.ids() == []


def test_a_token_that_is_added_after_opening_is_refused() -> None:
    module, tokenizer = build("gpt2")
    with Editor(module, tokenizer, guards=QUIET) as editor:
        assert tokenizer.add_tokens(["Zorblax"]) == 1
        with pytest.raises(TokenError, match=r"'Zorblax'.*no embedding for: is this the model's"):
            editor.generate("Ada Zorblax")


def test_a_tokenizer_that_cannot_be_the_models_is_doubted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    module, tokenizer = build("gpt2")
    wide = copy.deepcopy(module)
    wide.resize_token_embeddings(2 * len(tokenizer) + 2)
    padded = copy.deepcopy(module)
    padded.resize_token_embeddings(int(1.5 * len(tokenizer)))  # ByT5's share
    with Editor(module, tokenizer), Editor(padded, tokenizer):
        assert "tokenizer" not in caplog.text
    with Editor(wide, tokenizer):
        assert "Is this the model's tokenizer?" in caplog.text


def test_a_model_that_cannot_read_its_tokenizers_text_is_doubted(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """As many tokens as the model has, but other ones: only its perplexity shows it."""
    with Editor("atlas-gpt2", artifacts=tmp_path) as editor:
        editor.edit(FACT, method="ft", steps=1)
        module, tokenizer = editor.model.module, copy.deepcopy(editor.model.tokenizer)
    assert "tokenizer" not in caplog.text
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    words = parts["model"]["vocab"]
    parts["model"]["vocab"] = dict(zip(words, reversed(words.values()), strict=True))
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(parts))
    with Editor(module, tokenizer, artifacts=tmp_path) as editor:
        editor.edit(FACT, method="ft", steps=1)
    assert re.search(r"worse than a uniform guess .* Is this the model's tokenizer\?", caplog.text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sample": True}, "Did you mean 'do_sample'?"),
        ({"max_new_tokens": -1}, "must be 1 at least"),
        ({"max_new_tokens": 0}, "must be 1 at least"),
        ({"batch_size": 0}, "must be 1 at least"),
        ({"stop": [""]}, "empty string"),
        ({"temperature": float("nan")}, "temperature > 0"),
        ({"do_sample": True, "seed": 2**70}, "64 bits"),
    ],
)
def test_options_that_generation_does_not_take(options: dict[str, Any], said: str) -> None:
    with Editor(*build("gpt2"), guards=QUIET) as editor:
        with pytest.raises(ConfigError) as caught:
            editor.generate("Ada", **options)
    assert said in str(caught.value)


def test_a_folder_that_cannot_be_a_ledger_is_refused_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(IntegrityError, match="a ledger is a folder"):
        Editor("no/such-model", ledger=tmp_path / "file")
    with pytest.raises(ConfigError, match="it holds no data"):
        Editor("no/such-model", ledger=tmp_path / "l" / "m", device="meta")
    assert not (tmp_path / "l").exists()


def test_an_editor_says_that_another_process_changed_its_ledger(tmp_path: Path) -> None:
    build_one = build("gpt2")
    with Editor(*build_one, ledger=tmp_path / "l", guards=QUIET) as one:
        edit = one.edit(FACT, method="ft", steps=1)
        with Editor(*build("gpt2"), ledger=tmp_path / "l", guards=QUIET) as two:
            one.revert(edit)
            for change in (two.revert, two.apply):
                with pytest.raises(LedgerChangedError, match="Another process changed"):
                    change(edit.id)
            two.refresh()
            with pytest.raises(LedgerError, match=r"not active\. Active now: none"):
                two.revert(edit.id)


def test_an_edit_without_weights_does_not_vanish_from_an_adapter(tmp_path: Path) -> None:
    with Editor("atlas-gpt2", guards=QUIET, artifacts=tmp_path) as editor:
        fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
        editor.edit(fact, method="ft", steps=1)
        words = editor.edit({**fact, "subject": "Spain"}, method="ice")
        with pytest.raises(CapabilityError, match=f"Edit {words.id} .prompt. acts while"):
            editor.export(tmp_path / "adapter", format="peft")


def test_ctrl_c_finds_the_command_line_from_the_first_import_on(tmp_path: Path) -> None:
    # The interrupt comes with the first import that is not of the standard library, or of what
    # takes over Ctrl-C.
    script = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        top = name.partition('.')[0]\n"
        "        own = ('errata', 'errata.cli', 'errata.cli.interrupts')\n"
        "        here = name in own or top in sys.stdlib_module_names\n"
        "        if not here:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from errata.cli import main\n"
        "main()\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    made = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert (made.returncode, made.stderr) == (128 + signal.SIGINT, "Interrupted.\n")


def test_a_path_that_is_longer_than_a_line_is_printed_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/a/" + "0123456789" * 8 + ".safetensors"
    for printed in (f"The file {path} is damaged.", render.Text(f"The file {path} is damaged.")):
        render.console(stderr=True).print(printed)
        assert path in capsys.readouterr().err
    render.console(stderr=True).print("word " * 20)
    assert len(capsys.readouterr().err.splitlines()) > 2


@pytest.mark.slow
def test_editors_open_in_threads_at_once() -> None:
    with ThreadPoolExecutor(4) as threads:
        opened = list(threads.map(lambda _: Editor("atlas-gpt2"), range(8)))
    first, *others = (state_of(editor.model) for editor in (*opened, Editor("atlas-gpt2")))
    for state in others:
        assert_same(state, first)
