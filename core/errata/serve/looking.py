"""What the page shows: the ledger's edits, what one did, two stacks side by side, a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field

from errata.edits.edit import Edit, LogEntry
from errata.evaluate.edit_reports import edit_report, just_these
from errata.model.generation import generated
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets
from errata.serve.openai import EditChoice, RequestBody, active_edits, public_name

if TYPE_CHECKING:
    from errata.editor import Editor

PAGE = 100
"""Edits in one answer, at most."""


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it holds no word")
    return text


class CompareAsked(RequestBody):
    """`POST /errata/compare`: one prompt, two selections of edits."""

    prompt: Annotated[str, AfterValidator(_not_blank)] = Field(max_length=20_000)
    a: EditChoice = Field(default_factory=EditChoice)
    b: EditChoice = Field(default_factory=EditChoice)
    max_tokens: int = Field(default=24, ge=1, le=128)


class TraceAsked(RequestBody):
    """`POST /errata/trace`: a causal trace of a prompt about a subject."""

    prompt: Annotated[str, AfterValidator(_not_blank)] = Field(max_length=2_000)
    subject: Annotated[str, AfterValidator(_not_blank)] = Field(max_length=500)
    kind: Literal["hidden", "mlp", "attn"] = "hidden"
    estimate: bool = Field(
        default=False, description="One backward pass instead of all restorations"
    )
    edits: EditChoice = Field(default_factory=EditChoice)


def state(editor: Editor, **rules: Any) -> dict[str, Any]:
    """Return what is served, and the `rules` of the server beside it."""
    model = editor.model
    return {
        "model": public_name(editor),
        "task": model.task,
        "layers": model.anatomy.n_layers,
        "parameters": sum(p.numel() for p in model.parameters.values()),
        "chat": bool(getattr(model.tokenizer, "chat_template", None)),
        "active": active_edits(editor),
        "edits": len(editor.ledger.ids()),
        "damaged": dict(editor.damaged),
        **rules,
    }


def states(editor: Editor) -> dict[str, list[str]]:
    """Return which edits are on, and those of them made on top of some that are off now."""
    return {"active": active_edits(editor), "stale": editor.ledger.stale_ids()}


def listing(editor: Editor, query: str = "", offset: int = 0) -> dict[str, Any]:
    """Return the ledger's edits, the last ones first: those that hold every word of a query."""
    words = query.casefold().split()
    active, stale = set(active_edits(editor)), set(editor.ledger.stale_ids())
    found = [
        edit
        for edit in reversed(list(editor.ledger.edits()))
        if all(word in _searched(edit) for word in words)
    ]
    return {
        "total": len(found),
        "edits": [_row(LogEntry.of(edit, active, stale)) for edit in found[offset : offset + PAGE]],
    }


def _searched(edit: Edit) -> str:
    texts = [edit.id, edit.method]
    for request in edit.requests:
        texts += [request.plain.text, request.wish, request.relation or ""]
    return " ".join(texts).casefold()


def _row(entry: LogEntry) -> dict[str, Any]:
    edit, found = entry.edit, entry.edit.outcome
    return {
        "id": edit.id, "title": edit.title, "method": edit.method, "created": edit.created,
        "active": entry.active, "stale": entry.stale, "conflicts": list(entry.conflicts),
        "overlaps": list(entry.overlaps), "warnings": list(found.warnings),
        "takes_effect": None if found.efficacy is None else found.efficacy.value,
        "norm": None if found.relative_norm is None else found.relative_norm.value,
        "perplexity_ratio": None if found.perplexity is None else found.perplexity.ratio_to_base,
    }  # fmt: skip


def details(editor: Editor, edit_id: str) -> dict[str, Any]:
    """Return all of one edit's record."""
    edit = editor.ledger.get(edit_id)
    row = _row(LogEntry.of(edit, set(active_edits(editor)), set(editor.ledger.stale_ids())))
    first = edit.requests[0].plain
    return {
        **row,
        "kind": edit.delta_kind, "config": edit.config, "seconds": edit.seconds,
        "bytes": edit.nbytes, "versions": edit.versions,
        "on_top_of": edit.on_top_of, "parents": list(edit.parents),
        "supersedes": list(edit.outcome.supersedes),
        "requests": [
            {"prompt": r.plain.text, "target": r.wish, "true": r.target_true, "kind": r.kind}
            for r in edit.requests[:PAGE]
        ],
        "prompt": first.text, "subject": first.subject,
    }  # fmt: skip


def side_effects(editor: Editor, edit_id: str) -> dict[str, Any]:
    """Return what the model says without and with an edit: the fact, other words, neighbours."""
    edit = editor.ledger.get(edit_id)
    with editor.model.access.changing():
        return edit_report(editor, edit, neighbours=6).as_json()


# -- two stacks ------------------------------------------------------------------------------------


def compared(editor: Editor, asked: CompareAsked) -> dict[str, Any]:
    """Return how two selections of edits continue one prompt, token by token.

    Each continuation is greedy. Both stacks then score both of them, teacher-forced: for each
    token its probability under A and under B, and what the other would have said there.
    """
    model = editor.model
    with model.access.changing():  # both are of one state of the ledger
        stacks = [_stack(editor, choice) for choice in (asked.a, asked.b)]
        texts = []
        for ids in model.progress.track(stacks, "continuing the prompt"):
            with just_these(editor, ids):
                settings = GenerationSettings(max_new_tokens=asked.max_tokens)
                texts.append(generated(model, [asked.prompt], settings)[0].text)
        scored = []
        for ids in model.progress.track(stacks, "scoring what was said"):
            with just_these(editor, ids):
                scored.append(_scores(editor, asked.prompt, texts))
    rows = []
    for side, text in enumerate(texts):
        own, other = scored[side][side], scored[1 - side][side]
        rows.append(
            {
                "edits": stacks[side],
                "text": text,
                "tokens": [
                    {
                        "text": token,
                        "own": p,
                        "other": q,
                        "other_says": says if says != token else "",
                    }
                    for (token, p, _), (_, q, says) in zip(own, other, strict=True)
                ],
            }
        )
    return {"prompt": asked.prompt, "a": rows[0], "b": rows[1], "same": texts[0] == texts[1]}


def _scores(
    editor: Editor, prompt: str, texts: Sequence[str]
) -> list[list[tuple[str, float, str]]]:
    """Return (token, its probability, the most probable token) along each text."""
    from math import exp

    found: list[list[tuple[str, float, str]]] = []
    for text in texts:
        if not text.strip():
            found.append([])
            continue
        (score,) = score_targets(editor.model, [prompt], [text])
        read = editor.model.tokenizer.decode
        found.append(
            [
                (read([token]), exp(logprob), read([best]))
                for token, logprob, best in zip(
                    score.token_ids, score.logprobs, score.predicted, strict=True
                )
            ]
        )
    return found


def _stack(editor: Editor, choice: EditChoice) -> list[str]:
    active = list(editor.model.stack.ids)
    if choice.only is not None:
        wanted = {editor.ledger.resolve(name) for name in choice.only}
        return [name for name in editor.ledger.ids() if name in wanted]
    gone = {editor.ledger.resolve(name) for name in choice.without or ()}
    return [name for name in active if name not in gone]


# -- a trace ---------------------------------------------------------------------------------------


FAINT = 0.25
"""An estimate that sees less than this share of the effect says little."""


def traced(editor: Editor, asked: TraceAsked) -> tuple[bytes, str]:
    """Return a causal trace as a PNG picture, and what must be said of it.

    Raises `RequestError` for a prompt that cannot be traced, `MissingExtraError` without
    matplotlib.
    """
    from errata import plots
    from errata.locate import screen, trace
    from errata.plots.style import rendered

    with editor.model.access.changing(), just_these(editor, _stack(editor, asked.edits)):
        look = screen if asked.estimate else trace
        found = look(editor.model, asked.prompt, asked.subject, kind=asked.kind)
    seen, whole = float(found.scores.max()) - found.low, found.high - found.low
    note = ""
    if asked.estimate and seen < FAINT * whole:
        note = (
            f"The estimate sees {max(seen, 0):.2f} of an effect of {whole:.2f} at most, so it says "
            "little. Trace without it."
        )
    return rendered(plots.heat_map(found), "png"), note
