"""What is wrong with what a user wrote, in the user's words and with the place it stands in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.bench import BenchConfig
from errata.check import FactFile
from errata.cli.app import app
from errata.cli.wording import in_options
from errata.common.storage import read_whole
from errata.contract import plugins
from errata.contract.guards import GuardPolicy
from errata.contract.registry import Registry
from errata.errors import ConfigError, ErrataError, IntegrityError, RequestError

REQUEST = {"prompt": "{} is", "subject": "Ada", "target_new": "Rome"}
FACT = {"prompt": "A is", "answer": "b"}
RUN = {"model": "atlas-gpt2", "methods": "rome", "datasets": "atlas"}


def rome(**values: Any) -> Any:
    return Registry.load().resolve("rome", plugins.load("rome").config, {}, values)[0]


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: Request.parse({**REQUEST, "paraphrases": "text"}),
         ("paraphrases: must be a list, not 'text'",)),
        (lambda: Request.parse({**REQUEST, "target_new": 3}), ("target_new: must be text, not 3",)),
        (lambda: FactFile.parse({"must_say": [{**FACT, "answer": False}]}),
         ("must_say.0.answer", "must be text, not False: put it in quotes")),
        (lambda: FactFile.parse({"must_not_say": [{"prompt": "A", "contains": []}]}),
         ("must_not_say.0.contains: is empty: give at least one",)),
        (lambda: FactFile.parse({"settings": {"at_least": True}, "must_say": [FACT]}),
         ("settings.at_least: must be a number, not True",)),
        (lambda: BenchConfig.parse({**RUN, "methods": []}),
         ("methods: no method is named: for the unedited model alone, name 'base'",)),
        (lambda: BenchConfig.parse({**RUN, "limit": True}), ("limit: must be a number, not True",)),
        (lambda: GuardPolicy.parse({"norm_limit": True}), ("norm_limit: must be a number",)),
        (lambda: GuardPolicy.parse({"norm_limit": "x"}), ("must be a number, not 'x'",)),
        (lambda: rome(layer=True), ("layer", "argument", "must be a number, not True")),
        (lambda: rome(layer=1.5), ("layer = 1.5 (argument): must be a whole number or 'auto'",)),
    ],
)  # fmt: skip
def test_a_wrong_value_is_explained_without_jargon(
    call: Callable[[], Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(ErrataError) as caught:
        call()
    said = str(caught.value)
    assert all(part in said for part in parts), said
    assert "valid" not in said
    assert "Tuple" not in said


def test_whole_numbers_are_taken_as_before() -> None:
    assert rome(layer=1.0).layer == rome(layer="1").layer == rome(layer=1).layer == 1


def test_a_file_that_is_no_mapping_is_said_so(tmp_path: Path) -> None:
    file = tmp_path / "facts.yaml"
    file.write_text("3")
    with pytest.raises(ConfigError, match=r"must hold a mapping; it holds a number"):
        FactFile.read(file)


def test_requests_are_no_file_of_edits(tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    file.write_text('{"prompt": "{} is", "subject": "Ada", "target_new": "Rome"}')
    with pytest.raises(IntegrityError, match=r"requests\.jsonl is no file of edits"):
        read_whole(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"never": "b"},
        {"answer": "New York", "never": "york"},
        {"answer": ["b", "c"], "never": ["b", "C"]},
    ],
)
def test_a_fact_that_can_never_hold_is_refused(entry: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"which `never` forbids: no model can do both"):
        FactFile.parse({"must_say": [{**FACT, **entry}]})


@pytest.mark.parametrize(
    "entry", [{"answer": ["b", "c"], "never": "c"}, {"answer": "Maryland", "never": "Mary"}]
)
def test_a_fact_that_can_hold_is_not(entry: dict[str, Any]) -> None:
    assert FactFile.parse({"must_say": [{**FACT, **entry}]}).tests()


# -- where it is from ------------------------------------------------------------------------------


def run(*words: Any) -> str:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 1, result.stdout
    return " ".join(result.stderr.split())


def test_a_wrong_key_of_a_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c1.yaml").write_text("layr: 1\n")
    edit = ("edit", "{} is", "-s", "Ada", "-t", "Rome", "--method", "rome", "-m", "atlas-gpt2")
    assert "'layr' (given in c1.yaml)" in run(*edit, "--config", "c1.yaml")
    assert "'layr' (given in the arguments)" in run(*edit, "--set", "layr=1")
    Path("c1.yaml").write_text("layer: x\n")
    assert "layer = 'x' (c1.yaml)" in run(*edit, "--config", "c1.yaml")


def test_a_wrong_key_of_a_run_file_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = "model: atlas-gpt2\ndatasets: atlas\nmethods: "
    Path("tiny.yaml").write_text(base + "rome\nlimmit: 3\n")
    assert "Bad run configuration in tiny.yaml: Unknown key 'limmit'" in run("bench", "tiny.yaml")
    Path("tiny.yaml").write_text(base + "{method: rome, config: {layr: 1}}\nlimit: 1\n")
    said = run("bench", "tiny.yaml")
    assert "'layr' (given in the run 'tiny', config of rome)" in said


def test_who_lost_a_race_is_told_what_a_shell_can_do() -> None:
    said = in_options("The ledger changed. Nothing was written: refresh, and try again.")
    assert said.endswith("Nothing was written: repeat the command.")


# -- texts that errata adds ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards={"efficacy": "off", "perplexity": "off"}) as opened:
        yield opened


def test_a_prompt_that_does_not_fit_behind_contexts_is_told_of_them(editor: Editor) -> None:
    limit = editor.model.anatomy.context
    prompt = "The " + "very " * (limit - 16) + "old capital of {} is"
    fact = {**REQUEST, "prompt": prompt}
    with pytest.raises(RequestError, match=r"read alone, but not behind the texts") as caught:
        editor.edit(fact, method="rome", apply=False)
    assert len(str(caught.value)) < 400
    with pytest.raises(RequestError, match=r"^A text of \d+ tokens"):  # its own fault
        editor.edit({**fact, "prompt": "very " * 20 + prompt}, method="rome", apply=False)


def test_a_special_token_is_no_subject(editor: Editor) -> None:
    token = editor.model.tokenizer.all_special_tokens[0]
    with pytest.raises(RequestError, match=r"is a special token of atlas-gpt2's tokenizer"):
        editor.edit({**REQUEST, "prompt": "The end of {} is", "subject": token}, method="rome")


def test_white_space_of_a_long_text_is_told_in_short(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    request = Request.parse({**REQUEST, "target_new": "word " * 480})
    assert request.target_new == ("word " * 480).strip()
    assert "White space was taken off: at the ends of target_new 'word word" in caplog.text
    assert "word '." in caplog.text
    assert len(caplog.messages[0]) < 300
