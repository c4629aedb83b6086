"""Sets of prompts that belong together: phrasings of one fact, facts of one relation, chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.edits.request import Request

CHAINED = ("reasoning", "two_hop", "multi_hop", "single_hop", "compositionality_1")
"""Types of portability probes that ask for a fact through another, or for one of its hops."""


def paraphrase_sets(requests: Sequence[Request], size: int = 5) -> list[list[Request]]:
    """Return each fact with its own rephrasings as one set: consistency.

    Only phrasings that name the subject exactly once can be located by it.
    """
    sets = []
    for request in requests:
        group = [request]
        for text in dict.fromkeys(request.paraphrases):
            template = _template(text, request.subject)
            if template is not None and len(group) < size:
                group.append(request.model_copy(update={"prompt": template}))
        sets.append(group)
    return [group for group in sets if len(group) > 1]


def relation_sets(requests: Sequence[Request], size: int = 5) -> list[list[Request]]:
    """Return facts of one relation and different subjects as one set each: relevance."""
    groups: dict[str, dict[str, Request]] = {}
    for request in requests:
        if request.relation is not None:
            group = groups.setdefault(request.relation, {})
            if len(group) < size:
                group.setdefault(request.subject, request)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def chain_sets(requests: Sequence[Request], size: int = 5) -> list[list[Request]]:
    """Return each fact with the facts that it is chained with as one set: relevance, as in KLoB.

    The chains are the portability probes of the types in `CHAINED` (KnowEdit's Reasoning, MQuAKE's
    multi-hop questions and single hops, KLoB's chains); edits of one case are one set. Only probes
    that name the fact's subject exactly once can be located by it. The probes' answers hold after
    the edit and are not what the model says, so no answer is given: what is followed is the first
    token that the model itself says after each prompt.
    """
    groups: dict[str, dict[str, Request]] = {}
    for index, request in enumerate(requests):
        case = f"of {index}" if request.case_id is None else f"case {request.case_id}"
        group = groups.setdefault(case, {})
        group.setdefault(request.text, request)
        for probe in request.portability:
            template = _template(probe.prompt, request.subject)
            if probe.type in CHAINED and template is not None:
                asked = request.model_copy(update={"prompt": template})
                group.setdefault(asked.text, asked)
    return [
        [one.model_copy(update={"target_true": None}) for one in list(group.values())[:size]]
        for group in groups.values() if len(group) > 1
    ]  # fmt: skip


SETS: Mapping[str, Callable[[Sequence[Request]], list[list[Request]]]] = {
    "paraphrases": paraphrase_sets,
    "relations": relation_sets,
    "chains": chain_sets,
}
"""Kinds of sets by the name that `errata locate --similar` takes."""


def _template(text: str, subject: str) -> str | None:
    """Return a prompt with {} for the subject; None where it does not name it exactly once."""
    if text.count(subject) != 1 or "{}" in text:
        return None
    return text.replace(subject, "{}")
