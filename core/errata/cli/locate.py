"""`errata locate`: one prompt or phrasings of it, an average, a layer sweep, or similarity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.cli.checks import check_locator, check_model, check_settings
from errata.cli.edits import check_method, pairs
from errata.cli.locate_similar import SETS, phrasings
from errata.cli.locate_similar import similar as similarity
from errata.cli.locate_views import (
    average_view,
    edits_on,
    location_view,
    low_probability,
    sweep_view,
)
from errata.cli.requests import SkipBad, read_dataset, read_requests
from errata.cli.session import MODEL, Session, command
from errata.edits.request import Request
from errata.errors import ConfigError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from errata.editor import Editor
    from errata.locate import AverageTrace

PANEL = "Look"
KINDS = ("hidden", "mlp", "attn")
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
        typer.Option("--similar", help=f"Relative similarity over sets: {', '.join(SETS)}."),
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
    _check_they_go_with(modes[0] if modes else ONE, [name for name, on in given.items() if on])
    settings = pairs(values or (), "--set")
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
    if plot is not None:
        check_plot(plot)
    if not modes:
        if not prompts or not subject:
            raise RequestError(
                "Which prompt? Give one with {} and --subject, or --average, --sweep or "
                "--similar with --dataset or --file."
            )
        if plot is not None and len(prompts) > 1:
            raise ConfigError("--plot draws one prompt: give the phrasings one at a time.")
        _given(session, prompts, subject, target, by, method, settings, plot)
        return
    requests = _requests(dataset, data, file, limit, skip_bad)
    if average:
        _average(session, requests, severed, screen, settings, plot)
    elif sweep:
        _sweep(session, requests, held_out, method, settings, plot)
    else:
        similarity(session, requests, similar, by or "trace", settings, plot)


# -- one prompt, or phrasings of one ---------------------------------------------------------------


def _given(
    session: Session,
    prompts: Sequence[str],
    subject: str,
    target: str,
    by: str,
    method: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    if method and by:
        raise ConfigError("--by names a locator of errata's own, --method a method's: give one.")
    if method:
        check_method(method)
    check_model(session.model_name())
    if method:
        check_settings(method, settings, session.model_name())
    else:
        check_locator(by, settings)
    with session.editor() as editor:
        if len(prompts) > 1 and not target and editor.model.generates:
            target = _first_word(editor, prompts[0].replace("{}", subject))  # one for all
        if target and not method and by != "norm":
            settings.setdefault("answer", target)
        requests = [_request(editor, prompt, subject, target) for prompt in prompts]
        if len(requests) > 1:
            phrasings(session, editor, requests, method, by, settings)
            return
        (request,) = requests
        with session.status("Locating"):
            found = editor.locate(request, method, **({"by": by} if by else {}), **settings)
            drawn = [] if plot is None else _drawn(editor, request, by, method, settings, plot)
        active = editor.model.stack.entries
    warning = low_probability(found.evidence.get("high"), str(found.evidence.get("answer", "")))
    if session.json:
        session.emit(
            {
                **found.as_json(),
                "edits": [edit.id for edit in active],
                "warnings": [warning] if warning else [],
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    session.show(*location_view(found, edits_on(active)))
    if warning:
        session.say(f"Warning: {warning}", "warn")
    say_pictures(session, drawn)


def _drawn(
    editor: Editor, request: Request, by: str, method: str, settings: dict[str, Any], plot: Path
) -> list[Path]:
    """Draw a prompt's traces, of all three kinds unless one was asked for, or its logit lens."""
    from errata import plots
    from errata.locate import Tracer, TraceSettings, logit_lens
    from errata.locate import screen as screened

    if by == "logit-lens":
        figure = plots.trajectory(logit_lens(editor.model, request, answer=settings.get("answer")))
        return [plots.save(figure, plot)]
    if method or by not in ("", "trace", "attribution"):
        raise ConfigError(
            "--plot draws traces (--by trace, attribution) and the logit lens (--by logit-lens)."
        )
    kinds: tuple[Any, ...] = (settings["kind"],) if "kind" in settings else KINDS
    if by == "attribution":
        traces = [screened(editor.model, request, **{**settings, "kind": kind}) for kind in kinds]
        return [plots.save(plots.heat_map(*traces), plot)]
    asked = TraceSettings(**settings)
    tracer = Tracer(editor.model, request, asked)
    traces = [
        tracer.trace(kind, asked.window, severed=asked.severed, memory_mb=asked.memory_mb)
        for kind in (("hidden",) if asked.severed else kinds)
    ]
    return [plots.save(plots.heat_map(*traces), plot)]


def _request(editor: Editor, prompt: str, subject: str, target: str) -> Request:
    said = target or _first_word(editor, prompt.replace("{}", subject))
    return Request.parse(
        {"prompt": prompt, "subject": subject, "target_new": said, "target_true": said}
    )


def _first_word(editor: Editor, prompt: str) -> str:
    """Return the first word of what the model says: what a trace follows if nothing is named."""
    if not editor.model.generates:
        return "?"  # it generates nothing; the locator takes the most probable token
    words = str(editor.generate(prompt, max_new_tokens=8)).split()
    return words[0].strip(".,;:!?") if words and words[0].strip(".,;:!?") else "?"


# -- many ------------------------------------------------------------------------------------------


def _requests(
    dataset: str, data: Path | None, file: Path | None, limit: int | None, skip_bad: bool
) -> list[Request]:
    if bool(dataset) == bool(file):
        raise RequestError("Say which requests: --dataset NAME (with --data PATH), or --file.")
    if file is not None and data is not None:
        raise RequestError("--data is the file of --dataset: --file names its own.")
    if file is not None:
        return read_requests(file, skip_bad)[:limit]
    given = f"{dataset}={data}" if data is not None else dataset
    return read_dataset(given, limit, skip_bad=skip_bad).requests()


def _average(
    session: Session,
    requests: Sequence[Request],
    severed: bool,
    screen: bool,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    from errata.locate import average

    options: dict[str, Any] = {
        "variants": (*KINDS, *(("hidden-mlp", "hidden-attn") if severed else ()))
    }
    with session.editor() as editor:
        options |= {**settings, "screening": screen, "resume": True}
        found = average(editor.model, requests, **options)
        active = editor.model.stack.entries
    drawn = [] if plot is None else _average_pictures(found, severed, plot)
    warning = low_probability(found.clean)
    if session.json:
        session.emit(
            {
                **found.as_json(),
                "edits": [edit.id for edit in active],
                "warnings": [warning] if warning else [],
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    session.show(*average_view(found, edits_on(active)))
    if warning:
        session.say(f"Warning: {warning}", "warn")
    say_pictures(session, drawn)


def _average_pictures(found: AverageTrace, severed: bool, plot: Path) -> list[Path]:
    from errata import plots

    made: list[tuple[Path, Figure]] = [(plot, plots.average_map(found))]
    made.append((beside(plot, "curves"), plots.average_curves(found)))
    if severed:
        made.append((beside(plot, "severed"), plots.severed_curves(found)))
    return [plots.save(figure, path) for path, figure in made]


def _sweep(
    session: Session,
    requests: Sequence[Request],
    held_out: int | None,
    method: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    from errata.locate import split_by_subject, sweep

    if not method:
        raise ConfigError("Which method shall --sweep edit with? Give --method NAME.")
    check_method(method)
    own = {name: settings.pop(name) for name in ("layers", "depths", "option") if name in settings}
    own = {name: [value] if isinstance(value, int) else value for name, value in own.items()}
    chosen_on, judged_on = (
        split_by_subject(requests, held_out) if held_out else (list(requests), [])
    )
    check_model(session.model_name())
    check_settings(method, settings, session.model_name())
    guards = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
    with session.editor(durable=False, guards=guards) as editor:
        found = sweep(editor, chosen_on, method, config=settings, held_out=judged_on, **own)
    drawn: list[Path] = []
    if plot is not None:
        from errata import plots

        drawn = [plots.save(plots.layer_sweep(found), plot)]
    if session.json:
        pictures = [str(path) for path in drawn]
        session.emit({**found.as_json(), "preset": found.preset(), "pictures": pictures})
        return
    session.show(*sweep_view(found))
    say_pictures(session, drawn)


# -- small things ----------------------------------------------------------------------------------


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


def check_plot(path: Path) -> None:
    """Refuse a name that cannot be drawn to before anything is computed."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"Cannot draw to {str(path)!r}: the name must end in .png or .svg.")
    from importlib.util import find_spec

    from errata.edits.outputs import PNG, SVG, check_file
    from errata.errors import MissingExtraError

    if find_spec("matplotlib") is None:
        raise MissingExtraError("Drawing pictures", "matplotlib", "report")
    check_file(path, SVG if path.suffix.lower() == ".svg" else PNG)


def beside(path: Path, word: str) -> Path:
    """Return a name for a further picture."""
    return path.with_name(f"{path.stem}-{word}{path.suffix}")


def say_pictures(session: Session, drawn: Sequence[Path]) -> None:
    """Say on standard error what was drawn."""
    if drawn:
        session.say(f"drawn: {', '.join(str(path) for path in drawn)}")
