"""Edits that get in each other's way: two requests on one fact, and keys that are nearly one."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.errors import LedgerError

if TYPE_CHECKING:
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
    """

    def __init__(self, active: Sequence[Edit]) -> None:
        self._edits: list[Edit] = []
        self._by_subject: dict[str, list[Edit]] = {}
        for edit in active:
            self.add(edit)

    def add(self, edit: Edit) -> None:
        """Take one more edit in."""
        self._edits.append(edit)
        for subject in dict.fromkeys(request.subject for request in edit.requests):
            self._by_subject.setdefault(subject, []).append(edit)

    def of_subject(self, subject: str) -> Sequence[Edit]:
        """Return the edits about a subject, in the order in which they were taken in."""
        return tuple(self._by_subject.get(subject, ()))

    def about(self, requests: Sequence[Request], *, same_target: bool = False) -> list[Edit]:
        """Return the edits that say something else about the same fact (subject and relation).

        `same_target` also returns those that say the same about it.
        """
        found: dict[str, Edit] = {}
        for new in requests:
            for edit in self._by_subject.get(new.subject, ()):
                if any(
                    same_fact(old, new) and (same_target or old.target_new != new.target_new)
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
                requests[0].text, ", ".join(ids),
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
                requests[0].text, ", ".join(close), max(close.values()),
            )  # fmt: skip
        return close


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


def same_fact(one: Request, other: Request) -> bool:
    """Say whether two requests are about one fact: the same subject and relation (or prompt)."""
    if one.subject != other.subject:
        return False
    if one.relation and other.relation:
        return one.relation == other.relation
    return one.plain.prompt == other.plain.prompt
