"""Which requests a ledger's active edits carry out already, themselves or in place of others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from errata.edits.aims import aims_of_request
from errata.edits.clashes import same_fact

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.edits.ledger import Ledger
    from errata.edits.request import Request

REPLACING = ("supersede", "rebase", "resolve")
"""Kinds of events that name the edits which replaced one that was taken off."""


def left_over(
    ledger: Ledger, requests: Sequence[Request], active: Collection[str]
) -> tuple[list[Request], list[Request]]:
    """Return the requests, in order, that no active edit carries out; and which were superseded.

    An edit that was replaced (superseded, computed or solved again) still carries out its request
    if an active edit has taken its place, perhaps in several steps, and says the same. If that
    edit says something else, the request is superseded. A reverted edit does not count.

    Args:
        ledger: where the edits are recorded.
        requests: those asked for.
        active: ids of the edits that are on the model.
    """
    made = ledger.find(request.digest for request in requests)
    off = [r for r in requests if set(active).isdisjoint(made.get(r.digest, ()))]
    if not any(made.get(request.digest) for request in off):
        return off, []
    instead = _replacements(ledger)
    read = functools.cache(ledger.get)
    left, superseded = [], []
    for request in off:
        said = _said_instead(request, made.get(request.digest, ()), active, instead, read)
        if not any(_says_the_same(request, other) for other in said):
            left.append(request)
            if said:
                superseded.append(request)
    return left, superseded


def _replacements(ledger: Ledger) -> Mapping[str, Collection[str]]:
    """Map each replaced edit to its replacements, unless it was put on again since."""
    known = set(ledger.ids())
    found: dict[str, Collection[str]] = {}
    for event in ledger.events():
        if event.edit_id is None:
            continue
        if event.kind == "apply":
            found.pop(event.edit_id, None)
        elif event.kind in REPLACING:
            found[event.edit_id] = known.intersection(event.detail.get("by", ()))
    return found


def _said_instead(
    request: Request,
    made: Sequence[str],
    active: Collection[str],
    instead: Mapping[str, Collection[str]],
    read: Callable[[str], Edit],
) -> list[Request]:
    """Return the requests on the same fact of active edits that replaced those in `made`."""
    found: list[Request] = []
    waiting = [(name, request) for name in made]
    seen = set(waiting)
    while waiting:
        name, asked = waiting.pop()
        for other in instead.get(name, ()):
            # An edit may hold requests on other facts, too.
            about = [new for new in read(other).requests if same_fact(asked, new)]
            if other in active:
                found += about
            more = {(other, new) for new in about} - seen
            seen |= more
            waiting += more
    return found


def _says_the_same(one: Request, other: Request) -> bool:
    """Say whether two requests about one fact want the same of it, in whatever words they ask."""
    wanted, there = (
        {
            (aim.sense, aim.answer.strip(), aim.prompt if request.kind == "relation" else "")
            for aim in aims_of_request(request.as_given)
        }
        for request in (one, other)
    )
    return wanted == there
