"""`errata locate PROMPT`: where one prompt's answer lies, or that of phrasings of one fact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.locate_views import (
    Phrasing,
    edits_on,
    location_view,
    low_probability,
    phrasings_view,
    show_located,
)
from errata.cli.prechecks import check_locator, check_method, check_model, check_settings
from errata.edits.request import Request
from errata.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from errata.cli.session import Session
    from errata.contract.location import Location
    from errata.editor import Editor
    from errata.model.model import Model


def locate_prompts(
    session: Session,
    prompts: Sequence[str],
    subject: str,
    target: str,
    by: str,
    method: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    """Locate what one prompt asks for, or show phrasings of it side by side.

    Args:
        session: of the command.
        prompts: with {} for the subject.
        subject: who or what they are about.
        target: the answer to look for; "": what the model says.
        by: name of a locator of the core.
        method: name of a method whose locator is asked instead.
        settings: of the locator.
        plot: draw it there.

    Raises:
        ConfigError, RequestError: what was given cannot be located.
    """
    if not prompts or not subject:
        raise RequestError(
            "Which prompt? Give one with {} and --subject, or --average, --sweep or "
            "--similar with --dataset or --file."
        )
    if plot is not None and len(prompts) > 1:
        raise ConfigError("--plot draws one prompt: give the phrasings one at a time.")
    _check(session, by, method, settings)
    with session.editor() as editor:
        if len(prompts) > 1 and not target and editor.model.generates:
            target = _first_word(editor, prompts[0].replace("{}", subject))  # one for all
        if target and not method and by != "norm":
            settings.setdefault("answer", target)
        requests = [_request(editor, prompt, subject, target) for prompt in prompts]
        if len(requests) > 1:
            _phrasings(session, editor, requests, method, by, settings)
        else:
            _one(session, editor, requests[0], method, by, settings, plot)


def _check(session: Session, by: str, method: str, settings: dict[str, Any]) -> None:
    """Refuse what can be known to be wrong before the model is loaded."""
    if method and by:
        raise ConfigError("--by names a locator of errata's own, --method a method's: give one.")
    if method:
        check_method(method)
    check_model(session.model_name())
    if method:
        check_settings(method, settings, session.model_name())
    else:
        check_locator(by, settings)


def _one(
    session: Session,
    editor: Editor,
    request: Request,
    method: str,
    by: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    with session.status("Locating"):
        found = editor.locate(request, method, **({"by": by} if by else {}), **settings)
        drawn = [] if plot is None else _drawn(editor, request, by, method, settings, plot)
    active = editor.model.stack.entries
    warning = low_probability(found.evidence.get("high"), str(found.evidence.get("answer", "")))
    show_located(session, found, location_view, active, warning, drawn)


def _drawn(
    editor: Editor, request: Request, by: str, method: str, settings: dict[str, Any], plot: Path
) -> list[Path]:
    """Draw a prompt's traces, of all three kinds unless one was asked for, or its logit lens."""
    from errata import plots
    from errata.locate import Tracer, TraceSettings, logit_lens
    from errata.locate import screen as screened
    from errata.locate.trace_result import KINDS

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


# -- phrasings -------------------------------------------------------------------------------------


def _phrasings(
    session: Session,
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    by: str,
    settings: dict[str, Any],
) -> None:
    """Show where several phrasings of one fact are located, side by side.

    All follow one answer, the first phrasing's where none is given.

    The layers compared are a sixth of all, those with the highest scores at the located token.
    """
    from errata.locate.layer_overlap import identified

    asked = {"by": by} if by else {}
    with session.status("Locating"):
        first = editor.locate(requests[0], method, **asked, **settings)
        if not method and first.evidence.get("answer"):
            settings.setdefault("answer", str(first.evidence["answer"]).strip())
        rest = [editor.locate(request, method, **asked, **settings) for request in requests[1:]]
    found = [first, *rest]
    profiles = [_profile(one) for one in found]
    highest = max(1, round(len(profiles[0]) / 6))
    shown = [
        Phrasing(
            request.text, one, _role_of(editor.model, request, one, settings),
            identified(profile, highest),
        )
        for request, one, profile in zip(requests, found, profiles, strict=True)
    ]  # fmt: skip
    shared = [
        len({*one.layers} & {*other.layers}) / highest
        for one, other in combinations(shown, 2)
    ]  # fmt: skip
    overlap, chance = math.fsum(shared) / len(shared), highest / len(profiles[0])
    active = editor.model.stack.entries
    warnings = [
        f"After {one.prompt!r}, {warning}"
        for one in shown
        if (warning := low_probability(one.clean, one.answer))
    ]
    if session.json:
        session.emit(
            {
                "schema": 1,
                "result": "phrasings",
                "subject": requests[0].subject,
                "phrasings": [one.as_json() for one in shown],
                "overlap": overlap,
                "chance": chance,
                "edits": [edit.id for edit in active],
                "warnings": warnings,
            }
        )
        return
    session.show(*phrasings_view(shown, overlap, chance, edits_on(active)))
    for warning in warnings:
        session.say(f"Warning: {warning}", "warn")


def _role_of(model: Model, request: Request, found: Location, settings: dict[str, Any]) -> str:
    """Return what the located token is in its prompt: "last subject token", say."""
    from errata.edits.rendering import rendered
    from errata.locate.spans import roles, span_of, subject_tokens

    (asked,) = rendered(model, [request])
    span = span_of(
        model.tokenizer, asked, settings.get("corrupt", "subject"), settings.get("relation")
    )
    tokens = found.evidence.get("tokens", ())
    place = found.token_index
    if not 0 <= place < len(tokens):
        return "unknown"
    return roles(len(tokens), span, subject_tokens(model.tokenizer, asked))[place]


def _profile(found: Location) -> list[float]:
    """Return the score of each layer at the token that was named."""
    if not found.scores:
        raise ConfigError(
            "This locator gives no score for each layer: phrasings cannot be compared by it."
        )
    return list(found.scores[found.token_index])
