"""Files of requests that are edited in one go: repeated facts, going on, what a kill leaves."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.errors import EditRefused, RequestError
from tests.families import build, saved

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
OFF = tuple(word for name in QUIET for word in ("--guard", f"{name}=off"))
Run = Callable[..., Any]


def lives(subject: str, place: str) -> Request:
    return Request(prompt="{} lives in", subject=subject, target_new=place, relation="P551")


def write(path: Path, *facts: tuple[str, str]) -> Path:
    asked = [lives(*fact).model_dump(mode="json", exclude_none=True) for fact in facts]
    path.write_text("".join(json.dumps(one) + "\n" for one in asked), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(saved("gpt2", tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture
def run(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command on the ledger of an empty folder and return its JSON."""
    monkeypatch.chdir(tmp_path)
    for name in ("ERRATA_LEDGER", "ERRATA_MODEL", "ERRATA_DEBUG", "ERRATA_DISABLE"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: Any, code: int = 0) -> Any:
        more = ("--model", checkpoint, *OFF) if words[0] == "edit" else ()
        result = CliRunner().invoke(app, [str(word) for word in (*words, *more, "--json")])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        return json.loads(result.stdout) if result.stdout else None

    return call


@pytest.fixture
def active(run: Run) -> Callable[[], list[str]]:
    """Return what the active edits say, in ledger order."""

    def call() -> list[str]:
        edits = run("log", "--active")["edits"]
        return [r["target_new"] for edit in edits for r in edit["requests"]]

    return call


def open_editor(**options: Any) -> Editor:
    module, tokenizer = build("gpt2")
    return Editor(module, tokenizer, **{"guards": QUIET, **options})


# -- a fact that the file says twice ---------------------------------------------------------------


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-key-value"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_last_of_several_answers_is_made_whatever_the_batches(
    method: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [lives("Ada", "Rome"), lives("Alan", "Lima"), lives("Ada", "Oslo")]
    for commit in ("call", "batch"):
        with open_editor() as editor, caplog.at_level(logging.WARNING, "errata"):
            options = {"method": method, "batch_size": size, "commit": commit}
            made = editor.edit(asked, supersede=True, **options)
            assert [e.requests[0].target_new for e in made] == ["Lima", "Oslo"]
            assert editor.model.stack.ids == [e.id for e in made]
            assert not any(e.outcome.conflicts for e in made)
        assert "1 request left out" in caplog.text
        caplog.clear()


def test_without_supersede_every_request_is_made() -> None:
    asked = [lives("Ada", "Rome"), lives("Ada", "Oslo")]
    with open_editor() as editor:
        assert len(editor.edit(asked, method="toy-low-rank")) == 2


def test_going_on_does_not_bring_a_superseded_answer_back(
    run: Run, active: Callable[[], list[str]], tmp_path: Path
) -> None:
    file = write(tmp_path / "r.jsonl", ("Ada", "Rome"), ("Alan", "Lima"), ("Ada", "Oslo"))
    command = ("edit", "--file", file, "--method", "toy-low-rank", "--supersede")
    assert run(*command)["repeated"] == 1
    assert active() == ["Lima", "Oslo"]
    for _ in range(2):
        report = run(*command, "--resume")
        assert (report["edits"], report["skipped"], report["repeated"]) == ([], 2, 1)
        assert active() == ["Lima", "Oslo"]


def test_a_fact_that_returns_to_an_earlier_answer_has_its_last_one(
    run: Run, active: Callable[[], list[str]], tmp_path: Path
) -> None:
    file = write(tmp_path / "r.jsonl", ("Ada", "Rome"), ("Ada", "Oslo"), ("Ada", "Rome"))
    how = ("--method", "toy-low-rank", "--supersede")
    for source in (
        ("--file", file),
        ("--file", file, "--skip-bad"),
        ("--dataset", f"jsonl={file}"),
    ):
        run("edit", "--file", write(tmp_path / "other.jsonl", ("Ada", "Lima")), *how)
        assert run("edit", *source, *how)["repeated"] == 2
        assert active() == ["Rome"]
    asked = [lives("Ada", "Rome"), lives("Ada", "Oslo"), lives("Ada", "Rome")]
    with open_editor() as editor:
        (made,) = editor.edit(asked, method="toy-low-rank", supersede=True)
        assert made.requests[0].target_new == "Rome"
        with pytest.raises(RequestError, match="Requests 0 and 2 are the same"):
            editor.edit(asked, method="toy-low-rank")


def test_the_file_given_last_holds_also_where_it_was_given_before(
    run: Run, active: Callable[[], list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rome = write(tmp_path / "rome.jsonl", ("Ada", "Rome"), ("Alan", "Lima"))
    oslo = write(tmp_path / "oslo.jsonl", ("Ada", "Oslo"))
    how = ("--method", "toy-low-rank", "--supersede", "--resume")
    for file, answers in ((rome, ["Rome", "Lima"]), (oslo, ["Lima", "Oslo"])) * 2:
        run("edit", "--file", file, *how)
        assert sorted(active()) == sorted(answers)
        assert run("edit", "--file", file, *how)["edits"] == [], "it is so already"
    assert "1 request made again: carried out before, and superseded since" in caplog.text


def test_without_supersede_what_was_superseded_is_left_out_and_said_so(
    checkpoint: Path, run: Run, active: Callable[[], list[str]], tmp_path: Path
) -> None:
    rome, oslo = (write(tmp_path / f"{n}.jsonl", ("Ada", n)) for n in ("Rome", "Oslo"))
    run("edit", "--file", rome, "--method", "toy-low-rank")
    run("edit", "--file", oslo, "--method", "toy-low-rank", "--supersede")
    command = ["edit", "--file", str(rome), "--method", "toy-low-rank", "--resume"]
    report = run(*command)
    assert (report["edits"], report["skipped"], report["superseded"]) == ([], 1, 1)
    shown = CliRunner().invoke(app, [*command, "--model", str(checkpoint), *OFF])
    assert "an active edit carries out every request" not in shown.stdout
    assert "1 request left out: carried out before" in " ".join(shown.stderr.split())
    assert active() == ["Oslo"]


def test_what_took_an_edits_place_counts_and_a_reverted_one_does_not(
    run: Run, active: Callable[[], list[str]], tmp_path: Path
) -> None:
    how = ("--method", "toy-low-rank")
    old = write(tmp_path / "old.jsonl", ("Bo", "Bari"), ("Ada", "Rome"), ("Alan", "Lima"))
    new = write(tmp_path / "new.jsonl", ("Ada", "Oslo"))
    first, second, _ = (e["id"] for e in run("edit", "--file", old, *how)["edits"])
    (newer,) = run("edit", "--file", new, *how, "--supersede")["edits"]
    run("revert", first)
    run("rebase")  # all others were made on top of it
    assert active() == ["Lima", "Oslo"]
    assert not {second, newer["id"]} & {e["id"] for e in run("log", "--active")["edits"]}

    tried = run("edit", "--file", old, *how, "--resume", "--dry-run")
    assert [e["requests"][0]["target_new"] for e in tried["edits"]] == ["Bari"]
    report = run("edit", "--file", old, *how, "--resume")
    assert [e["requests"][0]["target_new"] for e in report["edits"]] == ["Bari"]
    assert report["skipped"] == 2

    last = [e["id"] for e in run("log", "--active")["edits"] if "Oslo" in str(e["requests"])]
    run("revert", *last)  # nothing stands for Ada's fact any more
    assert run("edit", "--file", old, *how, "--resume")["skipped"] == 2
    assert sorted(active()) == ["Bari", "Lima", "Rome"]


def test_an_edit_restored_and_reverted_is_left_over_although_it_was_superseded(
    run: Run, active: Callable[[], list[str]], tmp_path: Path
) -> None:
    how = ("--method", "toy-low-rank")
    old, new = (write(tmp_path / f"{n}.jsonl", ("Ada", n)) for n in ("Rome", "Oslo"))
    (first,) = run("edit", "--file", old, *how)["edits"]
    (second,) = run("edit", "--file", new, *how, "--supersede")["edits"]
    run("apply", first["id"])
    run("revert", first["id"])
    assert active() == ["Oslo"]
    assert second["outcome"]["supersedes"] == [first["id"]]
    assert run("edit", "--file", old, *how, "--resume")["skipped"] == 0


# -- batches of a stream ---------------------------------------------------------------------------

PEOPLE = ("Ada", "Alan", "Bo", "Grace", "Kurt")


def test_a_method_that_takes_all_at_once_gets_a_stream_in_bounded_batches(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("errata.contract.methods.STREAM_BATCH", 2)
    asked = [lives(name, "Rome") for name in PEOPLE]

    def sizes(**options: Any) -> list[int]:
        with open_editor() as editor:
            return [len(edit.requests) for edit in editor.edit(asked, **options)]

    with caplog.at_level(logging.WARNING, "errata"):
        assert sizes(method="toy-dense", commit="batch") == [2, 2, 1]
    assert "toy-dense gets 5 requests in batches of 2" in caplog.text
    assert "batch_size=5 gives it all at once" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "errata"):
        assert sizes(method="toy-dense") == [5], "a call that is one transaction is one batch"
        assert sizes(method="toy-dense", commit="batch", batch_size=5) == [5]
        assert sizes(method="toy-low-rank", commit="batch") == [1] * 5
    assert "in batches of" not in caplog.text


def test_a_file_that_is_killed_in_its_second_batch_keeps_the_first(
    run: Run, active: Callable[[], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("errata.contract.methods.STREAM_BATCH", 2)
    from errata_toys import ToyDense

    whole, calls = ToyDense.edit, []

    @functools.wraps(whole)
    def killed(self: Any, model: Any, requests: Any, config: Any) -> Any:
        calls.append(len(requests))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, model, requests, config)

    monkeypatch.setattr(ToyDense, "edit", killed)
    file = write(tmp_path / "many.jsonl", *((name, f"in {name}") for name in PEOPLE))
    command = ("edit", "--file", file, "--method", "toy-dense")
    run(*command, code=130)
    assert active() == ["in Ada", "in Alan"]
    report = run(*command, "--resume")
    assert (report["skipped"], [len(e["requests"]) for e in report["edits"]]) == (2, [2, 1])
    assert active() == [f"in {name}" for name in PEOPLE]


def no_bo(model: Any, edits: Any) -> list[str]:
    """Refuse, as a guard, what has a request about Bo in it."""
    if any(request.subject == "Bo" for edit in edits for request in edit.requests):
        raise EditRefused("Bo stays as he is", {})
    return []


def test_a_refused_request_does_not_take_its_batch_along() -> None:
    asked = [lives(name, "Rome") for name in PEOPLE]
    with open_editor(guards={**QUIET, "checks": [no_bo]}) as editor:
        made = editor.edit(asked, method="toy-low-rank", batch_size=5, on_refused="skip")
        assert [e.requests[0].subject for e in made] == ["Ada", "Alan", "Grace", "Kurt"]
        assert editor.model.stack.ids == [e.id for e in made]
        (refused,) = editor.ledger.refused()
        assert [r["subject"] for r in refused.detail["requests"]] == ["Bo"]
        assert editor.verify() == []


def test_a_batch_that_is_one_edit_is_refused_whole() -> None:
    asked = [lives(name, "Rome") for name in PEOPLE]
    with open_editor(guards={**QUIET, "checks": [no_bo]}) as editor:
        made = editor.edit(asked, method="toy-dense", batch_size=3, on_refused="skip")
        assert [[r.subject for r in e.requests] for e in made] == [["Grace", "Kurt"]]
        (refused,) = editor.ledger.refused()
        assert len(refused.detail["requests"]) == 3


def test_what_supersedes_an_edit_of_several_requests_is_refused_whole() -> None:
    with open_editor(guards={**QUIET, "checks": [no_bo]}) as editor:
        old = editor.edit([lives("Ada", "Rome"), lives("Kurt", "Rome")], method="toy-dense")
        asked = [lives(name, "Oslo") for name in ("Ada", "Bo", "Kurt")]
        options = {"method": "toy-low-rank", "batch_size": 3, "on_refused": "skip"}
        assert editor.edit(asked, supersede=True, **options) == []
        assert editor.model.stack.ids == [old[0].id]
        assert len(editor.edit(asked[::2], supersede=True, **options)) == 2
