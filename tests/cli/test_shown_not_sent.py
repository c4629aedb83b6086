"""What strangers wrote is shown and not sent: a terminal obeys nothing of it, in any command."""

from __future__ import annotations

import io
import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.text import Text
from typer.testing import CliRunner

from errata import Editor
from errata.cli import render
from errata.cli.app import app
from errata.cli.progress import ConsoleProgress
from errata.edits.request import Request
from tests.families import build

NASTY = "\x1b]52;c;cm0=\x07\x1b[2J\u202eevil\u2066\x9b1A\x7f[red][/nothing]"
GUARDS = {"norm": "off", "perplexity": "off", "efficacy": "off"}


def obeyed(text: str) -> set[str]:
    """Return the characters that a terminal would act on."""
    bidi = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    return {
        c
        for c in text
        if (unicodedata.category(c) == "Cc" and c not in "\n\t")
        or unicodedata.bidirectional(c) in bidi
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a ledger with an edit and a refused one, all with names that strangers chose."""
    folder = tmp_path_factory.mktemp("place")
    model = folder / "m\x1b[31m\u202e"
    for part in build("gpt2", n_positions=512):
        part.save_pretrained(model)
    nasty = Request(prompt=f"{NASTY} of {{}} is", subject=f"S{NASTY}", target_new=f"T{NASTY}")
    with Editor(model, ledger=folder / "ledger", guards=GUARDS) as editor:
        made = editor.edit(nasty, method="ft", layers=[1], steps=1)
        editor.export(folder / "one.errata", made)
        editor.ledger.note("model", {"name": str(model), "dtype": None})
    (folder / f"r{NASTY[:6].replace('/', '')}.jsonl").write_text('{"prompt": "\\u001b[2J"}\n')
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "log", "show {id}", "log --json", "show {id} --json", "verify", "doctor",
        "generate {nasty}", "generate {nasty} --json",
        "edit {nasty} --subject x --target y --method ft",
        "edit {nasty}{} --subject {nasty} --target y --method ft --set steps=1 --set layers=[1]",
        "edit --file {file} --method ft", "revert {nasty}", "apply {nasty}", "methods {nasty}",
        "export --out {ledger}/{nasty}/x", "import {nasty}", "report {nasty}", "{nasty}",
        "log --{nasty}", "log {nasty} {nasty}", "--model {nasty} log", "datasets {nasty}",
        "evaluate --model {nasty}", "log --ledger {nasty}",
    ],
)  # fmt: skip
def test_nothing_of_it_is_sent(line: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("ERRATA_LEDGER", "ledger")
    (file,) = place.glob("*.jsonl")
    identity = ledger_ids(place)[0]
    words = {"{id}": identity, "{nasty}": NASTY, "{file}": file.name, "{ledger}": "ledger"}
    arguments = line.split()
    for key, value in words.items():
        arguments = [argument.replace(key, value) for argument in arguments]
    done = CliRunner().invoke(app, arguments)
    assert obeyed(done.stdout) | obeyed(done.stderr) == set()
    assert "Unexpected" not in done.stderr
    if "--json" in arguments and done.exit_code == 0:
        assert "\x1b" in str(json.loads(done.stdout)) or "x1b" in str(json.loads(done.stdout))


def ledger_ids(place: Path) -> list[str]:
    from errata.edits.ledger import Ledger

    with Ledger.open(place / "ledger", kinds={}, readonly=True) as ledger:
        return ledger.ids()


@settings(max_examples=50)
@given(st.text(st.one_of(st.characters(), st.sampled_from(NASTY))))
def test_any_text_is_shown_and_its_json_says_the_same(text: str) -> None:
    shown = render.visible(text)
    assert obeyed(shown) == set()
    assert json.loads(render.json_text({"text": text})) == {"text": text}
    assert obeyed(render.json_text({"text": text})) == set()


@pytest.mark.parametrize("terminal", [True, False])
def test_styles_and_progress_stay_what_they_are(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    out.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    console = render.console(file=out)
    console.print(Text.assemble(("a\x1b", "bold red"), ("b", "")))
    table = render.table("x")
    table.add_row(NASTY)
    console.print(table)
    list(ConsoleProgress(console).track([1, 2], NASTY))
    text = out.getvalue()
    assert "\\x1b[2J" in text
    assert "\x1b[2J" not in text
    assert "\u202e" not in text
    assert ("\x1b[1;31ma\\x1b\x1b[0m" in text) == terminal
    assert "[red][/nothing]" in text.replace("\n", "")
