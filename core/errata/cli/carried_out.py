"""Which requests a ledger's active edits carry out already, themselves or in place of others."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from errata.edits.clashes import same_fact

if TYPE_CHECKING:
    from errata.edits.ledger import Ledger
    from errata.edits.request import Request

REPLACING = ("supersede", "rebase", "resolve")
"""Kinds of the events that say which edits one was taken off for."""


def left_over(
    ledger: Ledger, requests: Sequence[Request], active: Collection[str]
) -> list[Request]:
    """Return the requests, in order, that no active edit carries out.

    An edit that was taken off for another (superseded, computed or solved again) counts as long as
    what took its place is active, itself or through further such steps. One that was reverted
    does not count.

    Args:
        ledger: where the edits are recorded.
        requests: those asked for.
        active: ids of the edits that are on the model.
    """
    made = ledger.find(request.digest for request in requests)
    off = [r for r in requests if set(active).isdisjoint(made.get(r.digest, ()))]
    if not any(made.get(request.digest) for request in off):
        return off
    instead = _replacements(ledger)
    return [r for r in off if not _replaced(ledger, r, made.get(r.digest, ()), active, instead)]


def _replacements(ledger: Ledger) -> Mapping[str, Sequence[str]]:
    """Return id → ids of what it was taken off for, of edits not put on again since."""
    found: dict[str, Sequence[str]] = {}
    for event in ledger.events():
        if event.edit_id is None:
            continue
        if event.kind == "apply":
            found.pop(event.edit_id, None)
        elif event.kind in REPLACING:
            found[event.edit_id] = event.detail.get("by", ())
    return found


def _replaced(
    ledger: Ledger,
    request: Request,
    made: Sequence[str],
    active: Collection[str],
    instead: Mapping[str, Sequence[str]],
) -> bool:
    """Say whether an active edit took the place of one of those that were `made` of a request."""
    known = set(ledger.ids())
    waiting = [(name, request) for name in made]
    seen = set(waiting)
    while waiting:
        name, asked = waiting.pop()
        for other in known.intersection(instead.get(name, ())):
            # An event names all edits of its call; those about another fact replaced others.
            about = [new for new in ledger.get(other).requests if same_fact(asked, new)]
            if about and other in active:
                return True
            more = {(other, new) for new in about} - seen
            seen |= more
            waiting += more
    return False
