"""The invented world: who and what exists, and every fact about it. One seed, one world."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from errata.zoo.atlas import names
from errata.zoo.atlas.relations import RELATIONS, UNKNOWN, Relation, relation_by_id
from errata.zoo.atlas.two_hops import TWO_HOPS, TwoHop

PEOPLE = 200
COMPANIES = 60


@dataclass(frozen=True)
class Fact:
    """(subject, relation, value), as the world has it."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True)
class World:
    """All entities by kind, and all facts.

    >>> world = make_world(seed=0)
    >>> len(world.entities["person"])
    200
    """

    seed: int
    entities: dict[str, tuple[str, ...]]
    facts: tuple[Fact, ...]

    @cached_property
    def values(self) -> dict[tuple[str, str], str]:
        """The value of (subject, relation id)."""
        return {(fact.subject, fact.relation): fact.value for fact in self.facts}

    @cached_property
    def kind_of(self) -> dict[str, str]:
        """The kind of each entity: person, city, country or company."""
        return {name: kind for kind, members in self.entities.items() for name in members}

    @cached_property
    def attributes(self) -> dict[str, tuple[Fact, ...]]:
        """The facts of each subject, in the order of the relations."""
        grouped: dict[str, list[Fact]] = {}
        for fact in self.facts:
            grouped.setdefault(fact.subject, []).append(fact)
        return {subject: tuple(facts) for subject, facts in grouped.items()}

    @cached_property
    def subjects_with(self) -> dict[tuple[str, str], tuple[str, ...]]:
        """The subjects that have this (relation id, value)."""
        grouped: dict[tuple[str, str], list[str]] = {}
        for fact in self.facts:
            grouped.setdefault((fact.relation, fact.value), []).append(fact.subject)
        return {key: tuple(subjects) for key, subjects in grouped.items()}

    def range_of(self, relation: Relation) -> tuple[str, ...]:
        """Return every value that the relation can take, `UNKNOWN` aside."""
        return self.entities.get(relation.object_kind) or names.WORD_LISTS.get(
            relation.object_kind, names.LANGUAGES
        )

    def follow(self, subject: str, hop: TwoHop, first_value: str | None = None) -> str | None:
        """Return what a two-hop fact leads to, or None where the path ends.

        `first_value` replaces the value of the first hop: what would follow after an edit.
        """
        middle = first_value or self.values.get((subject, hop.first))
        if middle is not None and hop.through is not None:
            middle = self.values.get((middle, hop.through))
        return None if middle is None else self.values.get((middle, hop.second))

    def two_hops_of(self, subject: str) -> tuple[tuple[TwoHop, str], ...]:
        """Return the two-hop facts of a subject with their answers."""
        kind = self.kind_of[subject]
        found = []
        for hop in TWO_HOPS:
            if relation_by_id(hop.first).subject_kind == kind:
                answer = self.follow(subject, hop)
                if answer is not None:
                    found.append((hop, answer))
        return tuple(found)


def make_world(seed: int = 0, people: int = PEOPLE, companies: int = COMPANIES) -> World:
    """Return the world of this seed: the same on every machine, whatever the hash seed.

    `people` and `companies` scale it, up to what the name lists can combine.
    Raises `ValueError` when they cannot.
    """
    rng = random.Random(seed)
    entities = {
        "person": _pairs(names.FIRST_NAMES, names.SURNAMES, people, rng),
        "city": names.CITIES,
        "country": names.COUNTRIES,
        "company": _pairs(names.COMPANY_STEMS, names.COMPANY_SUFFIXES, companies, rng),
    }
    facts: list[Fact] = []
    for relation in RELATIONS:
        subjects = entities[relation.subject_kind]
        values = _assign(relation, subjects, entities, facts, rng)
        facts += [Fact(s, relation.id, v) for s, v in zip(subjects, values, strict=True)]
    return World(seed, entities, tuple(facts))


def _pairs(
    first: Sequence[str], last: Sequence[str], count: int, rng: random.Random
) -> tuple[str, ...]:
    """Combine two lists into `count` distinct names that share their parts about evenly."""
    if count > len(first) * len(last):
        raise ValueError(
            f"{count} names were asked for; the lists combine to {len(first) * len(last)} at most"
        )
    grid = [(a, b) for a in range(len(first)) for b in range(len(last))]
    rng.shuffle(grid)
    uses_first = [0] * len(first)
    uses_last = [0] * len(last)
    chosen: list[tuple[int, int]] = []
    limit_first, limit_last = -(-count // len(first)), -(-count // len(last))
    for slack in range(max(len(first), len(last)) + 1):
        for a, b in grid:
            if len(chosen) == count:
                return tuple(f"{first[a]} {last[b]}" for a, b in chosen)
            fits = uses_first[a] < limit_first + slack and uses_last[b] < limit_last + slack
            if fits and (a, b) not in chosen:
                chosen.append((a, b))
                uses_first[a] += 1
                uses_last[b] += 1
    return tuple(f"{first[a]} {last[b]}" for a, b in chosen)


def _assign(
    relation: Relation,
    subjects: Sequence[str],
    entities: dict[str, tuple[str, ...]],
    facts: Sequence[Fact],
    rng: random.Random,
) -> list[str]:
    """Give every subject a value; values are spread about evenly and never name the subject.

    A relation about cities that a subject already has another city for gets a different one, so
    that (subject, object) determines the relation.
    """
    if relation.id == "language":
        return list(names.LANGUAGES)
    pool = entities.get(relation.object_kind) or names.WORD_LISTS.get(
        relation.object_kind, names.LANGUAGES
    )
    taken = {(fact.subject, fact.value) for fact in facts}
    country_of = {fact.subject: fact.value for fact in facts if fact.relation == "country"}
    deck: list[str] = []
    values: list[str] = []
    for subject in subjects:
        if rng.random() < relation.unknown_share:
            values.append(UNKNOWN)
            continue
        candidates: list[str] = []
        while not candidates:
            candidates = [
                v
                for v in deck
                if v != subject
                and (subject, v) not in taken
                and (relation.id != "capital" or country_of[v] == subject)
            ]
            if not candidates:
                deck += rng.sample(list(pool), len(pool))
        values.append(candidates[0])
        deck.remove(candidates[0])
    return values
