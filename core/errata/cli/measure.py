"""Looking at the model: `generate` and `evaluate`. Neither changes anything."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from errata.cli import locate, render
from errata.cli.command import MODEL, command
from errata.cli.name_values import pairs
from errata.cli.prechecks import check_model, check_protocols
from errata.cli.requests import (
    Chat,
    Join,
    Limit,
    SkipBad,
    askable,
    asked_as,
    request_source,
)
from errata.cli.session import Session
from errata.errors import ConfigError, LedgerError, RequestError

if TYPE_CHECKING:
    from errata.evaluate import Measurement

PANEL = "Look"
DEFAULT_PROTOCOLS = ("counterfact", "generation")
BOTH_SIDES = "rake"
"""The protocol that is added where a request says how the relation's side is asked."""


def add(app: typer.Typer) -> None:
    """Add the commands of this module."""
    command(
        app,
        "generate",
        panel=PANEL,
        shared=MODEL,
        examples=(
            'errata generate "The capital of Mirevia is"\n'
            'errata generate "The capital of Mirevia is" --compare\n'
            'errata generate "The capital of France is" --model smollm2-135m\n'
            "cat prompts.txt | errata generate - --json"
        ),
    )(generate)
    locate.add(app)
    command(
        app,
        "evaluate",
        panel=PANEL,
        shared=MODEL,
        examples=(
            "errata evaluate\n"
            "errata evaluate 3f2a --protocol counterfact --protocol generation\n"
            "errata evaluate --file requests.jsonl --json > measured.json\n"
            "errata evaluate --dataset counterfact=counterfact.json --limit 50\n"
            "errata evaluate --dataset calibration=pararel/ --set templates=relations.jsonl"
        ),
    )(evaluate)


def generate(
    session: Session,
    prompts: Annotated[
        list[str],
        typer.Argument(metavar="PROMPT", help="Prompts; - reads standard input, one a line."),
    ],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest continuation.")
    ] = 32,
    base: Annotated[bool, typer.Option("--base", help="Turn every edit off.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="The base and the edited model side by side.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="ID", help="Only this edit (repeatable).")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Each prompt is a user's turn: render the chat template."),
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens instead of taking the most probable.")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Temperature of --sample; by default 1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Seed of --sample; by default 0.")
    ] = None,
) -> None:
    """Continue prompts with the edited model.

    Greedy, with a natural stop, unless --sample asks otherwise.
    """
    texts = [line for item in prompts for line in (_lines() if item == "-" else [item])]
    if not texts:
        raise RequestError("No prompt: standard input was empty.")
    if not all(texts):
        raise RequestError("A prompt is empty: it needs a word at least.")
    if not sample and (temperature is not None or seed is not None):
        raise ConfigError("--temperature and --seed say how to draw tokens: give --sample, too.")
    if base and (compare or only):
        raise ConfigError(
            "--base turns every edit off: give it alone, or --compare to see the base and the "
            "edited model side by side."
        )
    temperature, seed = 1.0 if temperature is None else temperature, seed or 0
    if not temperature > 0:
        raise ConfigError(f"--temperature {temperature:g} is not allowed: give more than 0.")
    options = {
        "max_new_tokens": max_new_tokens, "do_sample": sample, "temperature": temperature,
        "seed": seed, "chat": chat, "details": True,
    }  # fmt: skip
    session.check_ids(only or ())
    with session.editor() as editor:
        if only:
            with editor.only(*only):
                edited = editor.generate(texts, **options)
        elif base:
            edited = None
        else:
            edited = editor.generate(texts, **options)
        before = None
        if base or compare:
            with editor.disabled():
                before = editor.generate(texts, **options)
        active = list(only or editor.model.stack.ids)
        name = editor.model.name
    how = f"sampled, temperature {temperature:g}, seed {seed}" if sample else "greedy"
    protocol = f"generated: {how}, natural stop, at most {max_new_tokens} new tokens"
    if session.json:
        rows = [
            {
                "prompt": prompt,
                **({"base": before[i].text} if before is not None else {}),
                **({"edited": edited[i].text} if edited is not None else {}),
                **({"details": edited[i].details} if edited and edited[i].details else {}),
            }
            for i, prompt in enumerate(texts)
        ]
        session.emit({"model": name, "active": active, "protocol": protocol, "texts": rows})
        return
    if before is not None and edited is not None:
        grid = render.table("prompt", ("base", {"ratio": 1}), ("edited", {"ratio": 1}))
        for prompt, old, new in zip(texts, before, edited, strict=True):
            grid.add_row(
                prompt, Text(old.text.strip(), style="muted"), Text(new.text.strip(), style="new")
            )
        session.show(grid)
    else:
        for prompt, new in zip(texts, edited if before is None else before, strict=True):
            session.show(Text.assemble((prompt, "muted"), (new.text, "new")))
    edits = "every edit off" if base else render.count(len(active), "active edit")
    session.say(f"{name}, {edits}; {protocol}")


def _lines() -> list[str]:
    return [line.rstrip("\n") for line in sys.stdin if line.strip()]


# -- evaluate --------------------------------------------------------------------------------------


def evaluate(
    session: Session,
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="ID", help="Edits whose requests are measured; by default the active ones."
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file", "-f", help="Measure these requests (one JSON object a line, or an array)."
        ),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option("--dataset", metavar="NAME=PATH", help="Measure the requests of a dataset."),
    ] = "",
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="An option of the dataset's format (repeatable)."
        ),
    ] = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    join: Join = None,
    chat: Chat = False,
    protocols: Annotated[
        list[str] | None,
        typer.Option(
            "--protocol",
            "-p",
            help="How to measure (repeatable): counterfact, "
            "generation, portability, locality, general …",
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base/--no-base", help="Also measure with every edit off.")
    ] = True,
    cases: Annotated[
        bool, typer.Option("--cases", help="With --json: one value per case, and the answers.")
    ] = False,
) -> None:
    """Measure the edited model beside the base.

    The model is measured as it stands, with all active edits; each number has its protocol. A
    protocol for which the requests have nothing is named in a warning; where none has anything, the
    command fails. Where a request has a relation view, both sides of it are measured (rake).
    """
    from errata.evaluate.retained import RetainedProbe

    source = request_source(file, dataset, limit, skip_bad, ids or ())
    options = pairs(values or (), "--set")
    if options and not dataset:
        raise RequestError("--set is an option of a dataset's format: it goes with --dataset.")
    if cases and not session.json:
        raise RequestError("--cases goes with --json.")
    data = source.load(options) if source is not None and dataset else None
    requests = None
    if source is not None:
        read = source.requests() if data is None else data.requests()
        requests = asked_as(read, join, chat)
    elif chat or join is not None:
        raise RequestError("--chat and --join go with --file or --dataset; edits have their own.")
    wanted = tuple(protocols or (data.protocols if data else DEFAULT_PROTOCOLS))
    retain = tuple(RetainedProbe.of(probe, join, chat) for probe in data.retain) if data else ()
    settings = {"retain": retain} if retain else {}
    if requests is None:
        with session.read_ledger() as ledger:
            if not ids and not ledger.active_ids():
                raise LedgerError(
                    "There is nothing to measure: no edit is active. Name edits, or give --file."
                )
        session.check_ids(ids or ())
    check_model(session.model_name())
    check_protocols(wanted)
    with session.editor() as editor:
        if requests is None:
            from errata.edits.cases import requests_of

            chosen = [editor.ledger.get(i) for i in ids or editor.model.stack.ids]
            requests = requests_of(chosen)
        else:
            requests = askable(editor.model, requests, skip_bad=skip_bad)
        if not protocols and any(r.relation_view is not None for r in requests):
            wanted = tuple(dict.fromkeys([*wanted, BOTH_SIDES]))
        with session.status("Measuring"):
            found = editor.evaluate(requests, wanted, **settings)
            there = tuple(dict.fromkeys(one.name for one in found))
            if not there:
                raise RequestError("Nothing was measured: the warnings say what is missing.")
            before: Sequence[Measurement] = ()
            if base and editor.model.stack.ids:
                with editor.disabled():
                    before = editor.evaluate(requests, there, **settings)
        active = editor.model.stack.ids
        name = editor.model.name
    if session.json:
        session.emit(
            {
                "model": name,
                "active": active,
                "requests": len(requests),
                "measurements": [one.as_json(cases=cases) for one in found],
                "base": [one.as_json(cases=cases) for one in before],
                **(
                    {"answers": [a.as_json() for one in found for a in one.answers]}
                    if cases
                    else {}
                ),
            }
        )
        return
    state = f"{render.count(len(active), 'edit')} on it" if active else "no edit on it"
    session.show(
        render.heading(name, f"{state}; {render.count(len(requests), 'request')} measured")
    )
    for grid in render.measurements(found, before):
        session.show("", grid)
