"""`errata locate` over prompts that belong together: sets of them, or phrasings of one fact."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.cli.locate_views import (
    Phrasing,
    edits_on,
    low_probability,
    phrasings_view,
    similarity_view,
)
from errata.cli.render import count
from errata.edits.request import Request
from errata.errors import ConfigError, RequestError, UnknownNameError

if TYPE_CHECKING:
    from errata.cli.session import Session
    from errata.contract.location import Location
    from errata.editor import Editor
    from errata.model.model import Model

NEEDED = {
    "paraphrases": "requests with paraphrases that name the subject once",
    "relations": "requests with a relation, several about each",
    "chains": "requests with portability probes that ask through the fact and name its subject "
    "once (types reasoning, two_hop, multi_hop, single_hop: KnowEdit, MQuAKE, atlas)",
}
"""Kind of sets (`errata.locate.related_prompts.SETS`) → the requests that it takes."""


def similar(
    session: Session,
    requests: Sequence[Request],
    kind: str,
    by: str,
    settings: dict[str, Any],
    plot: Path | None,
) -> None:
    """Say how alike prompts of one set are located: RSim, and the overlap of the layers named."""
    from errata.locate.layer_overlap import layer_overlap
    from errata.locate.related_prompts import SETS
    from errata.locate.similarity import located_sets, place_similarity

    if kind not in SETS:
        raise UnknownNameError("kind of sets", kind, SETS)
    sets = SETS[kind](requests)
    if len(sets) < 2:
        raise RequestError(
            f"The {count(len(requests), 'request')} make {count(len(sets), 'set')} of {kind}; RSim "
            f"needs at least two. It takes {NEEDED[kind]}."
        )
    with session.editor() as editor:
        located = located_sets(editor.model, sets, by, **settings)
        name, active = editor.model.name, editor.model.stack.entries
    found = place_similarity(located, by)
    profiles = [[one.profile for one in group] for group in located]
    overlap = layer_overlap(profiles, protocol=f"layer overlap: the k highest layers by {by}")
    drawn: list[Path] = []
    if plot is not None:
        from errata import plots

        heading = f"{by} on {name}"
        drawn = [plots.save(plots.layer_overlaps({kind: overlap}, heading), plot)]
    if session.json:
        session.emit(
            {
                "model": name,
                "sets_of": kind,
                "locator": by,
                "edits": [edit.id for edit in active],
                **found.as_json(),
                "layers": overlap.as_json(),
                "pictures": [str(path) for path in drawn],
            }
        )
        return
    session.show(*similarity_view(name, kind, found, overlap, edits_on(active)))
    if drawn:
        session.say(f"drawn: {', '.join(str(path) for path in drawn)}")


def phrasings(
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
            request.text, one, role_of(editor.model, request, one, settings),
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


def role_of(model: Model, request: Request, found: Location, settings: dict[str, Any]) -> str:
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
