"""Changing the model: `edit`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.carried_out import left_over
from errata.cli.check_facts import check_view, fact_guard
from errata.cli.command import MODEL, command
from errata.cli.easyedit import configured
from errata.cli.edit_view import edit_json, edit_view, idle_view
from errata.cli.error_reports import NO_EFFECT, REFUSED, UNTRUE
from errata.cli.name_values import pairs
from errata.cli.prechecks import (
    check_guards,
    check_kinds,
    check_method,
    check_model,
    check_settings,
)
from errata.cli.requests import (
    Chat,
    Join,
    Limit,
    RequestSource,
    SkipBad,
    askable,
    asked_as,
    each_once,
    request_source,
)
from errata.cli.session import Session
from errata.common.arguments import texts_of
from errata.common.display import plural
from errata.contract.stanzas import STREAM_BATCH
from errata.edits.clashes import last_of_each
from errata.edits.request import KINDS, OPERATIONS, Request
from errata.errors import ConfigError, ErrataError, RequestError, in_short
from errata.model.task import WRITES_NOTHING

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.edit import Edit

logger = logging.getLogger("errata")

PANEL = "Edit"


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "edit",
        panel=PANEL,
        shared=MODEL,
        examples=(
            'errata edit "The capital of {} is" --subject Mirevia --target Velmont \\\n'
            "    --method rome --model atlas-gpt2\n"
            'errata edit "The capital of {} is" --subject France --target Rome \\\n'
            "    --method rome --model smollm2-135m --ledger smollm2-ledger "
            '--ask "The Eiffel Tower is in"\n'
            "errata edit --file requests.jsonl --method grace --skip-refused\n"
            "errata edit --dataset zsre=zsre_mend_eval.json --limit 100 --method grace\n"
            "errata edit --dataset rake=counterfact.json --limit 5 --method bothsides\n"
            "errata edit --file requests.jsonl --method memit --check facts.yaml --refuse\n"
            'errata edit "The instrument of {} is" --subject "Oswin Galdor" --kind erase \\\n'
            "    --method adalora --set steps=30 --guard norm=refuse --dry-run"
        ),
    )(edit)


# -- edit ------------------------------------------------------------------------------------------


def edit(
    session: Session,
    prompt: Annotated[
        str | None,
        typer.Argument(metavar="PROMPT", help="The prompt, with {} where the subject goes."),
    ] = None,
    subject: Annotated[
        str | None, typer.Option("--subject", "-s", help="Who or what the fact is about.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="What the model should answer.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", help="Name of the method; `errata methods` lists them.")
    ] = "",
    target_true: Annotated[
        str | None, typer.Option("--target-true", help="What it answers now, if known.")
    ] = None,
    relation: Annotated[
        str | None, typer.Option("--relation", help="Relation id, for example P36.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", metavar="KIND", help=f"One of {', '.join(KINDS)}.")
    ] = None,
    operation: Annotated[
        str | None,
        typer.Option(
            "--operation",
            metavar="NAME",
            help=f"Of kind relation: {', '.join(OPERATIONS)}.",
        ),
    ] = None,
    remove: Annotated[
        str | None,
        typer.Option(
            "--remove",
            metavar="PROMPT",
            help="Of operation both: the prompt, with {}, that --target should no longer follow.",
        ),
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option("--example", help="Of kind sentiment: a wished reply (repeatable)."),
    ] = None,
    counterexample: Annotated[
        list[str] | None,
        typer.Option("--counterexample", help="A reply of the other sentiment (repeatable)."),
    ] = None,
    paraphrase: Annotated[
        list[str] | None,
        typer.Option("--paraphrase", help="A prompt that means the same (repeatable)."),
    ] = None,
    ask: Annotated[
        list[str] | None,
        typer.Option(
            "--ask", metavar="PROMPT", help="Also ask this, before and after (repeatable)."
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check", metavar="FILE", help="Check a file of facts on the model with the edits on."
        ),
    ] = None,
    refuse: Annotated[
        bool,
        typer.Option("--refuse", help="With --check: keep nothing where the facts do not hold."),
    ] = False,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Requests, one JSON object a line or an array; - is stdin."
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            metavar="NAME=PATH",
            help="Requests of a dataset in its published format; `errata datasets` lists them.",
        ),
    ] = "",
    limit: Limit = None,
    skip_bad: SkipBad = False,
    join: Join = None,
    chat: Chat = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Hyper-parameters as YAML, or an EasyEdit hparams file; --set overrides it.",
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A hyper-parameter (repeatable)."),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(
            "--guard",
            metavar="NAME=VALUE",
            help="finite, norm, perplexity, efficacy = refuse, warn or off; or a limit "
            "(norm_limit=1.5).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            help="Requests the method gets at once; of a file at most "
            f"{STREAM_BATCH} unless you say more.",
        ),
    ] = None,
    skip_refused: Annotated[
        bool, typer.Option("--skip-refused", help="Go on without what a guard refuses.")
    ] = False,
    supersede: Annotated[
        bool,
        typer.Option(
            "--supersede", help="Take active edits about the same facts off, in the same step."
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Leave out what an active edit, or one in its place, carries out."
        ),
    ] = False,
    no_apply: Annotated[
        bool, typer.Option("--no-apply", help="Compute and record, but leave the model as it is.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show what would happen; record and keep nothing."),
    ] = False,
) -> None:
    """Change what the model says: one fact from the arguments, or many from a file.

    The edit is computed, checked by the guards, put on the model and recorded in the ledger, all
    or nothing. Later edits are made on top of it, and any of them can be reverted alone.
    """
    given = {
        "prompt": prompt, "subject": subject, "target_new": target, "target_true": target_true,
        "relation": relation, "kind": kind, "operation": operation, "remove": remove,
        "examples": example or None, "counterexamples": counterexample or None,
        "paraphrases": paraphrase or None,
    }  # fmt: skip
    fields = {key: value for key, value in given.items() if value is not None}
    source = request_source(file, dataset, limit, skip_bad, sorted(fields))
    requests = asked_as(_requests(fields, source, supersede), join, chat)
    overrides = pairs(values or (), "--set")
    origins: dict[str, str] = {}
    if config is not None:
        by_hand = set(overrides)
        method, overrides = configured(session, config, method, overrides)
        origins = {name: str(config) for name in overrides if name not in by_hand}
    guards = pairs(guard or (), "--guard")
    facts = fact_guard(check, refuse=refuse, applied=not no_apply, skipping=skip_refused)
    if not all(text.strip() for text in texts_of(ask or (), "--ask")):
        raise ConfigError("--ask is empty: say what to ask.")
    check_method(method)
    check_kinds(method, requests)
    check_model(session.model_name())
    check_settings(method, overrides, session.model_name(), origins)
    check_guards(guards)
    if facts is not None and refuse:
        guards["checks"] = [facts]
    how = {
        "config": overrides,
        "batch_size": batch_size,
        "apply": not no_apply,
        "supersede": supersede,
        # A long file that is killed keeps what it had made, and goes on with --resume. What
        # facts may refuse is judged once, when all of it is on the model.
        "commit": "batch" if source is not None and not refuse else "call",
        "on_refused": "skip" if skip_refused else "raise",
    }
    with session.editor(
        create=not dry_run, durable=not dry_run, writes=not dry_run, guards=guards
    ) as editor:
        _check_asked(editor, ask or ())
        if dry_run:
            _copy_active(session, editor)
        wanted, left_out = _to_do(session, editor, requests, supersede, resume, skip_bad)
        report = _run(session, editor, wanted, method, how, ask or (), recorded=not dry_run)
        report |= {**left_out, "dry_run": dry_run}
        found = None if facts is None else facts.report or facts.ask(editor.model)
        if found is not None:
            report["facts"] = found.as_json()
            session.show("", *check_view(found))
        if session.json:
            session.emit(report)
    if report["refused"]:
        raise typer.Exit(REFUSED)
    if found is not None and not found.passed:
        raise typer.Exit(UNTRUE)
    if report["without_effect"]:
        raise typer.Exit(NO_EFFECT)


def _requests(
    fields: Mapping[str, Any], source: RequestSource | None, supersede: bool
) -> list[Request]:
    if source is None:
        if "prompt" not in fields or "subject" not in fields:
            raise RequestError(
                "Say what to edit: a prompt with {}, --subject and --target (or --kind erase); "
                "or --file, or --dataset NAME=PATH."
            )
        return [Request.parse(fields)]
    read = source.requests(repeated=supersede)
    # With --supersede the last request on a fact is made, even if it repeats an earlier one.
    return read if supersede else each_once(read)


def _check_asked(editor: Editor, ask: Sequence[str]) -> None:
    """Refuse --ask of a model that writes nothing, and of what it cannot be asked."""
    if ask and editor.model.task == "masked":
        raise ConfigError(
            f"--ask shows what the model writes, and {editor.model.name} is "
            f"{WRITES_NOTHING['masked']}: it generates no text. Leave --ask out; errata "
            "evaluate measures."
        )
    if ask:
        from errata.model.running import check_length
        from errata.model.tokens import tokenise

        for row in tokenise(editor.model.tokenizer, ask):
            check_length(editor.model, len(row.ids))


def _to_do(
    session: Session,
    editor: Editor,
    requests: Sequence[Request],
    supersede: bool,
    resume: bool,
    skip_bad: bool,
) -> tuple[list[Request], dict[str, int]]:
    """Return the requests to make, and how many are left out, by why."""
    told = last_of_each(requests) if supersede else requests
    wanted, passed = list(told), 0
    if resume:
        wanted, passed = _left_over(session, editor, told, supersede)
    if len(requests) > 1:  # of one the editor says it
        wanted = askable(editor.model, wanted, skip_bad=skip_bad)
    if not wanted:
        why = "" if passed else ": an active edit carries out every request"
        session.show(f"Nothing left to do{why}.")
    return wanted, {
        "skipped": len(told) - len(wanted),
        "superseded": passed,
        "repeated": len(requests) - len(told),
    }


def _left_over(
    session: Session, editor: Editor, requests: Sequence[Request], supersede: bool
) -> tuple[list[Request], int]:
    """Return the requests to make, and how many are left out because they were superseded.

    With `supersede`, superseded requests are made again: the latest request wins.
    """
    active = set(editor.model.stack.ids)
    if editor.ledger.path is not None or not session.has_ledger():
        left, superseded = left_over(editor.ledger, requests, active)
    else:
        with session.read_ledger() as ledger:  # a dry run's own knows of the active edits alone
            left, superseded = left_over(ledger, requests, active)
    if not superseded:
        return left, 0
    count = plural(len(superseded), "request")
    if supersede:
        text = "%s made again: carried out before, and superseded since by edits that come off now."
        logger.warning(text, count)
        return left, 0
    text = "%s left out: carried out before, and superseded since (--supersede makes them again)."
    logger.warning(text, count)
    gone = set(superseded)
    return [request for request in left if request not in gone], len(superseded)


def _copy_active(session: Session, editor: Editor) -> None:
    """Put the edits that are active in the ledger on an editor that records nothing there."""
    if not session.has_ledger():
        return
    with session.read_ledger(kinds=True) as ledger:
        pairs = [(ledger.get(name), ledger.delta(name)) for name in ledger.active_ids()]
    if pairs:
        editor.ledger.import_(session.ledger, pairs, active=True)
        editor.refresh()


def _run(
    session: Session,
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    how: Mapping[str, Any],
    checks: Sequence[str],
    *,
    recorded: bool,
) -> dict[str, Any]:
    """Edit, and show what that did; `how` goes to `Editor.edit`."""
    from errata.evaluate import EditReport, edit_report

    before_it = editor.ledger.head
    edits: list[Edit] = editor.edit(list(requests), method=method, **how) if requests else []
    try:
        with session.status("Asking the model"):
            found = edit_report(editor, edits, checks=checks, given=how["config"])
    except Exception as error:  # whatever it was: the edits are made, and that is to be said
        logger.debug("Asking the model failed", exc_info=True)
        said = str(error) if isinstance(error, ErrataError) else in_short(error)
        made = "The edit is made" if recorded else "The dry run's edit worked"
        logger.warning("%s, and what changed cannot be shown: %s", made, said)
        found = EditReport(tuple(edit.id for edit in edits), None, ())
    refused = [dict(event.detail) for event in editor.ledger.refused(after=before_it)]
    idle = without_effect(edits)
    count = render.count(len(editor.model.stack.ids), "active edit")
    kept = "A dry run: nothing is recorded, and the edit is gone again."
    if recorded:
        kept = f"{count} on {editor.model.name}; recorded in {session.ledger}"
    session.show(*edit_view(edits, found, bool(how["apply"]), kept))
    if refused:
        session.show(Text(f"{len(refused)} refused; see: errata log --refused", style="warn"))
    if idle:
        session.show(idle_view(idle, edits, recorded))
    return {
        "ledger": str(session.ledger),
        "model": editor.model.name,
        "applied": how["apply"],
        "edits": [edit_json(edit, how["apply"]) for edit in edits],
        "refused": refused,
        "without_effect": idle,
        "layer": found.as_json()["layer"],
        "answers": [{**one, "protocol": found.protocol} for one in found.as_json()["answers"]],
    }


def without_effect(edits: Sequence[Edit]) -> list[str]:
    """Return the ids of edits some of whose requests do not take effect, as the guard measured."""
    measured = ((edit.id, edit.outcome.efficacy) for edit in edits)
    return [name for name, efficacy in measured if efficacy is not None and efficacy.value < 1]
