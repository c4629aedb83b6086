"""Facts as tests: `check`, and what `edit --check` shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.check.fact_file import FactFile
from errata.check.result import JUNIT_START, CheckReport, FactResult
from errata.cli import render
from errata.cli.command import MODEL, command
from errata.cli.error_reports import UNTRUE
from errata.cli.prechecks import check_model
from errata.cli.session import Session
from errata.edits.outputs import OwnSign, check_file, write_file
from errata.errors import ConfigError

if TYPE_CHECKING:
    from errata.check.base_answers import RecordedAnswers
    from errata.check.guard import FactGuard
    from errata.editor import Editor

PANEL = "Measure"
JUNIT = OwnSign(b"<?xml", JUNIT_START.splitlines()[1].encode())
MANY = 20
"""Failures that are listed, at most."""


def add(app: typer.Typer) -> None:
    """Add the command."""
    command(
        app,
        "check",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata check facts.yaml\n"
            "errata check facts.yaml --only 3f2a --all\n"
            "errata check facts.yaml --model smollm2-135m --record\n"
            "errata check facts.yaml --model edited/ --junit facts.xml\n"
            "errata check facts.yaml --adapter adapter/ --json"
        ),
    )(check)


def check(
    session: Session,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of facts (YAML).")],
    base: Annotated[bool, typer.Option("--base", help="Turn every edit off.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ID", help="Only this edit (repeatable).")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", metavar="FOLDER", help="A PEFT adapter on the model, no edit."),
    ] = None,
    record: Annotated[
        bool,
        typer.Option("--record", help="Freeze what the base answers as what must not change."),
    ] = False,
    answers: Annotated[
        Path | None,
        typer.Option(
            "--answers",
            metavar="FILE",
            help="The recorded answers; by default beside the facts, where there are any.",
        ),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, too.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every question, not only what fails.")
    ] = False,
) -> None:
    """Check what a model must say, must not change and must not say.

    The model is asked as it stands, with all active edits. Exit code 6 where a fact does not hold.
    """
    if sum((base, bool(only), adapter is not None)) > 1:
        raise ConfigError(
            "Give --base, --only or --adapter: one of them says what is on the model."
        )
    facts = FactFile.read(file)
    if session.model is None and not session.has_ledger():
        session.model = facts.model
    if junit is not None:
        check_file(junit, JUNIT)
    session.check_ids(only or ())
    check_model(session.model_name())
    if record:
        if base or only or adapter is not None or junit is not None:
            raise ConfigError(
                "--record asks the base: leave --base, --only, --adapter, --junit out."
            )
        _record(session, facts, file, answers)
        return
    recorded = recorded_for(file, answers)
    from errata.check.asking import check_facts

    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"There is no folder {str(adapter)!r}: --adapter names a PEFT adapter's.")
    with session.editor() as editor, _state(editor, base, only or (), adapter):
        with session.status("Asking the model"):
            changed = True if adapter is not None else None
            found = check_facts(editor, facts, recorded, source=str(file), changed=changed)
    if junit is not None:
        write_file(junit, found.junit(), JUNIT)
    if session.json:
        session.emit(found.as_json())
    else:
        session.show(*check_view(found, everything))
    if not found.passed:
        raise typer.Exit(UNTRUE)


def _state(editor: Editor, base: bool, only: Any, adapter: Path | None) -> Any:
    from errata.check.adapters import with_adapter

    if adapter is not None:
        return with_adapter(editor, adapter)
    return editor.only(*only) if only else editor.disabled() if base else nullcontext()


def _record(session: Session, facts: FactFile, file: Path, answers: Path | None) -> None:
    from errata.check.base_answers import RECORDED, RecordedAnswers, recorded_place

    place = answers or recorded_place(file)
    check_file(place, RECORDED)
    tests = [test for test in facts.tests() if test.of_base]
    if not tests:
        raise ConfigError(f"{file} has nothing that must not change: there is nothing to record.")
    with session.editor() as editor, session.status("Asking the base"):
        found = RecordedAnswers.ask(editor.model, tests)
    found.save(place)
    if session.json:
        session.emit({"path": str(place), "model": found.model, "recorded": len(found.answers)})
        return
    count = render.count(len(found.answers), "answer")
    session.show(Text.assemble((str(place), "head"), f"  {count} of {found.model}, no edit on it"))


def recorded_for(file: Path, answers: Path | None = None) -> RecordedAnswers | None:
    """Return the recorded answers that go with a file of facts; None where there are none."""
    from errata.check.base_answers import RecordedAnswers, recorded_place

    place = answers or recorded_place(file)
    return RecordedAnswers.load(place) if answers is not None or place.is_file() else None


def fact_guard(
    file: Path | None, *, refuse: bool, applied: bool, skipping: bool
) -> FactGuard | None:
    """Return the guard that `edit --check` asks for; None where it does not."""
    if file is None:
        if refuse:
            raise ConfigError("--refuse goes with --check FILE: the facts that must hold.")
        return None
    if not applied:
        raise ConfigError("--check asks the edited model, --no-apply does not edit it: give one.")
    if refuse and skipping:
        raise ConfigError(
            "--refuse judges all edits of the call together, --skip-refused each by itself: "
            "give one."
        )
    if not file.is_file():
        raise ConfigError(
            f"--check: there is no file of facts {str(file)!r}. To ask a prompt: --ask PROMPT."
        )
    facts = FactFile.read(file)
    from errata.check.guard import FactGuard

    return FactGuard(facts, recorded_for(file), refuse=refuse, source=str(file))


def check_view(found: CheckReport, everything: bool = False) -> Iterator[Any]:
    """Yield what people see of a check: counts by section, what failed, how it was asked."""
    on = render.count(len(found.active), "active edit") if found.active else "no edit on it"
    yield render.heading(found.source, f"{found.model}, {on}")
    rows = []
    for section, good, asked in found.counts():
        style = "good" if good == asked else "bad"
        rows.append((section.replace("_", " "), Text(f"{good} of {asked}", style=style)))
    yield render.facts(rows)
    shown = found.results if everything else found.failed
    if shown:
        yield ""
        yield _table(shown if everything else shown[:MANY])
        if not everything and len(shown) > MANY:
            yield f"… and {len(shown) - MANY} more: --all"
    if found.skipped:
        count = render.count(len(found.skipped), "question")
        yield Text(
            f"{count} not asked: nothing to compare with. Put an edit on, or record the base "
            "(errata check FILE --record).", style="warn",
        )  # fmt: skip
    yield Text(f"{found.protocol}; what must not change is compared with {found.compared_with}"
               if any(one.base is not None for one in found.results) else found.protocol,
               style="muted")  # fmt: skip
    yield (
        Text("All facts hold.", style="good")
        if found.passed
        else Text(
            f"{len(found.failed)} of {len(found.results) - len(found.skipped)} fail.", style="bad"
        )
    )


def _table(results: Any) -> Any:
    grid = render.table(("", {"no_wrap": True}), ("", {"no_wrap": True}), "prompt", "what is wrong")
    for one in results:
        grid.add_row(_mark(one), Text(one.test.title, style="muted"), one.test.prompt, one.why)
    return grid


def _mark(one: FactResult) -> Text:
    mark, style = {
        "passed": ("ok", "good"), "failed": ("FAIL", "bad"), "skipped": ("–", "muted")
    }[one.status]  # fmt: skip
    return Text(mark, style=style)
