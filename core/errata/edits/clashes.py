"""Edits that get in each other's way: two requests on one fact, and keys that are nearly one."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from errata.common.display import plural
from errata.edits.aims import aims_of_request
from errata.errors import LedgerError, first_few

if TYPE_CHECKING:
    from errata.edits.aims import Aim
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request

logger = logging.getLogger("errata")

OVERLAP = 0.9
"""Whitened cosine of two keys from which on their edits are said to overlap."""


class Clashes:
    """The active edits, to be compared with new ones.

    Args:
        active: the edits that are on the model, with their deltas.
        parameters: the names of the model's parameters, in its order: from the input up.
    """

    def __init__(self, active: Sequence[Edit], parameters: Iterable[str] = ()) -> None:
        self._edits: list[Edit] = []
        self._place = {name: place for place, name in enumerate(parameters)}
        self._keyed: dict[str, list[str]] = {}  # weight → ids of the edits with keys there
        self._said: set[str] = set()  # of which of these weights it was said
        self._by_subject: dict[str, list[Edit]] = {}
        for edit in active:
            self.add(edit)

    def add(self, edit: Edit) -> None:
        """Take one more edit in."""
        self._edits.append(edit)
        for name in edit.delta.keyed_at:
            self._keyed.setdefault(name, []).append(edit.id)
        for subject in dict.fromkeys(_composed(request.subject) for request in edit.requests):
            self._by_subject.setdefault(subject, []).append(edit)

    def of_subject(self, subject: str) -> Sequence[Edit]:
        """Return the edits about a subject, in the order in which they were taken in."""
        return tuple(self._by_subject.get(_composed(subject), ()))

    def about(self, requests: Sequence[Request], *, same_target: bool = False) -> list[Edit]:
        """Return the edits that contradict requests: they say something else about the same fact.

        `same_target` also returns those that agree with them.
        """
        found: dict[str, Edit] = {}
        for new in requests:
            for edit in self._by_subject.get(_composed(new.subject), ()):
                if any(
                    same_fact(old, new) and (same_target or contradicts(old, new))
                    for old in edit.requests
                ):
                    found[edit.id] = edit
        return sorted(found.values(), key=lambda edit: edit.sequence)

    def conflicts(self, requests: Sequence[Request]) -> tuple[str, ...]:
        """Return the ids of the edits that contradict requests, and warn about them."""
        ids = tuple(edit.id for edit in self.about(requests))
        if ids:
            logger.warning(
                "%r says something else than %s about the same fact; both are active.",
                requests[0].text, first_few(ids),
            )  # fmt: skip
        return ids

    def overlaps(self, requests: Sequence[Request], delta: Delta) -> dict[str, float]:
        """Return the ids of edits whose keys point the way of this delta's, with the cosine.

        The cosine is taken in the metric that the edits are solved in, kᵀ M k' / (|k| |k'|), the
        largest of any parameter and keys; only kinds that store keys have one. Edits about the
        same fact are left out. Warns about the others.
        """
        known = {edit.id for edit in self.about(requests)}
        others = [e for e in self._edits if e.delta.kind == delta.kind and e.id not in known]
        # Imported here: who only reads a ledger needs no torch.
        from errata.edits.delta.attaching import calling

        with calling(type(delta), "cosines"):
            cosines = delta.cosines([edit.delta for edit in others])
        close = {
            edit.id: round(cosine, 4)
            for edit, cosine in zip(others, cosines, strict=True)
            if cosine >= OVERLAP
        }
        if close:
            logger.warning(
                "%r has nearly the key of %s (whitened cosine up to %.2f): what is written for one "
                "is read for the other.",
                requests[0].text, first_few(close), max(close.values()),
            )  # fmt: skip
        return close

    def moves(self, requests: Sequence[Request], delta: Delta) -> tuple[str, ...]:
        """Return, and log, warnings about active edits with keys where this delta moves states.

        It moves them where it changes the model for every prompt, below the module at which the
        keys are compared. Each such module is warned of once.
        """
        if delta.keyed_at or not delta.effects & {"fold", "attach"}:
            return ()
        changed = [name for name in delta.parameters if name in self._place]
        lowest = min(changed, key=self._place.__getitem__, default="")
        found = []
        for name, ids in self._keyed.items():
            if name in self._said or not lowest or self._place[lowest] >= self._place[name]:
                continue
            self._said.add(name)
            found.append(
                f"{requests[0].text!r} changes {lowest}, below {name.removesuffix('.weight')}, "
                f"where prompts are compared with the keys of {first_few(ids)}: "
                "prompts may no longer reach them. Ask them again; made after this edit, they fit."
            )
            logger.warning("%s", found[-1])
        return tuple(found)


def last_of_each(requests: Sequence[Request]) -> list[Request]:
    """Return the last request about each fact, in order; warn of how many are left out.

    With `supersede` the later one takes the earlier one off, so only it is worth making. Left to
    the order of edits this would depend on which requests come together.
    """
    by_subject: dict[str, list[Request]] = {}
    kept: list[Request] = []
    for request in reversed(requests):
        later = by_subject.setdefault(_composed(request.subject), [])
        if not any(same_fact(request, other) for other in later):
            kept.append(request)
        later.append(request)
    if left_out := len(requests) - len(kept):
        logger.warning(
            "%s left out: a later request of the same call is about the same fact.",
            plural(left_out, "request"),
        )
    return kept[::-1]


def check_superseded(old: Sequence[Edit], requests: Sequence[Request]) -> None:
    """Raise `LedgerError` for an edit that would be superseded with only part of its requests."""
    for edit in old:
        kept = [r for r in edit.requests if not any(same_fact(r, new) for new in requests)]
        if kept:
            raise LedgerError(
                f"Edit {edit.id} holds {len(edit.requests)} requests that come off together, and "
                f"only {len(edit.requests) - len(kept)} of them are superseded (not: "
                f"{kept[0].text!r}). Revert it yourself and make the others again, or leave "
                "supersede out."
            )


_FACTS = ("modify", "insert", "erase", "label")
"""Kinds of request that are about the answer of a subject and a relation."""


def same_fact(one: Request, other: Request) -> bool:
    """Say whether two requests are about one fact: the same subject and relation (or prompt).

    A request of kind relation is about the pairs that its prompts name: that r joins s and o* is
    another fact than that r joins s and oᶜ, and another than what the r of s is. Other kinds are
    about what is said after their prompt.
    """
    if _composed(one.subject) != _composed(other.subject):
        return False
    if one.relation and other.relation and one.kind in _FACTS and other.kind in _FACTS:
        return one.relation == other.relation
    return not _prompts(one).isdisjoint(_prompts(other))


def share_a_fact(one: Edit, other: Edit) -> bool:
    """Say whether two edits have requests about one fact."""
    return any(same_fact(a, b) for a in one.requests for b in other.requests)


def same_relation(one: Request, other: Request) -> bool:
    """Say whether two requests of kind relation are about one relation of one subject."""
    if _composed(one.subject) != _composed(other.subject):
        return False
    if one.relation and other.relation:
        return one.relation == other.relation
    return _relation_name(one) == _relation_name(other)


def contradicts(one: Request, other: Request) -> bool:
    """Say whether two requests about one fact exclude each other.

    One that takes an answer away excludes one that says it (any, where no answer is named). What is
    said of two pairs of a relation goes together.
    """
    kinds = {one.kind, other.kind}
    if not kinds & {"erase", "relation"}:
        return one.target_new != other.target_new
    return any(
        _excludes(a, b) and (a.prompt == b.prompt or "relation" not in kinds)
        for a in aims_of_request(one.as_given)
        for b in aims_of_request(other.as_given)
    )


def _excludes(one: Aim, other: Aim) -> bool:
    """Say whether two aims about one fact cannot both be met."""
    answers = {aim.answer.strip() for aim in (one, other)}
    if one.sense == other.sense:
        return one.sense == "say" and len(answers) == 2
    return len(answers) == 1 or "" in answers


def _composed(subject: str) -> str:
    """Return a subject in one Unicode form: readers see one name, whichever form it was given in.

    (The model may not: an edit of one form is not asked for by the other.)
    """
    return unicodedata.normalize("NFC", subject)


def _prompts(request: Request) -> set[str]:
    """Return the templates that a request is about, as they were before a chat was rendered."""
    plain = request.plain
    return {plain.prompt} if plain.remove is None else {plain.prompt, plain.remove}


def _relation_name(request: Request) -> str:
    """Return the name of the relation that is added or deleted."""
    name = request.target_true if request.operation == "delete" else request.target_new
    return (name or "").casefold()
