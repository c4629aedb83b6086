"""Several facts of one subject: who is edited already, and what all of them ask for together.

The key at the subject's last token hardly depends on the fact (whitened cosine .97 to .80 on
SmolLM2), so a second value there wipes out the first. Facts of one subject get one value instead,
optimised over all of them. An edit that joins others stores what each set of them asks for, so that
any may be taken out without computing anything (`errata.edits.delta.shared_values`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, cast

import torch

from errata.edits.clashes import same_fact
from errata.edits.delta import Delta, KeyValueDelta, KeyValues
from errata.edits.delta.key_values import PARTS

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model

SHARING = ("modify", "insert", "erase", "relation")
"""Kinds of request that share a value with others about their subject.

What is to be said and what no longer become one loss: a value for each would be averaged at their
one key, and a deletion's would take half of an addition away. A text has a value for each window.
"""

ALL_SETS = 4
"""Facts of a subject up to which every set of them is computed: 2ⁿ⁻¹ − 1 for the n-th.

Beyond, the set of all and those that lack one; where several come out, what remains falls back to
the largest sets that are stored.
"""


def facts_beside(model: Model, request: Request, earlier: Sequence[Request] = ()) -> list[Request]:
    """Return what else is known to be asked of the request's subject, oldest first.

    By active edits, by edits of the running call, and by `earlier` requests. What says something
    about the same fact is left out: one of the two is wrong.
    """
    active = (r for edit in model.edits_about(request.subject) for r in edit.requests)
    found: dict[str, Request] = {}
    for other in (*active, *earlier):
        if (
            other.subject == request.subject
            and other.kind in SHARING
            and request.kind in SHARING
            and not any(same_fact(other, one) for one in (request, *found.values()))
        ):
            found[other.digest] = other
    return list(found.values())


def sharing(
    model: Model,
    requests: Sequence[Request],
    compute: Callable[[Sequence[Request], bool], Delta | Sequence[Delta]],
) -> list[KeyValueDelta]:
    """Return one delta per request: what it asks for alone, and with others about its subject.

    Args:
        model: the model.
        requests: of one call.
        compute: returns the deltas of requests, one for each; with True those of facts of one
            subject that share their values, one for each or one for all.
    """
    deltas = cast("Sequence[KeyValueDelta]", compute(requests, False))
    found: list[KeyValueDelta] = []
    for index, (request, delta) in enumerate(zip(requests, deltas, strict=True)):
        known = {
            edit.requests[0].digest
            for edit in model.edits_about(request.subject)
            if len(edit.requests) == 1
            and isinstance(edit.delta, KeyValueDelta)
            and edit.delta.fact
            and _places(edit.delta) == _places(delta)
        }
        earlier = requests[:index]
        known |= {other.digest for other in earlier}
        beside = [r for r in facts_beside(model, request, earlier) if r.digest in known]
        shared = {
            frozenset(fact_of(fact, delta) for fact in facts): _stacked(compute(facts, True))
            for facts in _sets(request, beside)
        }
        fact = fact_of(request, delta) if request.kind in SHARING else ""
        found.append(KeyValueDelta(delta.pairs, fact, shared))
    return found


def fact_of(request: Request, delta: KeyValueDelta) -> str:
    """Return the name of a fact where a delta writes: a digest of request and parameters."""
    return hashlib.sha256(json.dumps([request.digest, sorted(delta.pairs)]).encode()).hexdigest()


def _places(delta: KeyValueDelta) -> dict[str, str]:
    """Return parameter → metric of a delta."""
    return {name: pair.group for name, pair in delta.pairs.items()}


def _sets(request: Request, beside: Sequence[Request]) -> Iterator[list[Request]]:
    """Yield the sets of a request and others, two or more, each in an order of its own.

    The order does not depend on who came first; so the numbers do not, either.
    """
    least = 1 if len(beside) < ALL_SETS else len(beside) - 1
    for count in range(least, len(beside) + 1):
        for others in combinations(beside, count):
            yield sorted((request, *others), key=lambda fact: fact.digest)


def _stacked(computed: Delta | Sequence[Delta]) -> dict[str, KeyValues]:
    """Return the keys of several deltas, of the same parameters, as those of one."""
    many = [computed] if isinstance(computed, Delta) else computed
    deltas = cast("Sequence[KeyValueDelta]", many)
    first = deltas[0]
    return {
        name: KeyValues(
            **{p: torch.cat([getattr(delta.pairs[name], p) for delta in deltas]) for p in PARTS},
            transposed=pair.transposed,
            metric=pair.metric,
        )
        for name, pair in first.pairs.items()
    }
