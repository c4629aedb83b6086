"""Facts as tests: what a file may say, how answers are judged, and what each door does with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml
from typer.testing import CliRunner

from errata import Editor, EditRefused
from errata.check import FactFile, FactGuard, RecordedAnswers, check_facts
from errata.cli.app import app
from errata.datasets import atlas
from errata.edits.edit import Edit
from errata.errors import ConfigError, ErrataError, IntegrityError

pytest_plugins = ["pytester"]
FACT = atlas.requests(1)[0]
OLD, NEW = FACT.target_true or "", FACT.target_new
OTHERS = [r for r in atlas.requests(40) if r.prompt == FACT.prompt and r.subject != FACT.subject]
NEIGHBOUR = OTHERS[0]


def facts(**more: Any) -> dict[str, Any]:
    """Return a file of facts that holds after the edit and not before."""
    entry = {
        "prompt": FACT.prompt, "subject": FACT.subject, "answer": NEW, "never": OLD,
        "neighbours": [NEIGHBOUR.subject],
    }  # fmt: skip
    return {"model": "atlas-gpt2", "must_say": [entry], **more}


def write(path: Path, data: object) -> Path:
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards={"perplexity": "off"}) as opened:
        yield opened


@pytest.fixture(scope="module")
def computed(editor: Editor) -> Edit:
    """The edit of the fact, which is not on the model."""
    edit: Edit = editor.edit(FACT, method="rome", apply=False)
    return edit


@pytest.fixture
def edited(editor: Editor, computed: Edit) -> Iterator[Editor]:
    (edit,) = editor.apply(computed)
    yield editor
    editor.revert(edit)


# -- the file --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({}, "asks nothing"),
        ({"must_say": [{"prompt": "A {} is", "answer": "b"}]}, "give the subject"),
        ({"must_say": [{"prompt": "A is"}]}, "give an answer"),
        ({"must_say": [{"prompt": "A is", "answer": ""}]}, "must_say.0.answer"),
        ({"must_say": [{"prompt": "A is", "answer": "b", "criterium": "x"}]}, "no such key"),
        ({"must_say": [{"prompt": "A is", "answer": "b", "criterion": "fuzzy"}]}, "'contained'"),
        ({"must_say": [{"prompt": "A is", "answer": "b", "at_least": 2}]}, "at_least"),
        ({"must_say": [{"prompt": "A is", "answer": "b"}], "must_not_change": ["A is"]}, "twice"),
        ({"must_say": [{"prompt": "A {} is", "answers": {"x": "b"}, "paraphrases": ["A"]}]},
         "paraphrase"),
        ({"must_not_change": ["A {} is"]}, "subjects"),
        ({"must_not_say": [{"prompt": "A", "contains": []}]}, "contains"),
        ({"must_not_say": [{"prompt": "A", "contains": "b", "criterion": "probability"}]},
         "free text"),
        ({"facts": []}, "no such key"),
        ({3: []}, "keys"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_and_named(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        FactFile.parse(data, "facts.yaml")


def test_a_file_becomes_questions_in_its_order() -> None:
    found = FactFile.parse(
        {
            "settings": {"criterion": "exact", "max_new_tokens": 5},
            "must_say": [
                {"prompt": "{} began in ", "answers": {"The war": 1914, "It": ["now", "today"]},
                 "paraphrases": ["The year {} began was"], "neighbours": {"Peace": 1918}},
            ],
            "must_not_change": ["Sugar is", {"prompt": "{} is", "subjects": ["Salt"]}],
            "must_not_say": [{"prompt": "Tell me", "contains": "lies"}],
        }
    ).tests()  # fmt: skip
    assert [(t.role, t.prompt, t.answers) for t in found] == [
        ("fact", "The war began in", ("1914",)),
        ("paraphrase", "The year The war began was", ("1914",)),
        ("fact", "It began in", ("now", "today")),
        ("paraphrase", "The year It began was", ("now", "today")),
        ("neighbour", "Peace began in", ("1918",)),
        ("unchanged", "Sugar is", ()),
        ("unchanged", "Salt is", ()),
        ("forbidden", "Tell me", ()),
    ]
    assert {t.max_new_tokens for t in found} == {5, 60}


@pytest.mark.parametrize("text", ["- a", "must_say: !!python/object:os.system {}", "a: [", "\x00"])
def test_what_is_no_plain_yaml_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "facts.yaml").write_text(text)
    with pytest.raises(ErrataError, match=r"facts\.yaml"):
        FactFile.read(tmp_path / "facts.yaml")


# -- asking ----------------------------------------------------------------------------------------


def test_facts_fail_before_the_edit_and_hold_after_it(editor: Editor) -> None:
    file = FactFile.parse(facts())
    before = check_facts(editor, file)
    assert [one.status for one in before.results] == ["failed", "skipped"]
    assert OLD in before.failed[0].why
    edit = editor.edit(FACT, method="rome")
    after = check_facts(editor, file)
    assert after.passed, after.summary()
    assert after.active == (edit.id,)
    assert [one.status for one in after.results] == ["passed", "passed"]
    with editor.disabled():
        assert not check_facts(editor, file).passed
    editor.revert(edit)
    assert editor.verify() == []


@pytest.mark.parametrize("criterion", ["exact", "contained", "probability"])
def test_each_criterion_tells_the_edited_model_from_the_base(
    criterion: str, edited: Editor
) -> None:
    entry = {"prompt": FACT.text, "answer": ["never this", NEW], "criterion": criterion}
    file = FactFile.parse({"must_say": [entry]})
    assert check_facts(edited, file).passed
    with edited.disabled():
        (found,) = check_facts(edited, file).failed
    assert NEW in found.why
    assert (found.probability is None) == (criterion != "probability")


def test_what_changed_or_must_not_be_said_fails(edited: Editor) -> None:
    file = FactFile.parse(
        {
            "must_not_change": [
                FACT.text, NEIGHBOUR.text,
                {"prompt": FACT.prompt, "subjects": [OTHERS[1].subject], "criterion": "probability",
                 "at_least": 0.01},
            ],
            "must_not_say": [{"prompt": OTHERS[3].text, "contains": [OTHERS[3].target_true or ""]},
                             {"prompt": OTHERS[2].text, "contains": "nobody says this"}],
        }
    )  # fmt: skip
    found = check_facts(edited, file)
    assert [one.status for one in found.results] == [
        "failed",
        "passed",
        "passed",
        "failed",
        "passed",
    ]
    assert found.compared_with.startswith("the base")


def test_recorded_answers_stand_for_the_base(editor: Editor, tmp_path: Path) -> None:
    file = FactFile.parse({"must_not_change": [FACT.text, NEIGHBOUR.text]})
    recorded = RecordedAnswers.ask(editor.model, file.tests())
    loaded = RecordedAnswers.load(recorded.save(tmp_path / "facts.recorded.json"))
    assert loaded.answers == recorded.answers
    assert check_facts(editor, file, loaded).passed
    edit = editor.edit(FACT, method="rome")
    (failed,) = check_facts(editor, file, loaded).failed
    editor.revert(edit)
    assert failed.test.prompt == FACT.text
    with pytest.raises(ConfigError, match="record again"):
        check_facts(editor, FactFile.parse({"must_not_change": ["Something else is"]}), loaded)


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "errata-recorded"}', '{"kind": 3}', "\xff"])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    place = tmp_path / "facts.recorded.json"
    place.write_text(text, encoding="latin-1")
    with pytest.raises(IntegrityError, match=r"facts\.recorded\.json"):
        RecordedAnswers.load(place)


# -- as a guard ------------------------------------------------------------------------------------


def test_an_edit_that_breaks_a_fact_leaves_nothing_behind(tmp_path: Path) -> None:
    guard = FactGuard(FactFile.parse({"must_not_change": [FACT.text]}), source="facts.yaml")
    with Editor("atlas-gpt2", ledger=tmp_path / "l", guards={"checks": [guard]}) as editor:
        before = {n: p.clone() for n, p in editor.model.parameters.items()}
        with pytest.raises(EditRefused, match=r"facts\.yaml: 1 of 1 fail") as refused:
            editor.edit(FACT, method="rome")
        assert refused.value.measured["facts"]["failed"][0]["prompt"] == FACT.text
        assert editor.model.stack.ids == []
        assert editor.verify() == []
        assert all(torch.equal(before[n], p) for n, p in editor.model.parameters.items())
        assert len(list(editor.ledger.refused())) == 1
        kept = editor.edit(OTHERS[0], method="rome")  # another fact is no business of this file
        assert kept.outcome.warnings == ()
        assert guard.report is not None
        assert guard.report.passed


def test_a_guard_that_does_not_refuse_warns(tmp_path: Path) -> None:
    guard = FactGuard(FactFile.parse({"must_not_change": [FACT.text]}), refuse=False)
    with Editor("atlas-gpt2", guards={"checks": [guard], "perplexity": "off"}) as editor:
        edit = editor.edit(FACT, method="rome")
        assert editor.model.stack.ids == [edit.id]
    assert any("1 of 1 fail" in text for text in edit.outcome.warnings)


# -- the command line ------------------------------------------------------------------------------


def run(*args: object) -> Any:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.mark.slow
def test_the_command_checks_edits_records_and_writes_junit(tmp_path: Path) -> None:
    file = write(tmp_path / "facts.yaml", facts())
    ledger = ("--ledger", tmp_path / "ledger")
    fails = run("check", file, *ledger, "--json")
    assert fails.exit_code == 6, fails.stderr
    assert json.loads(fails.stdout)["counts"] == {"must_say": {"passed": 0, "asked": 1}}

    spoiling = write(tmp_path / "spoiling.yaml", {"must_not_change": [FACT.text]})
    edit = ("edit", FACT.prompt, "-s", FACT.subject, "-t", NEW, "--method", "rome", *ledger,
            "--model", "atlas-gpt2")  # fmt: skip
    refused = run(*edit, "--check", spoiling, "--refuse")
    assert refused.exit_code == 3, refused.stdout
    assert "Accept it without --refuse." in " ".join(refused.stderr.split())
    made = run(*edit, "--check", file, "--refuse", "--json")
    assert made.exit_code == 0, made.stderr
    assert json.loads(made.stdout)["facts"]["passed"]

    xml = tmp_path / "facts.xml"
    held = run("check", file, *ledger, "--junit", xml, "--all")
    assert held.exit_code == 0, held.stdout
    assert "All facts hold." in held.stdout
    suite = ElementTree.parse(xml).getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("2", "0")
    assert run("check", file, *ledger, "--base", "--junit", xml).exit_code == 6
    assert ElementTree.parse(xml).getroot()[0].get("failures") == "1"

    recorded = run("check", file, *ledger, "--record", "--json")
    assert json.loads(recorded.stdout)["recorded"] == 1
    again = json.loads(run("check", file, *ledger, "--json").stdout)
    assert again["compared_with"].startswith("what was recorded of atlas-gpt2")


@pytest.mark.slow
def test_an_adapter_and_a_merged_checkpoint_are_checked_like_the_stack(tmp_path: Path) -> None:
    file = write(tmp_path / "facts.yaml", facts())
    with Editor("atlas-gpt2", ledger=tmp_path / "ledger") as editor:
        editor.edit(FACT, method="rome")
        editor.export(tmp_path / "adapter", format="peft")
        editor.merge(tmp_path / "merged")
    away = ("--ledger", tmp_path / "none")
    adapter = run("check", file, *away, "--adapter", tmp_path / "adapter", "--json")
    assert adapter.exit_code == 0, adapter.stdout + adapter.stderr
    assert json.loads(adapter.stdout)["counts"]["must_not_change"]["passed"] == 1
    assert run("check", file, *away, "--record").exit_code == 0  # of the base
    merged = run("check", file, *away, "--model", tmp_path / "merged", "--json")
    assert merged.exit_code == 0, merged.stdout + merged.stderr
    assert json.loads(merged.stdout)["counts"]["must_not_change"]["passed"] == 1
    with Editor("atlas-gpt2") as editor:
        from errata.check.adapters import with_adapter

        with with_adapter(editor, tmp_path / "adapter"):
            assert NEW in editor.generate(FACT.text)
        assert NEW not in editor.generate(FACT.text)
        assert editor.verify() == []


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("check", "{none}"), "no file of facts"),
        (("check", "{facts}", "--base", "--only", "3f2a"), "one of them"),
        (("check", "{facts}", "--record", "--base"), "--record asks the base"),
        (("check", "{facts}", "--junit", "{facts}"), "not written by errata"),
        (("edit", "A {} is", "-s", "b", "-t", "c", "--method", "rome", "--refuse"), "--check FILE"),
        (("edit", "A {} is", "-s", "b", "-t", "c", "--check", "The sky is"), "--ask PROMPT"),
        (("edit", "A {} is", "-s", "b", "-t", "c", "--check", "{facts}", "--no-apply"), "give one"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_loaded(
    args: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    file = write(tmp_path / "facts.yaml", facts())
    filled = [a.format(facts=file, none=tmp_path / "none.yaml") if a[0] == "{" else a for a in args]
    result = run(*filled, "--ledger", tmp_path / "ledger")
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())
    assert "Loading" not in result.stderr
    assert FactFile.read(file).model == "atlas-gpt2"  # it is as it was


# -- pytest ----------------------------------------------------------------------------------------


def test_pytest_asks_each_question_as_a_test(
    pytester: pytest.Pytester, pytestconfig: pytest.Config
) -> None:
    data = {
        "model": "atlas-gpt2",
        "must_say": [
            {"prompt": FACT.text, "answer": OLD}, {"prompt": NEIGHBOUR.text, "answer": "x"},
        ],
        "must_not_change": ["The harbour is"],
    }  # fmt: skip
    file = write(pytester.path / "facts.yaml", data)
    pytester.makepyfile("def test_of_the_users_own(): pass")
    known = pytestconfig.pluginmanager.has_plugin("errata")  # by its entry point
    plugin = () if known else ("-p", "errata.check.pytest_plugin")
    result = pytester.inline_run(*plugin, f"--errata={file}", str(pytester.path))
    passed, skipped, failed = result.listoutcomes()
    assert [len(passed), len(skipped), len(failed)] == [2, 1, 1]
    assert NEIGHBOUR.text in str(failed[0].longrepr)
    assert "Traceback" not in str(failed[0].longrepr)


def test_the_pytest_plugin_is_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, errata.check.pytest_plugin;"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
