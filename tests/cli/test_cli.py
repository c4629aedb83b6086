"""The command line: what it prints, what it leaves behind, and its exit codes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import GPT2LMHeadModel
from typer.main import get_command
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.cli.error_reports import EXIT_CODES
from errata.edits.ledger import Ledger
from errata.edits.ledger.files import LOCK
from errata.edits.ledger.model_note import model_of
from tests.families import saved
from tests.helpers import ROOT

CASES = ROOT / "tests" / "data" / "cases"
FACT = ("The capital of {} is", "--subject", "Veldonia", "--target", "Oslo")
PLUGIN = """
import time
from pathlib import Path

import torch
from pydantic import Field

from errata import MethodConfig, hookimpl
from errata.edits.delta import Factor, LowRankDelta


class NudgeConfig(MethodConfig):
    scale: float = Field(default=0.1, gt=0, description="How far the weight is moved")
    layer: int = Field(default=0, description="Block whose MLP is moved")
    pause: float = Field(default=0.0, ge=0, description="Seconds to think")
    marker: str = Field(default="", description="File that gets a line when an edit begins")


class Nudge:
    name = "nudge"
    config = NudgeConfig

    @hookimpl
    def edit(self, model, requests, config):
        if config.marker:
            with Path(config.marker).open("a") as handle:
                handle.write(requests[0].subject + "\\n")
        time.sleep(config.pause)
        where = model.anatomy.mlp_out(config.layer)
        d_out, d_in = model.anatomy.shape(model.module, where)
        generator = torch.Generator().manual_seed(config.seed)
        u = torch.randn(d_out, 1, generator=generator) * config.scale
        v = torch.randn(d_in, 1, generator=generator) * config.scale
        factor = Factor(u, v, model.anatomy.transposed(where))
        return LowRankDelta({model.anatomy.weight(where): factor})
"""
STANZA = """
methods:
  nudge:
    title: Nudge, a method for tests
    family: intrinsic
    delta_kind: low_rank
    status: experimental
    capabilities: {kinds: [modify, erase], sequential: true, architectures: [decoder]}
    presets:
      - {match: {model_type: gpt2}, values: {scale: 0.25}, source: the test suite}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with its tokenizer, on disk."""
    return Path(saved("gpt2", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an installed third-party method: package, metadata, registry file."""
    folder = tmp_path_factory.mktemp("site")
    package = folder / "errata_nudge"
    package.mkdir()
    (package / "__init__.py").write_text(PLUGIN)
    (package / "registry.yaml").write_text(STANZA)
    info = folder / "errata_nudge-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: errata-nudge\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nnudge = errata_nudge:Nudge\n")
    return folder


Run = Callable[..., Any]


@pytest.fixture
def workplace(tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, with the test method installed."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(workplace: Path) -> Run:
    """Run a command in the process and check its exit code."""

    def call(*args: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [str(arg) for arg in args])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        return result

    return call


@pytest.fixture
def run_json(run: Run) -> Run:
    """Run a command with --json and return what it printed, parsed."""

    def call(*args: Any, code: int = 0) -> Any:
        return json.loads(run(*args, "--json", code=code).stdout)

    return call


# The method of these tests changes a weight and achieves nothing, which is exit code 5.
IDLE = ("--guard", "efficacy=off")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
OFF = ("--guard", "perplexity=off", *IDLE)  # most tests are about other things


def edit(run: Run, checkpoint: Path, *more: Any, code: int = 0) -> Any:
    base = ("edit", *FACT, "--method", "nudge", "--model", checkpoint)
    quiet = () if "efficacy=off" in more else IDLE if more else OFF
    return run(*base, *quiet, *more, code=code)


# -- the shape of the command line -----------------------------------------------------------------


def commands() -> dict[str, Any]:
    group = get_command(app)
    found = {}
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        for sub, subcommand in (inner or {}).items():
            found[f"{name} {sub}"] = subcommand
        if inner is None:
            found[name] = command
    return found


def test_the_commands_are_these() -> None:
    assert set(commands()) == {
        "demo", "edit", "revert", "apply", "rebase", "resolve", "log", "show", "verify", "generate",
        "locate", "prepare", "diff", "evaluate", "bench", "report", "datasets", "export", "import",
        "merge", "push", "pull", "methods", "check", "serve", "ui", "zoo list", "zoo get",
        "zoo path", "zoo train", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_examples_and_json(name: str, run: Run) -> None:
    page = run(*name.split(), "--help").stdout
    assert "Examples" in page
    assert f"errata {name}" in page
    assert "--json" in page


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_example_in_the_help_is_a_valid_command_line(name: str) -> None:
    command = commands()[name]
    text = command.epilog.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line.partition("|")[2] if line.startswith("cat ") else line)
        for stop in ("|", ">"):
            words = words[: words.index(stop)] if stop in words else words
        assert words[: 1 + len(name.split())] == ["errata", *name.split()]
        command.make_context(name, words[1 + len(name.split()) :]).close()


def test_exit_codes_are_documented(run: Run) -> None:
    page = " ".join(run("--help").stdout.split())
    documentation = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert meaning in page
        assert f"| {code} |" in documentation


def test_every_command_is_documented() -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in commands().items():
        assert f"errata {name}" in documentation
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert parameter.opts[0] in documentation, f"{name} {parameter.opts[0]}"


@pytest.mark.parametrize(
    ("line", "suggestion"),
    [("lgo", "'log'"), ("log --refusd", "--refused"), ("zoo lst", "'list'")],
)
def test_a_misspelt_word_gets_a_suggestion_and_exit_code_2(
    line: str, suggestion: str, run: Run
) -> None:
    assert suggestion in run(*line.split(), code=2).stderr


def test_a_misspelt_method_gets_a_suggestion(run: Run, checkpoint: Path) -> None:
    result = edit(run, checkpoint, "--method", "nugde", code=1)
    assert "Did you mean 'nudge'?" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def python(code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True, text=True, check=False, env={**os.environ, **env}, timeout=120,
    )  # fmt: skip


def test_torch_is_not_imported_for_what_asks_no_model(workplace: Path) -> None:
    lines = ["--help", "edit --help", "methods", "--version", "log"]
    Ledger.open(workplace / "errata-ledger", kinds={}).close()
    result = python(
        """
        import sys
        from errata.cli import main
        for line in sys.argv[1:]:
            sys.argv = ["errata", *line.split()]
            try:
                main()
            except SystemExit as end:
                assert not end.code, (line, end.code)
            heavy = {"torch", "transformers", "peft", "numpy"} & set(sys.modules)
            assert not heavy, (line, heavy)
        """,
        *lines,
    )
    assert result.returncode == 0, result.stderr


# -- one fact --------------------------------------------------------------------------------------


def test_the_life_of_an_edit(run: Run, run_json: Run, checkpoint: Path, workplace: Path) -> None:
    done = json.loads(edit(run, checkpoint, "--json").stdout)
    (record,) = done["edits"]
    assert record["active"]
    assert record["method"] == "nudge"
    assert record["config"]["scale"] == 0.25  # the preset for this architecture
    assert done["answers"][0]["protocol"].startswith("generated: greedy")
    name = record["id"]

    # The ledger remembers the model: no --model from here on.
    listed = run_json("log")
    assert listed["model"] == str(checkpoint)
    assert [(e["id"], e["active"]) for e in listed["edits"]] == [(name, True)]
    shown = run_json("show", name[:5])
    assert shown["history"][0]["kind"] == "edit"
    assert run_json("verify") == {**run_json("verify"), "sound": True, "problems": []}

    assert run_json("revert", name)["active"] == []
    assert [e["active"] for e in run_json("log")["edits"]] == [False]
    assert run_json("log", "--active")["edits"] == []
    assert run_json("apply", name)["active"] == [name]
    assert run_json("revert", "--all")["reverted"] == [name]
    assert (workplace / "errata-ledger" / "ledger.sqlite").is_file()


def test_tables_say_the_same(run: Run, checkpoint: Path) -> None:
    output = edit(run, checkpoint).stdout
    assert "The capital of Veldonia is → Oslo" in output
    assert "before" in output
    assert "generated: greedy, natural stop" in output
    page = run("log").stdout
    assert "nudge" in page
    assert "on" in page.split()
    page = run("show", run("log", "--json").stdout.split('"id": "')[1][:12]).stdout
    for word in ("Hyper-parameters", "Base model", "History", "scale", "0.25"):
        assert word in page


def test_several_edits_are_reverted_in_any_order(run: Run, run_json: Run, checkpoint: Path) -> None:
    names = []
    for subject in ("France", "Ana", "Bo"):
        done = run_json(
            "edit", "The capital of {} is", "--subject", subject, "--target", "Kyoto",
            "--method", "nudge", "--model", checkpoint, "--set", f"seed={len(names)}", *OFF,
        )  # fmt: skip
        names.append(done["edits"][0]["id"])
    assert run_json("revert", names[1])["active"] == [names[0], names[2]]
    assert run_json("verify")["sound"]
    assert run_json("revert", names[2], names[0])["active"] == []
    assert (
        "the model is the base again"
        in run("apply", names[0]).stdout + run("revert", names[0]).stdout
    )


def test_conflicting_edits_are_named(run: Run, run_json: Run, checkpoint: Path) -> None:
    first = json.loads(edit(run, checkpoint, "--json").stdout)["edits"][0]["id"]
    run("edit", *FACT[:-1], "Kyoto", "--method", "nudge", *OFF)
    assert first[:8] in run("log").stdout
    assert run_json("log")["edits"][1]["outcome"]["conflicts"] == [first]


def test_a_newer_answer_supersedes_and_the_older_is_restored(
    run: Run, run_json: Run, checkpoint: Path
) -> None:
    first = json.loads(edit(run, checkpoint, "--json").stdout)["edits"][0]["id"]
    newer = ("edit", *FACT[:-1], "Kyoto", "--method", "nudge", "--set", "seed=1", *OFF)
    second = run_json(*newer, "--supersede")["edits"][0]
    assert second["outcome"]["supersedes"] == [first]
    assert [e["id"] for e in run_json("log", "--active")["edits"]] == [second["id"]]
    assert first in run("show", second["id"]).stdout
    done = run_json("revert", second["id"], "--restore")
    assert done["reverted"] == [second["id"]]
    assert done["restored"] == done["active"] == [first]
    assert run_json("verify")["sound"]


def test_stale_edits_are_shown_and_computed_again(
    run: Run, run_json: Run, checkpoint: Path
) -> None:
    edit(run, checkpoint, *OFF)
    for number, subject in enumerate(("France", "Ana")):
        fact = ("edit", "The capital of {} is", "-s", subject, "-t", "Oslo", "--method", "nudge")
        run(*fact, "--set", f"seed={number}", *OFF)
    first, second, third = (e["id"] for e in run_json("log")["edits"])
    assert "Nothing is stale" in run("rebase").stdout
    assert f"Stale: {second}, {third}." in " ".join(run("revert", first).stderr.split())
    assert [e["stale"] for e in run_json("log")["edits"]] == [False, True, True]
    shown = run("log").stdout
    assert shown.count("stale") >= 3
    assert "errata rebase" in shown
    assert "stale" in run("show", second).stdout
    done = run_json("rebase")
    assert list(done["replaces"].values()) == [second, third]
    assert done["active"] == done["rebased"]
    assert not any(e["stale"] for e in run_json("log")["edits"])
    assert "errata rebase" not in run("log").stdout
    assert second in run("show", done["rebased"][0]).stdout
    assert run_json("verify")["sound"]
    run("rebase", second, code=1)  # no longer on the model


def test_no_apply_records_without_touching_the_model(
    run: Run, run_json: Run, checkpoint: Path
) -> None:
    assert "errata apply" in edit(run, checkpoint, "--no-apply").stdout
    assert [e["active"] for e in run_json("log")["edits"]] == [False]


def test_a_dry_run_leaves_nothing(run: Run, run_json: Run, checkpoint: Path) -> None:
    assert json.loads(edit(run, checkpoint, "--dry-run", "--json").stdout)["dry_run"]
    run("log", code=1)
    edit(run, checkpoint)
    edit(run, checkpoint, "--dry-run", "--set", "seed=1")  # on top of what is active
    assert len(run_json("log")["edits"]) == 1


# -- guards ----------------------------------------------------------------------------------------


def test_a_refused_edit_exits_3_and_is_in_the_log(
    run: Run, run_json: Run, checkpoint: Path
) -> None:
    strict = ("--guard", "norm=refuse", "--guard", "norm_limit=1e-9")
    result = edit(run, checkpoint, *strict, code=3)
    assert result.stderr.startswith("Refused: ")
    assert "Accept it with --guard norm=warn." in " ".join(result.stderr.split())
    listed = run_json("log", "--refused")
    assert listed["edits"] == []
    assert "norm" in listed["refused"][0]["reason"]
    assert "norm" in run("log", "--refused").stdout
    result = edit(run, checkpoint, *strict, "--skip-refused", "--json", code=3)
    assert json.loads(result.stdout)["edits"] == []
    error = json.loads(edit(run, checkpoint, *strict, "--json", code=3).stderr)["error"]
    assert error["type"] == "EditRefused"
    assert error["measured"]["relative_norm"]["value"] > 1e-9


@pytest.mark.parametrize("guard", ["norms=refuse", "norm=maybe", "norm"])
def test_a_bad_guard_is_explained(guard: str, run: Run, checkpoint: Path) -> None:
    assert "norm" in edit(run, checkpoint, "--guard", guard, code=1).stderr


def test_neighbours_and_checks_are_shown_after_an_edit(run: Run, run_json: Run) -> None:
    fact = ("edit", "The instrument of {} is", "-s", "Oswin Galdor", "-t", "harp")
    loud = ("--method", "ft", "--set", "lr=0.05", "--set", "steps=10", "-m", "atlas-gpt2", *OFF)
    check = ("--ask", "The mayor of the city Oakmere is")
    page = " ".join(run(*fact, *loud, *check).stdout.split())
    assert "layer 1, a preset: measured on the embedded model" in page
    assert "! new answer" in page
    assert "Warning: 4 of 4 neighbours changed" in page
    assert "The mayor of the city Oakmere is" in page
    report = run_json(*fact, *loud, *check, "--dry-run")
    assert [one["role"] for one in report["answers"]] == [
        "request", *["neighbour"] * 4, "check",
    ]  # fmt: skip


def test_what_cannot_be_asked_is_refused_before_an_edit_and_does_not_hide_one(
    run: Run, run_json: Run, tmp_path: Path
) -> None:
    fact = ("edit", "The instrument of {} is", "-s", "Oswin Galdor", "-t", "harp")
    how = ("--method", "grace", "-m", "atlas-gpt2", "--ledger", tmp_path / "l", *OFF)
    long = "x " * 300
    assert "takes at most 256" in run(*fact, *how, "--ask", long, code=1).stderr
    assert "--ask is empty" in run(*fact, *how, "--ask", " ", code=1).stderr
    assert run_json("log", "--ledger", tmp_path / "l")["edits"] == []
    made = run(*fact, *how, "--paraphrase", long)
    assert "The edit is made, and what changed cannot be shown" in " ".join(made.stderr.split())
    (edit,) = run_json("log", "--ledger", tmp_path / "l")["edits"]
    assert edit["id"] in made.stdout


def test_what_is_asked_of_a_model_that_writes_nothing(run: Run, tmp_path: Path) -> None:
    ask = ("--method", "ft", "--set", "steps=1", "--ask", "Rome is in Italy.", *OFF)
    label = ("edit", "{} was born in", "-s", "Beyoncé", "-t", "economic", "--kind", "label")
    page = run(*label, *ask, "--model", saved("bert-classifier", tmp_path / "classes")).stdout
    assert "Rome is in Italy." in page
    assert "the most probable class" in " ".join(page.split())
    assert "--sweep" not in page
    masked = ("edit", "{} was born in", "-s", "Beyoncé", "-t", "Rome", "--ledger", tmp_path / "l")
    refused = run(*masked, *ask, "--model", saved("bert", tmp_path / "masked"), code=1).stderr
    assert "an encoder: it generates no text" in " ".join(refused.split())


def test_an_edit_without_effect_exits_5_and_says_so_last(run: Run, checkpoint: Path) -> None:
    command = ("edit", *FACT, "--method", "nudge", "--model", checkpoint)
    last = run(*command, "--guard", "perplexity=off", code=5).stdout.split("\n\n")[-1]
    assert "No effect: 'The capital of Veldonia is' → 'Oslo' is not said." in " ".join(last.split())
    assert "errata revert" in last
    report = json.loads(run(*command, "--json", code=5).stdout)
    assert report["without_effect"] == [report["edits"][0]["id"]]


def test_the_command_that_takes_off_what_has_no_effect_can_be_copied(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    file = write_requests(workplace / "a.jsonl", ["France", "Ana", "Bo", "Kyoto", "Oslo", "Rome"])
    quiet = ("--guard", "perplexity=off", "--set", "scale=1e-6")
    page = run("edit", "--file", file, "--method", "nudge", "-m", checkpoint, *quiet, code=5).stdout
    idle = run_json("log", "--active")["edits"]
    assert len(idle) == 6
    command = page[page.rindex("errata revert") :].replace("\\\n", " ")  # as a shell reads it
    name, *words = shlex.split(command)
    assert name == "errata"
    run(*words)
    assert run_json("log", "--active")["edits"] == []


def test_off_is_a_mode_not_a_yaml_boolean(run: Run, checkpoint: Path) -> None:
    output = edit(run, checkpoint, "--guard", "perplexity=off", "--guard", "efficacy=off").stdout
    assert "perplexity" not in output


# -- many facts ------------------------------------------------------------------------------------


def write_requests(path: Path, subjects: list[str]) -> Path:
    lines = [
        json.dumps({"prompt": "The capital of {} is", "subject": name, "target_new": "Oslo"})
        for name in subjects
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_of_requests_and_going_on_with_it(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    base = ("--method", "nudge", "--model", checkpoint, *OFF)
    run_json("edit", "--file", write_requests(workplace / "a.jsonl", ["France", "Ana"]), *base)
    more = write_requests(workplace / "b.jsonl", ["France", "Ana", "Bo"])
    report = run_json("edit", "--file", more, "--resume", *base)
    assert report["skipped"] == 2
    assert len(run_json("log")["edits"]) == 3
    assert "Nothing left to do" in run("edit", "--file", more, "--resume", *base).stdout


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_file_may_be_an_array_or_lines_with_a_byte_order_mark(
    form: str, bom: bytes, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    (request,) = json.loads((CASES / "array_for_edit_file.json").read_text())
    # U+2028 ends a line for `str.splitlines`, not in JSON.
    request = {**request, "paraphrases": ["Its capital\u2028is"], "relation": None}
    text = json.dumps([request] if form == "array" else request, ensure_ascii=False)
    (workplace / "facts.json").write_bytes(bom + text.encode())
    base = ("--method", "nudge", "--model", checkpoint, "--no-apply")
    (edit,) = run_json("edit", "--file", "facts.json", *base)["edits"]
    assert edit["requests"][0]["subject"] == "Vesland"
    assert edit["requests"][0]["paraphrases"] == ["Its capital\u2028is"]


def test_a_dataset_in_its_published_format_is_edited_and_measured(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    base = ("--model", checkpoint)
    source = f"counterfact={CASES / 'flat_paired_lists.json'}"
    nudge = ("--method", "nudge", *IDLE)
    report = run_json("edit", "--dataset", source, "--limit", "1", *nudge, *base)
    (edit,) = report["edits"]
    assert edit["requests"][0]["case_id"] == "17"
    rest = run_json("edit", "--dataset", source, "--resume", *nudge, *base)
    assert (rest["skipped"], len(rest["edits"])) == (1, 1)
    measured = run_json("evaluate", "--dataset", source, "--limit", "1", "-p", "counterfact", *base)
    assert measured["requests"] == 1
    error = run("edit", "--file", CASES / "call_schema.json", *base, "--method", "nudge", code=1)
    assert "--dataset NAME=PATH" in " ".join(error.stderr.split())


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{not json", "expecting property name"),
        ("[1, 2]", "a request is a JSON object, not [1, 2]"),
        ('{"prompt": "no place", "subject": "Bo", "target_new": "x"}', "does not stand"),
        ('{"prompt": "{} is", "subject": "Bo", "target": "x"}', "Did you mean 'target_new'?"),
        ('{"prompt": "The capital of {} is", "subject": "France", "target_new": "Oslo"}',
         "the same request as in line 1"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(
    line: str, reason: str, run: Run, checkpoint: Path, workplace: Path
) -> None:
    file = write_requests(workplace / "requests.jsonl", ["France"])
    file.write_text(file.read_text() + "\n" + line + "\n")
    error = edit_file(run, file, checkpoint, code=1).stderr
    joined = "".join(error.split("\n"))
    assert "requests.jsonl:3" in joined or "at line 3" in joined
    assert reason in " ".join(error.split())


def test_what_cannot_be_read_or_asked_is_left_out_where_that_is_said(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    file = write_requests(workplace / "requests.jsonl", ["France", "long " * 300, "France", "Ana"])
    edit = ("edit", "--method", "nudge", *OFF, "--model", checkpoint)
    told = " ".join(run(*edit, "--file", file, "--skip-bad").stderr.split())
    assert "1 left out as bad; the first:" in told
    assert "requests.jsonl:3: the same request as in line 1" in told
    assert "cannot be asked 1 of 3 requests; left out: 'The capital of long" in told
    assert len(run_json("log")["edits"]) == 2
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[3]]))
    for words in (
        (*edit, "--file", file), (*edit, "--dataset", f"jsonl={file}"),
        ("evaluate", "--dataset", f"jsonl={file}", "-p", "generation"),
    ):  # fmt: skip
        refused = " ".join(run(*words, code=1).stderr.split())
        assert "cannot be asked 1 of 3 requests: 'The capital of long" in refused
        assert "takes at most" in refused
        assert "--skip-bad leaves such requests out" in refused
    measured = run_json(
        "evaluate", "--dataset", f"jsonl={file}", "--skip-bad", "-p", "generation", "--no-base"
    )
    assert measured["requests"] == 2
    assert "--skip-bad goes with" in run(*edit, *FACT, "--skip-bad", code=1).stderr


def edit_file(run: Run, file: Path, checkpoint: Path, code: int = 0) -> Any:
    return run("edit", "--file", file, "--method", "nudge", "--model", checkpoint, code=code)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--method", "nudge"], "Say what to edit"),
        ([*FACT], "Which method?"),
        ([*FACT, "--method", "nudge"], "Which model?"),
        (["{} is", "--subject", "Bo", "--target", "x", "--file", "f", "--method", "nudge"],
         "--file beside"),
        ([*FACT, "--method", "nudge", "--set", "scale"], "write NAME=VALUE"),
        ([*FACT, "--method", "nudge", "--set", "scael=1"], "Did you mean 'scale'?"),
        ([*FACT, "--method", "nudge", "--set", "scale=-1"], "greater than 0"),
        ([*FACT, "--method", "nudge", "--kind", "label"], "modify, erase"),
    ],
)  # fmt: skip
def test_what_is_missing_or_wrong_is_said(
    words: list[str], reason: str, run: Run, checkpoint: Path
) -> None:
    if reason in ("Did you mean 'scale'?", "greater than 0", "modify, erase"):
        words = [*words, "--model", str(checkpoint)]
    assert reason in " ".join(run("edit", *words, code=1).stderr.split())


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["evaluate", "3f2a", "--file", "f"], "--file beside 3f2a: each says which requests"),
        (["evaluate", "--limit", "2"], "--limit goes with --file or --dataset"),
        (["edit", "--file", "f", "--dataset", "atlas"], "--file beside --dataset: each says"),
        (["locate", "--average", "--file", "f", "--dataset", "atlas"], "--file beside --dataset"),
    ],
)
def test_which_requests_are_meant_is_said_once(words: list[str], reason: str, run: Run) -> None:
    assert reason in " ".join(run(*words, code=1).stderr.split())


# -- looking ---------------------------------------------------------------------------------------


def test_generate(run: Run, run_json: Run, checkpoint: Path) -> None:
    prompt = "The capital of France is"
    base = run_json("generate", prompt, "--model", checkpoint, "--max-new-tokens", 4)
    assert base["active"] == []
    edit(run, checkpoint, "--set", "scale=3", "--guard", "norm=off")
    both = run_json("generate", prompt, "--compare", "--max-new-tokens", 4)["texts"][0]
    assert both["base"] == base["texts"][0]["edited"]
    assert run_json("generate", prompt, "--base", "--max-new-tokens", 4)["texts"] == [
        {"prompt": prompt, "base": both["base"]}
    ]
    sampled = ("generate", prompt, "--sample", "--seed", 3, "--max-new-tokens", 4)
    assert run_json(*sampled) == run_json(*sampled)
    piped = CliRunner().invoke(app, ["generate", "-", "--json"], input="Ana speaks\nBo lives in\n")
    assert [text["prompt"] for text in json.loads(piped.stdout)["texts"]] == [
        "Ana speaks", "Bo lives in",
    ]  # fmt: skip


def test_locate(run: Run, run_json: Run, checkpoint: Path) -> None:
    words = ("locate", "The capital of {} is", "--subject", "France", "--model", checkpoint)
    found = run_json(*words, "--set", "samples=2")
    assert 0 <= found["layer"] < 3
    assert found["protocol"].startswith("causal trace")
    assert "layers 0 – 2" in run(*words, "--set", "samples=2").stdout
    assert "samples" in run(*words, "--set", "sample=2", code=1).stderr


def test_evaluate(run: Run, run_json: Run, checkpoint: Path) -> None:
    edit(run, checkpoint, "--target-true", "Paris")
    measured = run_json("evaluate", "--protocol", "counterfact", "--protocol", "generation")
    assert measured["measurements"]
    assert all(one["protocol"] and one["n"] for one in measured["measurements"])
    assert measured["base"]
    page = run("evaluate").stdout
    assert "teacher-forced" in page
    assert "base" in page
    assert "edited" in page
    assert "Did you mean 'counterfact'?" in " ".join(
        run("evaluate", "--protocol", "counterfat", code=1).stderr.split()
    )


def test_requests_of_different_edits_are_different_cases(
    run: Run, run_json: Run, checkpoint: Path, tmp_path: Path
) -> None:
    """Files number their cases alike, or not at all."""
    for subject in ("Veldonia", "Istria"):
        for more in ({}, {"case_id": 0}):
            prompt = "The capital of {} is" if more else "{} lies in"
            record = {"prompt": prompt.format(subject), "subject": subject, "target_new": "Oslo"}
            file = tmp_path / "first.json"
            file.write_text(json.dumps([{**record, **more}]))
            source = ("--dataset", f"counterfact={file}")
            run("edit", *source, "--method", "nudge", "--model", checkpoint, *OFF)
    measured = run_json("evaluate", "-p", "generation", "--no-base", "--cases")
    assert measured["requests"] == 4
    exact = next(m for m in measured["measurements"] if m["metric"] == "rewrite_exact")
    assert (exact["n"], len(set(exact["case_ids"]))) == (4, 4)
    assert "0" in exact["case_ids"]  # the first keeps what its file calls it


def test_a_table_in_the_place_of_a_request_file_is_told(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "f.csv"
    file.write_text("prompt,subject,target_new\nBo is in,Bo,Oslo\n")
    for words in (("evaluate", "--model", "x"), ("edit", "--method", "nudge", "--model", "x")):
        said = run(*words, "--file", file, code=1).stderr
        assert f"--dataset jsonl={file}" in "".join(said.split("\n")).replace("  ", " ")


def test_what_a_dataset_says_twice_is_edited_once(
    run: Run, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "facts.json"
    file.write_text(json.dumps(2 * [{"prompt": "Bo is in", "subject": "Bo", "target_new": "Oslo"}]))
    source = ("--dataset", f"counterfact={file}")
    done = run("edit", *source, "--method", "nudge", "--model", checkpoint, *OFF)
    assert "1 request left out: the same as an earlier one" in " ".join(done.stderr.split())


def test_a_dataset_is_measured_with_options_of_its_format(
    run: Run, run_json: Run, tmp_path: Path
) -> None:
    file = tmp_path / "relations.jsonl"
    file.write_text(json.dumps({
        "relation": "P103", "template": "The native language of [X] is [Y] .",
        "wrong": ["[X] never spoke [Y] ."],
    }))  # fmt: skip
    asked = ("evaluate", "--dataset", f"calibration={CASES.parent / 'datasets' / 'pararel'}")
    given = (*asked, "--set", f"templates={file}", "--model", "atlas-gpt2")
    measured = run_json(*given, "--cases", "--protocol", "calibration", "-p", "generation")
    assert {"false_rate", "log_CKA"} <= {one["metric"] for one in measured["measurements"]}
    assert {"prompt", "text", "right"} <= measured["answers"][0].keys()
    assert "answers" not in run_json(*given)
    said = run(*asked, "--set", "tempaltes=x", code=1).stderr
    assert "'templates'" in " ".join(said.split())
    said = run("evaluate", "--set", "templates=x", code=1).stderr
    assert "goes with --dataset" in " ".join(said.split())


def test_evaluate_says_what_a_protocol_lacks(run: Run, checkpoint: Path) -> None:
    edit(run, checkpoint)
    said = run("evaluate", "-p", "counterfact", "-p", "generation").stderr
    said = " ".join(said.split())
    assert said.count("counterfact: nothing to measure; no request has target_true") == 1
    assert "generation: nothing" not in said
    result = run("evaluate", "-p", "portability", code=1)  # measured nothing at all: no success
    said = " ".join(result.stderr.split())
    assert "portability: questions whose answers follow" in said
    assert "docs/datasets.md" in said
    assert "measured" not in result.stdout


# -- shipping --------------------------------------------------------------------------------------


def test_export_import_and_merge(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    edit(run, checkpoint)
    name = run_json("log")["edits"][0]["id"]
    assert run_json("export", "--out", "one.errata")["edits"] == [name]
    assert "exists already" in run("export", "--out", "one.errata", code=1).stderr
    there = ("--ledger", "other", "--model", checkpoint)
    assert not run_json("import", "one.errata", *there)["edits"][0]["active"]
    assert run_json("apply", name, "--ledger", "other")["active"] == [name]
    run_json("import", "one.errata", "--apply", *there)
    run("merge", "--out", "merged")
    merged = GPT2LMHeadModel.from_pretrained(workplace / "merged").state_dict()
    base = GPT2LMHeadModel.from_pretrained(checkpoint).state_dict()
    changed = [key for key in base if not torch.equal(base[key], merged[key])]
    assert changed == ["transformer.h.0.mlp.c_proj.weight"]
    assert run("export", "--format", "zip", "--out", "x", code=1).stderr


def test_an_edit_of_another_model_is_refused(run: Run, checkpoint: Path, workplace: Path) -> None:
    edit(run, checkpoint)
    run("export", "--out", "one.errata")
    other = GPT2LMHeadModel.from_pretrained(checkpoint)
    with torch.no_grad():
        other.transformer.h[0].mlp.c_proj.weight[0, 0] += 1
    other.save_pretrained(workplace / "other-model")
    for file in checkpoint.glob("tokenizer*"):
        (workplace / "other-model" / file.name).write_bytes(file.read_bytes())
    result = run("import", "one.errata", "--model", "other-model", "--ledger", "other", code=1)
    assert "made for another model" in " ".join(result.stderr.split())


def test_what_was_refused_leaves_no_word_of_the_dtype(
    run: Run, checkpoint: Path, workplace: Path
) -> None:
    """The ledger remembers what opens its model once an edit is in it, not before."""
    edit(run, checkpoint)
    run("export", "--out", "one.errata")
    there = ("apply", "one.errata", "--model", checkpoint, "--ledger", "other")
    result = run(*there, "--dtype", "bf16", code=1)
    said = " ".join(result.stderr.split())
    assert "was opened in another dtype than this one (bfloat16" in said
    run(*there)
    with Ledger.open(workplace / "other", kinds={}, readonly=True) as ledger:
        assert model_of(ledger) == {"name": str(checkpoint), "dtype": None}


def test_a_command_waits_for_another_that_changes_the_ledger(
    run: Run, checkpoint: Path, workplace: Path
) -> None:
    """What it computes would be refused and lost otherwise; reading commands do not wait."""
    edit(run, checkpoint)
    begun, active = Event(), list[list[str]]()

    def other() -> None:
        with FileLock(workplace / "errata-ledger" / LOCK):
            begun.set()
            time.sleep(2)  # the command would be done
            with Ledger.open(workplace / "errata-ledger", kinds={}, readonly=True) as ledger:
                active.append(list(ledger.active_ids()))

    Thread(target=other).start()
    begun.wait()
    run("log")
    assert active == []
    result = run("revert", "--all")
    assert len(active[0]) == 1  # it was not taken off meanwhile
    assert "no edit active" in " ".join(result.stdout.split())


# -- catalogue and environment ---------------------------------------------------------------------


def test_methods_lists_what_is_installed_and_where_it_comes_from(run: Run, run_json: Run) -> None:
    rows = {row["name"]: row for row in run_json("methods")["methods"]}
    assert set(rows) >= {"rome", "grace", "adalora", "nudge"}
    assert rows["nudge"]["distribution"] == "errata-nudge 1.2"
    assert "errata-nudge 1.2" in " ".join(run("methods").stdout.split())


def test_methods_shows_every_value_and_the_layer_that_set_it(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    (workplace / "registry.yaml").write_text("methods: {nudge: {defaults: {layer: 1}}}\n")
    shown = run_json("methods", "nudge", "--model", checkpoint, "--set", "pause=0.5")
    values = {
        value["name"]: (value["value"], value["set_by"]) for value in shown["hyper_parameters"]
    }
    assert values == {
        "seed": (0, "default"),
        "scale": (0.25, "plugin errata_nudge"),
        "layer": (1, str(workplace / "registry.yaml")),
        "pause": (0.5, "argument"),
        "marker": ("", "default"),
    }
    page = run("methods", "nudge", "--model", checkpoint).stdout
    assert "the test suite" in page
    assert "How far the weight is moved" in " ".join(page.split())


def test_doctor(run: Run, run_json: Run, checkpoint: Path) -> None:
    edit(run, checkpoint)
    report = run_json("doctor")
    assert report["libraries"]["torch"]
    assert report["ledger"] == {**report["ledger"], "edits": 1, "active": 1, "sound": True}
    assert {row["name"] for row in report["methods"]} >= {"nudge", "rome"}
    first, *others = report["registry"]["layers"]
    assert first == "shipped"
    assert {"plugin errata_nudge", "plugin errata_rome"} <= set(others)
    assert "Nothing to fix." in run("doctor").stdout


def test_a_bug_report_names_no_folder_and_no_fact(
    run: Run, run_json: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = run("doctor", "--report").stdout
    assert text.startswith("| | |\n|---|---|\n| errata | ")
    for part in ("torch", "rome (errata", "| problems | none |"):
        assert part in text
    report = run_json("doctor")
    hidden = [folder["path"] for folder in report["folders"]]
    assert not any(path in text for path in [*hidden, report["ledger"]["path"], str(tmp_path)])


def test_doctor_names_a_plugin_that_does_not_load(
    run_json: Run, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = workplace / "site" / "broken-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[errata.methods]\nbroken = errata_broken:Broken\n")
    monkeypatch.syspath_prepend(workplace / "site")
    report = run_json("doctor", code=1)
    assert any("errata_broken" in problem for problem in report["problems"])


def test_zoo(run: Run, run_json: Run) -> None:
    names = [row["name"] for row in run_json("zoo", "list")["models"]]
    assert "atlas-gpt2" in names
    assert "Did you mean 'atlas-gpt2'?" in " ".join(
        run("zoo", "path", "atlas-gpt", code=1).stderr.split()
    )
    assert "Did you mean 'gpt2'?" in " ".join(
        run("zoo", "train", "gpt3", "--out", "model", code=1).stderr.split()
    )


# -- trouble ---------------------------------------------------------------------------------------


def test_errors_are_one_json_object_with_json(run: Run) -> None:
    error = json.loads(run("log", "--json", code=1).stderr)["error"]
    assert error["type"] == "LedgerError"
    assert "--ledger" in error["message"]


def test_a_method_that_crashes_is_named_and_leaves_nothing(
    run: Run, run_json: Run, checkpoint: Path, toys: None
) -> None:
    result = edit(run, checkpoint, "--method", "toy-raises", code=1)
    said = " ".join(result.stderr.split())
    assert "Error: Method 'toy-raises' failed in its `edit` hook: ZeroDivisionError: half" in said
    assert "--debug shows where" in said
    assert "Traceback" not in result.stderr
    assert run_json("log")["edits"] == []
    assert run_json("verify", "--model", checkpoint)["sound"]


def test_debug_shows_the_traceback(run: Run) -> None:
    assert "Traceback" not in run("log", code=1).stderr
    assert "Traceback" in run("log", "--debug", code=1).stderr


def test_an_unknown_id_is_suggested(run: Run, run_json: Run, checkpoint: Path) -> None:
    edit(run, checkpoint)
    name = run_json("log")["edits"][0]["id"]
    assert name in run("revert", "0" if name[0] != "0" else "1", code=1).stderr
    run("revert", code=1)


def test_revert_all_takes_off_what_is_not_on_the_model_too(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    edit(run, checkpoint)
    edit(run, checkpoint)
    names = [one["id"] for one in run_json("log")["edits"]]
    next((workplace / "errata-ledger").rglob("*.safetensors")).unlink()
    assert sorted(run_json("revert", "--all")["reverted"]) == sorted(names)
    assert not any(one["active"] for one in run_json("log")["edits"])


def test_damage_is_found_and_exits_4(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    edit(run, checkpoint)
    run("revert", "--all")
    for blob in (workplace / "errata-ledger").rglob("*.safetensors"):
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.chmod(0o600)
        blob.write_bytes(bytes(data))
    for words in (["verify"], ["verify", "--ledger-only"]):
        report = run_json(*words, code=4)
        assert not report["sound"]
        assert report["problems"]
    assert "Problem: " in run("verify", code=4).stdout


def test_the_ledger_remembers_model_and_dtype(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path
) -> None:
    edit(run, checkpoint, "--dtype", "bf16")
    with Ledger.open(workplace / "errata-ledger", kinds={}, readonly=True) as ledger:
        assert model_of(ledger) == {"name": str(checkpoint), "dtype": "bf16"}
    assert run_json("verify")["sound"]  # in float32 the fingerprints would differ


def test_a_ledger_that_python_made_names_its_model(
    run_json: Run, checkpoint: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    folder = workplace / "errata-ledger"
    with Editor(checkpoint.name, ledger=folder, dtype=torch.bfloat16, guards=QUIET) as editor:
        editor.edit("The capital of {} is", subject="France", target_new="Rome", method="ft")
    monkeypatch.chdir(workplace)
    with Ledger.open(folder, kinds={}, readonly=True) as ledger:
        assert model_of(ledger) == {"name": str(checkpoint), "dtype": "bf16"}
    assert run_json("verify")["sound"]
    # A model in memory has no name that would open it again.
    with Editor(checkpoint) as opened:
        module, tokenizer = opened.model.module, opened.model.tokenizer
    with Editor((module, tokenizer), ledger=workplace / "other", guards=QUIET) as editor:
        editor.edit("The capital of {} is", subject="France", target_new="Rome", method="ft")
        assert model_of(editor.ledger) == {}


def test_environment_variables_name_ledger_and_model(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERRATA_LEDGER", str(workplace / "elsewhere"))
    monkeypatch.setenv("ERRATA_MODEL", str(checkpoint))
    run("edit", *FACT, "--method", "nudge", *OFF)
    assert (workplace / "elsewhere" / "ledger.sqlite").is_file()
    assert len(run_json("log")["edits"]) == 1


def test_quiet_says_only_what_was_asked_for(run: Run, checkpoint: Path) -> None:
    assert edit(run, checkpoint, "--quiet").stderr == ""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_leaves_everything_consistent(
    run: Run, run_json: Run, checkpoint: Path, workplace: Path, site: Path
) -> None:
    file = write_requests(workplace / "requests.jsonl", ["France", "Ana", "Bo"])
    marker = workplace / "marker"
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable, "-m", "errata", "edit", "--file", str(file), "--method", "nudge",
        "--model", str(checkpoint), "--set", f"marker={marker}", "--set", "pause=1", *OFF,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path},
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 300  # only so that a hang ends
        while not marker.exists() or marker.read_text().count("\n") < 2:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the second edit never began: {process.communicate()}")
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)  # in the middle of the second edit
        _, stderr = process.communicate(timeout=300)
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].startswith("Interrupted.")
    assert "Traceback" not in stderr
    assert [e["active"] for e in run_json("log")["edits"]] == [True]
    assert run_json("verify")["sound"]
    report = run_json("edit", "--file", file, "--method", "nudge", "--resume", *OFF)
    assert (report["skipped"], len(report["edits"])) == (1, 2)


@pytest.mark.parametrize(
    "words", [["log"], pytest.param(["log", "--json"], marks=pytest.mark.slow)]
)
def test_a_reader_that_stops_reading_is_no_error(
    words: list[str], run: Run, checkpoint: Path
) -> None:
    edit(run, checkpoint)
    with subprocess.Popen(
        [sys.executable, "-m", "errata", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        stderr = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert b"Error" not in stderr
    assert b"Traceback" not in stderr


def test_output_without_a_terminal_has_no_control_characters(run: Run, checkpoint: Path) -> None:
    result = edit(run, checkpoint)
    assert "\x1b" not in result.stdout + result.stderr
