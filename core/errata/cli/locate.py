"""`errata locate`: one prompt or phrasings of it, an average, a layer sweep, or similarity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli.command import MODEL, command
from errata.cli.locate_many import average_effects, sweep_layers
from errata.cli.locate_prompt import locate_prompts
from errata.cli.locate_similar import NEEDED
from errata.cli.locate_similar import similar as similarity
from errata.cli.name_values import pairs
from errata.cli.pictures import check_plot
from errata.cli.requests import SkipBad, request_source
from errata.cli.session import Session
from errata.errors import ConfigError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from errata.edits.request import Request

PANEL = "Look"
ONE, AVERAGE, SWEEP, SIMILAR = "one prompt", "--average", "--sweep", "--similar"
MANY = (AVERAGE, SWEEP, SIMILAR)
GO_WITH = {
    "--subject": (ONE,),
    "--target": (ONE,),
    "--by": (ONE, SIMILAR),
    "--method": (ONE, SWEEP),
    "--corrupt": (ONE, AVERAGE, SIMILAR),
    "--relation": (ONE, AVERAGE, SIMILAR),
    "--window": (ONE, AVERAGE, SIMILAR),
    "--severed": (AVERAGE,),
    "--screen": (AVERAGE,),
    "--held-out": (SWEEP,),
    **dict.fromkeys(("--dataset", "--data", "--file", "--limit", "--skip-bad"), MANY),
}
"""Option → what it says something about; --set and --plot go with everything."""


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "locate",
        panel=PANEL,
        shared=MODEL,
        examples=(
            'errata locate "The capital of {} is" --subject Mirevia --target Eldham\n'
            'errata locate "The capital of {} is" -s Mirevia --corrupt relation --plot trace.png\n'
            'errata locate "The capital of {} is" "{} has the capital" -s Mirevia --by gradient\n'
            'errata locate "The capital of {} is" -s France --by logit-lens --model smollm2-135m\n'
            "errata locate --average --dataset atlas --limit 200 --severed --plot figure.png\n"
            "errata locate --sweep --method rome --dataset atlas --limit 120 --held-out 40\n"
            "errata locate --similar paraphrases --by neurons --dataset atlas --limit 40"
        ),
    )(locate)


def locate(
    session: Session,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT", help="With {} for the subject; several: phrasings, side by side."
        ),
    ] = None,
    subject: Annotated[str, typer.Option("--subject", "-s", help="Who or what it is about.")] = "",
    target: Annotated[str, typer.Option("--target", "-t", help="The answer to look for.")] = "",
    by: Annotated[
        str,
        typer.Option(
            "--by", help="How: trace, attribution, gradient, logit-lens, norm or neurons."
        ),
    ] = "",
    method: Annotated[
        str,
        typer.Option("--method", help="A method with a locator of its own, or to be swept."),
    ] = "",
    corrupt: Annotated[
        str,
        typer.Option("--corrupt", help="What is corrupted: subject, relation, or tokens (3,4)."),
    ] = "",
    relation: Annotated[
        str, typer.Option("--relation", help="Text of the prompt that is its relation.")
    ] = "",
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the locator (repeatable)."),
    ] = None,
    average: Annotated[
        bool, typer.Option("--average", help="Average indirect effects over a dataset.")
    ] = False,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Edit at every layer, compare, suggest a preset.")
    ] = False,
    similar: Annotated[
        str,
        typer.Option("--similar", help=f"Relative similarity over sets: {', '.join(NEEDED)}."),
    ] = "",
    dataset: Annotated[
        str, typer.Option("--dataset", help="Requests of --average, --sweep and --similar.")
    ] = "",
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PATH", help="File or folder of --dataset.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Requests, one JSON object a line, instead."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="Only the first N requests.")
    ] = None,
    skip_bad: SkipBad = False,
    held_out: Annotated[
        int | None,
        typer.Option(
            "--held-out",
            metavar="N",
            min=1,
            help="With --sweep: judge the choice by the last N requests, about other subjects.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", min=1, help="Layers restored together; 10 unless you say more."),
    ] = None,
    severed: Annotated[
        bool, typer.Option("--severed", help="With --average: also MLPs and attention severed.")
    ] = False,
    screen: Annotated[
        bool, typer.Option("--screen", help="With --average: estimate by attribution patching.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: a .png or .svg file.")
    ] = None,
) -> None:
    """Say where the model keeps an answer.

    By causal tracing, unless --by or a --method with a locator of its own says otherwise. With
    --average, --sweep or --similar: over many requests.
    """
    modes = [name for name, on in zip(MANY, (average, sweep, similar), strict=True) if on]
    if len(modes) > 1:
        raise ConfigError(f"{' and '.join(modes)} are different things: give one of them.")
    if modes and prompts:
        raise RequestError(
            f"{modes[0]} takes its prompts from --dataset or --file, not {prompts[0]!r}."
        )
    given = {
        "--subject": subject, "--target": target, "--by": by, "--method": method,
        "--corrupt": corrupt, "--relation": relation, "--window": window, "--severed": severed,
        "--screen": screen, "--held-out": held_out, "--dataset": dataset, "--data": data,
        "--file": file, "--limit": limit, "--skip-bad": skip_bad,
    }  # fmt: skip
    mode = modes[0] if modes else ONE
    _check_they_go_with(mode, [name for name, on in given.items() if on])
    settings = _settings(values or (), relation, window, corrupt, method)
    if plot is not None:
        check_plot(plot)
    if mode == ONE:
        locate_prompts(session, prompts or (), subject, target, by, method, settings, plot)
        return
    requests = _requests(file, dataset, data, limit, skip_bad)
    if mode == AVERAGE:
        average_effects(session, requests, severed, screen, settings, plot)
    elif mode == SWEEP:
        sweep_layers(session, requests, held_out, method, settings, plot)
    else:
        similarity(session, requests, similar, by or "trace", settings, plot)


def _settings(
    values: Sequence[str], relation: str, window: int | None, corrupt: str, method: str
) -> dict[str, Any]:
    """Return the locator's settings: those of --set, and those that have an option of their own."""
    settings = pairs(values, "--set")
    for name, value in (("relation", relation), ("window", window)):
        if value:
            settings[name] = value
    if corrupt:
        settings["corrupt"] = _corrupt(corrupt)
    if "relation" in settings and settings.get("corrupt") != "relation" and not method:
        raise ConfigError(
            "--relation says which text is the relation that is corrupted: give --corrupt "
            "relation, too."
        )
    return settings


def _requests(
    file: Path | None, dataset: str, data: Path | None, limit: int | None, skip_bad: bool
) -> list[Request]:
    if file is not None and data is not None:
        raise RequestError("--data is the file of --dataset: --file names its own.")
    named = f"{dataset}={data}" if dataset and data is not None else dataset
    source = request_source(file, named, limit, skip_bad)
    if source is None:
        raise RequestError("Say which requests: --dataset NAME (with --data PATH), or --file.")
    return source.requests()


def _check_they_go_with(mode: str, options: Sequence[str]) -> None:
    """Refuse options that say nothing about what is located."""
    for option in options:
        if mode not in GO_WITH[option]:
            *others, last = GO_WITH[option]
            known = f"{', '.join(others)} or {last}" if others else last
            raise ConfigError(f"{option} goes with {known}, not with {mode}.")


def _corrupt(text: str) -> Any:
    if text in ("subject", "relation"):
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UnknownNameError(
            "part of the prompt", text, ("subject", "relation"), "Or numbers of tokens: 3,4."
        ) from None
