"""What a stranger's model folder may do: be read. Its code runs only where somebody allows it."""

from __future__ import annotations

import ast
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.errors import ConfigError
from errata.evaluate.metrics import CoreMetrics
from tests.families import build_model, saved
from tests.helpers import ROOT

CODE = """
from pathlib import Path
Path({trace!r}).write_text("ran")
from transformers import GPT2Config, GPT2LMHeadModel
class StrangeConfig(GPT2Config):
    model_type = "strange"
class StrangeForCausalLM(GPT2LMHeadModel):
    config_class = StrangeConfig
"""
AUTO_MAP = {
    "AutoConfig": "modeling.StrangeConfig",
    "AutoModelForCausalLM": "modeling.StrangeForCausalLM",
}
LOADERS = ("from_pretrained", "from_config", "load_dataset")
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved("gpt2", tmp_path_factory.mktemp("plain")))


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """The file that the stranger's code writes when it runs."""
    return tmp_path / "trace"


@pytest.fixture
def folder(plain: Path, tmp_path: Path, trace: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    """Make a copy of a sound model with settings of one's own; nobody may be asked anything."""

    def ask(*_: Any) -> str:
        raise AssertionError("somebody was asked on standard input")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "hf"))

    def make(tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
        made = tmp_path / "model"
        made.mkdir()
        for file in plain.iterdir():
            (made / file.name).write_bytes(file.read_bytes())
        for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer or {})):
            settings = json.loads((made / name).read_text())
            (made / name).write_text(json.dumps({**settings, **values}))
        (made / "modeling.py").write_text(CODE.format(trace=str(trace)))
        return made

    return make


def strange(folder: Folder) -> Path:
    return folder(model_type="strange", architectures=["StrangeForCausalLM"], auto_map=AUTO_MAP)


def test_every_door_says_whether_code_may_run() -> None:
    wrong = []
    for path in [*(ROOT / "core").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in LOADERS:
                if "trust_remote_code" not in [keyword.arg for keyword in node.keywords]:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_code_of_a_model_is_not_run_and_is_named(folder: Folder, trace: Path) -> None:
    with pytest.raises(ConfigError, match=r"StrangeForCausalLM.* not run.*trust_remote_code=True"):
        Editor(strange(folder))
    assert not trace.exists()


@pytest.mark.parametrize(
    "line",
    [
        "edit --file - --method rome --model {}",
        "methods rome --model {}",
        "generate text --model {}",
        "prepare rome --model {}",
    ],
)
def test_no_command_runs_it_whatever_stands_on_standard_input(
    line: str, folder: Folder, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = strange(folder)
    monkeypatch.chdir(model.parent)
    request = {"prompt": "{} is in", "subject": "Paris", "target_new": "Rome"}
    given = json.dumps(request) if "--file" in line else "y"
    done = CliRunner().invoke(app, line.format(model).split(), input=f"{given}\n")
    assert done.exit_code == 1
    assert "--trust-remote-code" in " ".join(done.stderr.split())
    assert not trace.exists()


def test_it_runs_where_somebody_allows_it(folder: Folder, trace: Path) -> None:
    with Editor(strange(folder), trust_remote_code=True) as editor:
        assert type(editor.model.module).__name__ == "StrangeForCausalLM"
    assert trace.exists()


def test_a_known_model_opens_without_its_code_and_says_so(
    folder: Folder, trace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = folder(
        tokenizer={"auto_map": {"AutoTokenizer": ["modeling.StrangeTokenizer", None]}},
        auto_map=AUTO_MAP,
    )
    with caplog.at_level(logging.WARNING, "errata"), Editor(own) as editor:
        assert type(editor.model.module).__module__.startswith("transformers.")
    assert "StrangeTokenizer" in caplog.text
    assert "not run" in caplog.text
    assert not trace.exists()


def test_a_kernel_of_the_hub_is_code_too(folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"'owner/kernel'.*not fetched"):
        Editor(folder(attn_implementation="owner/kernel"))


class Payload:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_is_read_for_its_tensors_alone(folder: Folder, trace: Path) -> None:
    model = folder()
    with Editor(model) as editor:
        weights = editor.model.module.state_dict()
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    with Editor(model) as editor:
        assert all(torch.equal(v, weights[k]) for k, v in editor.model.module.state_dict().items())
    torch.save({**weights, "more": Payload(trace)}, model / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickled checkpoint.*not loaded"):
        Editor(model)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b'{"a":' * 10_000 + b"1" + b"}" * 10_000),
        ("config.json", b"[1]"),
        ("config.json", b'{"model_type": [1]}'),
        ("config.json", b'{"model_type": "gpt2", "architectures": 5}'),
        ("config.json", None),
        ("tokenizer.json", None),
        ("model.safetensors", None),
    ],
)
def test_a_damaged_folder_is_refused_in_own_words(
    file: str, content: bytes | None, folder: Folder
) -> None:
    path = folder() / file
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half if content is None else content)
    with pytest.raises(ConfigError, match=r"holds no (model|tokenizer)|architectures must be"):
        Editor(path.parent)


@pytest.mark.parametrize("model", ["a" * 5000, "", "a\0b", "\ud800", None, 5])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(
        (ConfigError, LookupError), match=r"is no model|Unknown model|no folder"
    ) as caught:
        Editor(model)
    assert len(str(caught.value)) < 1000


def test_a_task_file_of_the_harness_needs_trust(tmp_path: Path) -> None:
    metrics = CoreMetrics(texts=(), harness_tasks=("task.yaml",))
    request = Request(prompt="{} is in", subject="Paris", target_new="Rome")
    with pytest.raises(ConfigError, match="as good as code"):
        metrics.evaluate(build_model("gpt2", tmp_path), [request], ["general"])
