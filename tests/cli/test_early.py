"""What can be known before a model is opened is refused before: with a suggestion, and no torch."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import errata.model.loading
from errata.cli.app import app
from errata.cli.session import Session
from errata.errors import ConfigError, UnknownNameError
from errata.model.model_source import check_model_source

FACT = ("edit", "The capital of {} is", "-s", "France", "-t", "Rome", "--model", "atlas-gpt2")
ROME = (*FACT, "--method", "rome")


@pytest.fixture(autouse=True)
def nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a model was opened")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errata.model.loading, "read_module", refuse)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((*ROME, "--set", "stpes=3"), "Did you mean 'steps'?"),
        ((*ROME, "--set", "layer=6"), "layer=6: this gpt2 model has layers 0 to 5"),
        ((*FACT, "--method", "memit", "--set", "layers=[1, -7]"), "layers 0 to 5"),
        ((*ROME, "--guard", "nrom=off"), "Did you mean 'norm'?"),
        ((*FACT, "--method", "rmoe"), "Did you mean 'rome'?"),
        (("generate", "Hello", "--model", "atlas-gtp2"), "Did you mean 'atlas-gpt2'?"),
        (("generate", "Hello", "--model", "./atlas"), "There is no folder './atlas'."),
        (("evaluate", "--file", "gone.jsonl", "--model", "atlas-gpt2"), "gone.jsonl"),
        (("prepare", "rome", "--set", "stpes=3", "--model", "atlas-gpt2"), "'steps'?"),
        (
            ("prepare", "mend", "--training", "atlas", "--start", "9999", "-m", "atlas-gpt2"),
            "has no more cases",
        ),
        (("locate", "{} is", "-s", "Bo", "--by", "trase", "-m", "atlas-gpt2"), "'trace'?"),
        (("locate", "{} is", "-s", "Bo", "--set", "smaples=1", "-m", "atlas-gpt2"), "'samples'?"),
        (("locate", "--average", "--dataset", "atals", "-m", "atlas-gpt2"), "'atlas'?"),
        (("apply", "gone.errata", "-m", "atlas-gpt2"), "There is no file 'gone.errata'"),
        (("apply", "half.errata", "-m", "atlas-gpt2"), "half.errata is not a sound"),
        (("import", "half.errata", "-m", "atlas-gpt2"), "half.errata is not a sound"),
        (("export", "-o", "e", "--format", "ggfu", "-m", "atlas-gpt2"), "'gguf'?"),
        (("merge", "-o", "e", "--format", "ggfu", "-m", "atlas-gpt2"), "'gguf'?"),
        (("generate", "", "-m", "atlas-gpt2"), "A prompt is empty"),
        ((*ROME, "--kind", "sentiment", "--example", "x"), "rome carries out requests of kind"),
        ((*ROME, "--dtype", "float99"), "Unknown dtype 'float99'"),
        ((*ROME, "--device", "tpu"), "'tpu' is no device"),
        ((*ROME, "--device", "meta"), "it holds no data"),
        ((*ROME, "--ledger", "half.errata"), "half.errata is a file; a ledger is a folder"),
        ((*ROME, "--ledger", "half.errata/l"), "Cannot open the ledger 'half.errata/l'"),
        (("generate", "a", "-m", "atlas-gpt2", "--temperature", "9"), "give --sample, too"),
        (("generate", "a", "-m", "atlas-gpt2", "--seed", "0"), "give --sample, too"),
        (("generate", "a", "-m", "atlas-gpt2", "--base", "--compare"), "give it alone"),
        (("generate", "a", "-m", "atlas-gpt2", "--base", "--only", "3f"), "give it alone"),
        (("generate", "a", "--sample", "--temperature", "0", "-m", "atlas-gpt2"), "more than 0"),
        (("evaluate", "--cases", "-m", "atlas-gpt2"), "--cases goes with --json"),
        (("check", "facts.yaml", "--adapter", "gone/", "-m", "atlas-gpt2"), "no folder 'gone'"),
    ],
)
def test_it_is_refused_with_a_suggestion(words: tuple[str, ...], reason: str) -> None:
    Path("half.errata").write_bytes((200).to_bytes(8, "little") + b'{"a": {"dty')
    Path("facts.yaml").write_text("must_not_change: [The sky is]\n")
    result = CliRunner().invoke(app, list(words))
    assert result.exit_code == 1
    assert reason in " ".join(result.stderr.split())
    assert not Path("errata-ledger").exists()


@pytest.mark.parametrize("wrong", [("--dtype", "int3"), ("--device", "tpu")])
def test_a_wrong_place_is_refused_before_anything_is_said_to_load(
    wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Session, "status", lambda *_: pytest.fail("it said that it loads"))
    result = CliRunner().invoke(app, ["generate", "Hello", "-m", "atlas-gpt2", *wrong])
    assert result.exit_code == 1
    assert repr(wrong[1]) in result.stderr


def test_without_an_active_edit_there_is_nothing_to_evaluate(tmp_path: Path) -> None:
    from errata.edits.ledger import Ledger

    Ledger.open(tmp_path / "errata-ledger", kinds={}).close()
    result = CliRunner().invoke(app, ["evaluate", "-m", "atlas-gpt2"])
    assert result.exit_code == 1
    assert "There is nothing to measure: no edit is active" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("log", "--limt", "3"), "--limt"),
        (("show",), "Missing argument"),
        (("log", "--limit", "x"), "Invalid value for '--limit'"),
        (("lgo",), "lgo"),
    ],
)
def test_a_wrong_command_line_is_json_where_json_was_asked_for(
    words: tuple[str, ...], reason: str
) -> None:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert (result.exit_code, result.stdout) == (2, "")
    error = json.loads(result.stderr)["error"]
    assert error["type"] == "UsageError"
    assert reason in error["message"]
    plain = CliRunner().invoke(app, list(words))
    assert plain.exit_code == 2
    assert not plain.stderr.startswith("{")


@pytest.mark.parametrize(
    ("words", "follows"),
    [
        ((*FACT, "--method", "ft", "--relation", "--dry-run"), "--relation=--dry-run"),
        (("edit", "{} is", "-s", "Ada", "--method", "ft", "-t", "--no-apply"), "--target=--no-ap"),
        (("export", "--out", "--overwrite"), "--out=--overwrite"),
        (("report", "run", "--markdown", "--html", "page.html"), "--markdown=--html"),
        (("log", "-l", "-n", "3"), "--ledger=-n"),
    ],
)
def test_no_option_is_taken_for_the_value_of_another(
    words: tuple[str, ...], follows: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 2
    said = json.loads(result.stderr)["error"]
    assert said["type"] == "UsageError"
    assert f"write {follows}" in said["message"]
    assert list(tmp_path.iterdir()) == []  # no file or ledger of that name


def test_a_value_that_is_called_like_an_option_can_be_given() -> None:
    result = CliRunner().invoke(app, ["log", "--ledger=--json", "-n", "3"])
    assert "There is no ledger in '--json'" in " ".join(result.stderr.split())
    result = CliRunner().invoke(app, ["show", "--ledger", "none", "--", "--json"])
    assert "There is no ledger in 'none'" in " ".join(result.stderr.split())


def test_an_edit_that_cannot_leave_as_asked_is_named(tmp_path: Path) -> None:
    from errata.edits.delta_kinds import DeltaKinds
    from errata.edits.ledger import Ledger
    from errata_grace.delta import CodebookDelta
    from tests.ledger.ledger_helpers import commit, small_edit

    entry = CodebookDelta("h.0", torch.rand(3), None, torch.tensor([4]))
    with Ledger.open(tmp_path / "errata-ledger", kinds=DeltaKinds()) as ledger:
        name = commit(ledger, small_edit(kind="codebook"), entry).id
    for words in (
        ("export", "-o", "e", "--format", "peft"),
        ("export", name, "-o", "e.gguf", "--format", "gguf"),
        ("merge", "-o", "m"),
    ):
        result = CliRunner().invoke(app, [*words, "-m", "atlas-gpt2"])
        assert result.exit_code == 1
        assert f"Edit {name} (codebook) acts while the model runs" in result.stderr
    result = CliRunner().invoke(app, ["export", "ffff", "-o", "e", "--format", "peft"])
    assert "Unknown edit 'ffff'" in result.stderr


def test_unknown_protocols_and_ids_are_refused(tmp_path: Path) -> None:
    from errata.edits.ledger import Ledger

    (tmp_path / "facts.jsonl").write_text(
        '{"prompt": "{} is", "subject": "Bo", "target_new": "x"}\n'
    )
    Ledger.open(tmp_path / "errata-ledger", kinds={}).close()
    for words, reason in (
        (("evaluate", "--file", "facts.jsonl", "-p", "counterfat"), "'counterfact'?"),
        (("evaluate", "beef"), "Unknown edit 'beef'"),
        (("revert", "beef"), "Unknown edit 'beef'"),
        (("apply", "beef"), "Unknown edit 'beef'"),
        (("rebase", "beef"), "Unknown edit 'beef'"),
        (("resolve", "beef", "--set", "l2=1"), "Unknown edit 'beef'"),
        (("generate", "Hello", "--only", "beef"), "Unknown edit 'beef'"),
        (("diff", "base", "beef"), "Unknown edit 'beef'"),
    ):
        result = CliRunner().invoke(app, [*words, "--model", "atlas-gpt2"])
        assert result.exit_code == 1
        assert reason in " ".join(result.stderr.split())


def test_a_missing_folder_is_no_hub_name(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    with pytest.raises(ConfigError, match=r"There is no folder .*Did you mean .*my-model"):
        check_model_source(str(tmp_path / "my-modle"))
    check_model_source(str(tmp_path / "my-model"))


def test_a_hub_name_is_refused_when_the_hub_is_out_of_reach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HF_HUB_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)

    def unreachable(*_: Any, **__: Any) -> None:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(UnknownNameError, match="the hub cannot be reached"):
        check_model_source("nobody/nothing", ["atlas-gpt2"])

    def slow(*_: Any, **__: Any) -> None:
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", slow)
    check_model_source("nobody/nothing")  # in doubt it is left to transformers
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UnknownNameError, match="HF_HUB_OFFLINE is set"):
        check_model_source("nobody/nothing")
