"""What is shown of edits: after `errata edit` to people, and of any record as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from errata.cli import render
from errata.edits.aims import aims_of_request
from errata.errors import first_few

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.evaluate import AnswerChange, EditReport, LayerChoice

MANY = 8
"""Edits that are listed, at most."""
TEXTS = (
    " A passage seldom comes out whole: errata evaluate says how much of it does. Presets are "
    "chosen for facts; other layers (--set layers=[…]) can write more of a text "
    "(docs/closed-form.md)."
)
"""What may help where a text is not met."""
PER_LINE = 4
"""Ids of a command that stand in one line."""


def edit_view(edits: Sequence[Edit], report: EditReport, applied: bool, kept: str) -> Iterator[Any]:
    """Yield the parts of the page.

    Args:
        edits: those of one call.
        report: what the model says without and with them.
        applied: they are on the model.
        kept: the last line, which says where they are recorded.
    """
    if not edits:
        return
    if len(edits) == 1:
        yield from _one_edit(edits[0], report.layer)
    else:
        yield render.outcomes(edits[:MANY])
        yield Text(render.OUTCOME_NOTE, style="muted")
        if len(edits) > MANY:
            yield f"… and {len(edits) - MANY} more: errata log"
        yield render.facts(_layer(report.layer))
    if report.answers:
        yield ""
        yield render.titled("Answers", _answers(report), report.protocol)
        yield ""
        yield from _instead(report)
        yield from _neighbours(report)
    if not applied:
        yield f"Recorded, not on the model. Put it on with: errata apply {edits[0].id}"
    yield Text(kept, style="muted")


def idle_view(idle: Sequence[str], edits: Sequence[Edit], recorded: bool) -> Text:
    """Return the last line after edits of which some have no effect."""
    if len(edits) == 1:
        what = _missed(edits[0])
    else:
        what = f"{len(idle)} of {len(edits)} edits have no effect or a part: {render.names(idle)}."
    texts = any(request.kind == "text" for edit in edits for request in edit.requests)
    advice = TEXTS if texts else _advice(edits[0])
    if not recorded:
        return Text.assemble((what, "bad"), advice)
    # The command stands alone and in whole, so that it can be copied.
    lines = [" ".join(idle[i : i + PER_LINE]) for i in range(0, len(idle), PER_LINE)]
    off = "errata revert " + " \\\n    ".join(lines)
    return Text.assemble((what, "bad"), advice, f" Take off what does not help:\n{off}")


def _advice(edit: Edit) -> str:
    """Say what may help, of what the method has: a trained network has learnt the rest."""
    if edit.made_with:
        return (
            f" Try another method: other layers or more steps of {edit.method} are another "
            f"training (errata prepare {edit.method})."
        )
    ways = [
        text
        for text, names in (("another layer", {"layer", "layers"}), ("more steps", {"steps"}))
        if names & edit.config.keys()
    ]
    return f" Try {', '.join([*ways, 'or another method'] if ways else ['another method'])}."


def _missed(edit: Edit) -> str:
    """Return which answers are not as an edit's requests want them."""
    missed = edit.outcome.efficacy.missed if edit.outcome.efficacy else ()
    aims = [aim for r in edit.requests for aim in aims_of_request(r) if aim.answer]
    rivals = [aim for aim in aims if aim.sense == "rival"]
    how = "Only a part takes effect" if 0 < len(missed) < len(rivals or aims) else "No effect"
    return f"{how}: {first_few(missed)}."


def _one_edit(edit: Edit, layer: LayerChoice | None) -> Iterator[Any]:
    yield Text.assemble((edit.id, "accent"), "  ", (render.short_request(edit), "head"))
    cost = f"{render.size(edit.nbytes)}, {render.seconds(edit.seconds)}"
    rows: list[tuple[str, Any]] = [("made", f"{edit.method}, {edit.delta_kind}, {cost}")]
    rows += _layer(layer)
    rows += render.outcome(edit)
    outcome = edit.outcome
    if outcome.supersedes:
        rows.append(("supersedes", f"{', '.join(outcome.supersedes)}: same fact, taken off"))
    if outcome.conflicts:
        names = ", ".join(outcome.conflicts)
        rows.append(("conflicts", f"with {names}: same fact, other target"))
    if outcome.overlaps:
        names = render.names(tuple(outcome.overlaps))
        rows.append(("overlaps", f"with {names}: nearly the same key"))
    yield render.facts(rows)


def _layer(choice: LayerChoice | None) -> list[tuple[str, Any]]:
    """Return where the edit was made and who chose it; after a rule, how to find a better one."""
    if choice is None:
        return []
    by = {
        "rule": "by a rule of thumb: no preset fits this model",
        "preset": f"a preset: {choice.source}",
        "sweep": f"a sweep of this model: {choice.source.removeprefix('auto: ')}",
        "argument": "as given",
        "default": "the method's default",
    }[choice.chosen_by]
    name = "layer" if len(choice.layers) == 1 else "layers"
    rows: list[tuple[str, Any]] = [(name, f"{', '.join(map(str, choice.layers))}, {by}")]
    if choice.advice:
        rows.append(("better", Text.assemble((choice.advice, "accent"),
                     "  (facts that the model knows, one JSON object a line)")))  # fmt: skip
    return rows


def _answers(report: EditReport) -> Any:
    grid = render.table(
        ("", {"no_wrap": True}), "prompt", "before", "after", ("", {"no_wrap": True})
    )
    last = ""
    for one in report.answers:  # what is compared is what is shown; --json has the whole texts
        mark, style = _mark(one)
        grid.add_row(
            Text(one.role if one.role != last else "", style="muted"),
            one.prompt,
            Text(_said(one.before), style="muted"),
            Text(_said(one.after), style="new" if one.changed else "muted"),
            Text(mark, style=style),
        )
        last = one.role
    return grid


def _said(text: str) -> str:
    from errata.common.sentences import first_sentence

    return render.quoted(first_sentence(text), 48) or "(nothing)"


def _mark(one: AnswerChange) -> tuple[str, str]:
    """Return what the last column says: for the fact itself whether it took, else what changed."""
    if one.about_fact:
        if one.gives_target or one.gone:
            return ("new answer" if one.gives_target else "gone"), "good"
        style = {True: "muted", False: "warn", None: ""}[one.as_asked]
        return ("changed" if one.changed else "as before"), style
    if one.gives_target:
        return "! new answer", "bad"
    return ("! changed", "warn") if one.changed else ("as before", "muted")


def _instead(report: EditReport) -> Iterator[Text]:
    """Yield what the model says where an answer was taken away and nothing asked for instead."""
    for one in report.of("request"):
        if one.gone and not one.gives_target:
            yield Text(
                f"Gone: “{_said(one.before)}”. The model says “{_said(one.after)}” instead; "
                "whether that is true was not checked."
            )


def _neighbours(report: EditReport) -> Iterator[Text]:
    """Yield one line on what happened to the neighbours, a warning where some changed."""
    asked, changed = report.of("neighbour"), report.disturbed
    if not asked:
        return
    if not changed:
        yield Text(
            f"Of {render.count(len(asked), 'neighbour')} asked, none changed: a glance, not a "
            "measurement (errata evaluate).", style="muted",
        )  # fmt: skip
        return
    taken = sum(one.gives_target for one in changed)
    also = f", {taken} to the new answer" if taken else ""
    yield Text.assemble(
        (f"Warning: {len(changed)} of {len(asked)} neighbours changed{also}. ", "warn"),
        "The edit reaches beyond its subject; a lower layer or another method may disturb less.",
    )


def edit_json(edit: Edit, active: bool) -> dict[str, Any]:
    """Return a record as JSON data, with its title and whether it is on the model."""
    return {**edit.model_dump(mode="json"), "title": edit.title, "active": active}
