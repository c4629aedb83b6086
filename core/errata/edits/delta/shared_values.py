"""Values that several facts of one subject share, and which of them is in force.

A key at the subject's last token hardly depends on the fact, so two values there overwrite each
other. An edit of a subject that is edited already therefore stores, beside what it asks for alone,
what it and others of that subject ask for *together*: for every set of them that it may be left
with. Taking one out so needs no computation: what remains finds its values among what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from errata.edits.delta.key_value_joint import Joint, JointMember
    from errata.edits.delta.key_values import KeyValues


@dataclass(eq=False)
class SharedValues:
    """What several facts of one subject ask for together, per parameter.

    Attributes:
        pairs: parameter name → keys and residuals of all of them.
        joints: joint solutions that these are part of: a cache.
    """

    pairs: dict[str, KeyValues]
    joints: dict[tuple[str, str], Joint] = field(default_factory=dict)


class FactMember(Protocol):
    """An edit, as a member of the edits about one subject."""

    pairs: dict[str, KeyValues]
    joints: dict[tuple[str, str], Joint]
    fact: str
    shared: dict[frozenset[str], SharedValues]


Member = TypeVar("Member", bound=FactMember)


def in_force(deltas: Sequence[Member]) -> list[JointMember]:
    """Return what active edits ask for, in their order: alone, or as a set in place of its members.

    From the last edit to the first, each takes the largest set that it stores of itself and others
    that are active and not yet in a set. A function of the active edits alone.
    """
    free = {delta.fact for delta in deltas if delta.fact}
    found: list[JointMember] = []
    placed: set[str] = set()
    for delta in reversed(deltas):
        if delta.fact in placed:
            continue
        sets = [facts for facts in delta.shared if facts <= free]
        if not sets:
            found.append(delta)
            continue
        largest = max(sets, key=lambda facts: (len(facts), sorted(facts)))
        found.append(delta.shared[largest])
        placed |= largest
        free -= largest
    return found[::-1]
