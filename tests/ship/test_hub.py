"""Pushing and pulling, against a local stand-in of the hub's interface."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.datasets import atlas
from errata.errors import (
    ConfigError,
    FingerprintError,
    IntegrityError,
    LedgerError,
    StorageError,
    UnknownNameError,
)
from errata.ship.hub import pull, push
from tests.families import build
from tests.hub_stand_in import Hub, hub

FACTS = atlas.requests(2)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with hub() as running:
        yield running


@pytest.fixture
def api(stand_in: Hub) -> HfApi:
    return HfApi(endpoint=stand_in.address)


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards={"perplexity": "off"}) as opened:
        opened.edit(FACTS, method="rome")
        yield opened


def test_edits_travel_and_can_be_reverted_one_by_one(
    editor: Editor, stand_in: Hub, api: HfApi
) -> None:
    address = push(editor, "me/facts", base="me/atlas", message="Two facts", api=api)
    assert address == f"{stand_in.address}/me/facts"
    assert stand_in.private["me/facts"]
    assert stand_in.commits == ["Two facts"]
    assert stand_in.files["me/facts"].keys() == {"edits.errata", "README.md"}
    card = stand_in.files["me/facts"]["README.md"].decode()
    assert FACTS[0].target_new in card
    assert "library_name: errata" in card
    with editor.disabled():
        before = editor.generate(FACTS[0].text)
    wanted = editor.generate(FACTS[0].text)
    with Editor("atlas-gpt2") as other:
        pulled = pull(other, "me/facts", api=api)
        assert other.generate(FACTS[0].text) == before  # they are off
        for edit in pulled:
            other.apply(edit)
        assert other.generate(FACTS[0].text) == wanted
        other.revert(pulled[0])
        other.revert(pulled[1])
        assert other.verify() == []


def test_adapters_and_models_say_nothing_of_this_machine(
    editor: Editor, stand_in: Hub, api: HfApi
) -> None:
    with pytest.raises(ConfigError, match="what it is called on the hub"):
        push(editor, "me/any", api=api)
    assert stand_in.files == {}
    own = str(editor.model.config._name_or_path)
    push(editor, "me/adapter", format="peft", base="me/atlas", rank=1, api=api)
    push(editor, "me/gguf", editor.log()[0].edit, format="gguf", base="me/atlas", api=api)
    push(editor, "me/model", format="checkpoint", base="me/atlas", private=False, api=api)
    assert editor.model.config._name_or_path == own
    assert not stand_in.private["me/model"]
    config = json.loads(stand_in.files["me/adapter"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "me/atlas"
    assert "edits.gguf" in stand_in.files["me/gguf"]
    assert "model.safetensors" in stand_in.files["me/model"]
    for files in stand_in.files.values():
        assert "README.md" in files
        for data in files.values():
            assert own.encode() not in data
            assert b"hf_secret" not in data


def test_the_merged_model_loads_from_there(
    editor: Editor, stand_in: Hub, api: HfApi, tmp_path: Path
) -> None:
    push(editor, "me/model", format="checkpoint", base="me/atlas", api=api)
    for name, data in stand_in.files["me/model"].items():
        (tmp_path / name).write_bytes(data)
    with Editor(tmp_path) as merged:
        assert merged.generate(FACTS[0].text) == editor.generate(FACTS[0].text)


def test_what_is_refused_leaves_the_ledger_alone(
    editor: Editor, stand_in: Hub, api: HfApi, tmp_path: Path
) -> None:
    with Editor(build("llama")) as other:
        with pytest.raises(ConfigError, match="not on the hub, or not for you"):
            pull(other, "me/nothing", api=api)
        with pytest.raises(ConfigError, match='"owner/name"'):
            pull(other, "me/a/b", api=api)
        push(editor, "me/adapter", format="peft", base="me/atlas", api=api)
        with pytest.raises(ConfigError, match=r"holds no edits\.errata"):
            pull(other, "me/adapter", api=api)
        push(editor, "me/facts", base="me/atlas", api=api)
        with pytest.raises(ConfigError, match="no such revision"):
            pull(other, "me/facts", revision="v9", api=api)
        with pytest.raises(FingerprintError):
            pull(other, "me/facts", api=api)
        stand_in.files["me/facts"]["edits.errata"] = b"no such file at all"
        with pytest.raises(IntegrityError):
            pull(other, "me/facts", api=api)
        with pytest.raises(LedgerError, match="nothing to push"):
            push(other, "me/facts", api=api)
        assert list(other.log()) == []
    with pytest.raises(UnknownNameError, match="peft"):
        push(editor, "me/facts", format="pfet", base="me/atlas", api=api)
    stand_in.denied = True
    with pytest.raises(ConfigError, match="hf auth login"):
        push(editor, "me/other", base="me/atlas", api=api)
    with pytest.raises(StorageError, match="cannot be reached"):
        push(editor, "me/other", base="me/atlas", api=HfApi(endpoint="http://127.0.0.1:9"))


@pytest.mark.slow
def test_the_command_line_pushes_and_pulls(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = HfApi(endpoint=stand_in.address)
    monkeypatch.setattr("errata.ship.hub._client", lambda api: client)

    def run(*arguments: str, ledger: str = "mine", code: int = 0) -> str:
        where = ["--ledger", str(tmp_path / ledger)]
        result = CliRunner().invoke(app, [*arguments, *where])
        assert result.exit_code == code, result.output
        return result.output

    fact = FACTS[0]
    run("edit", fact.prompt, "--subject", fact.subject, "--target", fact.target_new,
        "--method", "rome", "--model", "atlas-gpt2")  # fmt: skip
    assert "--base" in run("push", "me/facts", code=1)
    assert "me/facts" in run("push", "me/facts", "--base", "me/atlas")
    run("pull", "me/facts", "--model", "atlas-gpt2", "--apply", ledger="theirs")
    assert fact.target_new in run("generate", fact.text, ledger="theirs")
