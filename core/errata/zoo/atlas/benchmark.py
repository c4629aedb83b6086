"""Build the `atlas` benchmark from a world: CounterFact's schema, and what it lacks.

Every prompt is either in a phrasing that the models were trained on, or (the paraphrases) in one
that no training text uses. Targets keep no leading space, as in CounterFact.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from errata.zoo.atlas.relations import (
    RELATION_PROMPTS,
    RELATION_PROMPTS_HELD_OUT,
    RELATIONS,
    UNKNOWN,
    Relation,
    relation_by_id,
)
from errata.zoo.atlas.two_hops import TWO_HOPS
from errata.zoo.atlas.world import Fact, World

SHARES = {"person": 440, "company": 80, "city": 80}
"""How many cases each kind of subject gives."""
PROMPTS_PER_KIND = 10
"""At most this many neighbourhood, attribute and same-subject prompts in a case."""


def build_cases(world: World, seed: int = 0) -> list[dict[str, Any]]:
    """Return the cases in CounterFact's original schema, shuffled, with these further keys.

    * `same_subject_prompts`: other relations of the same subject (`prompt`, `answer`).
    * `portability_prompts`: two-hop consequences (`prompt`, `answer_new`, `answer_true`).
    * `relation_prompts`: the relation's perspective (`prompt`, `answer`, `object`), for the new
      and the true object.
    """
    rng = random.Random(seed)
    by_kind: dict[str, list[Fact]] = {kind: [] for kind in SHARES}
    for fact in _usable(world):
        by_kind[world.kind_of[fact.subject]].append(fact)
    chosen = [fact for kind, share in SHARES.items() for fact in rng.sample(by_kind[kind], share)]
    rng.shuffle(chosen)
    return [_case(world, number, fact, rng) for number, fact in enumerate(chosen)]


def beside_the_benchmark(
    world: World, retained: int = 300, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return data about facts that no case of the benchmark edits, drawn with the seed.

    First facts as requests in errata's own schema, whose target is what is true: to see what edits
    leave alone. Then cases about other facts, in the benchmark's schema: to train an editor on.
    """
    cases = (case["requested_rewrite"] for case in build_cases(world, seed))
    edited = {(case["subject"], case["relation_id"]) for case in cases}
    facts = [fact for fact in _usable(world) if (fact.subject, fact.relation) not in edited]
    rng = random.Random(f"{seed} beside")
    rng.shuffle(facts)
    kept = [
        {
            "prompt": relation_by_id(fact.relation).canonical,
            "subject": fact.subject,
            "target_new": fact.value,
        }
        for fact in facts[:retained]
    ]
    others = facts[retained:]
    return kept, [_case(world, number, fact, rng) for number, fact in enumerate(others)]


def _usable(world: World) -> Iterator[Fact]:
    """Yield facts that are known and have at least two neighbours with the same value."""
    for fact in world.facts:
        alike = world.subjects_with[(fact.relation, fact.value)]
        if world.kind_of[fact.subject] in SHARES and fact.value != UNKNOWN and len(alike) >= 3:
            yield fact


def _case(world: World, number: int, fact: Fact, rng: random.Random) -> dict[str, Any]:
    relation = relation_by_id(fact.relation)
    new = _target_new(world, relation, fact, rng)
    paraphrases = rng.sample(relation.held_out, 2)
    lead = _unrelated_sentence(world, fact.subject, rng)
    return {
        "case_id": number,
        "requested_rewrite": {
            "prompt": relation.canonical,
            "relation_id": relation.id,
            "subject": fact.subject,
            "target_new": {"str": new},
            "target_true": {"str": fact.value},
        },
        # As in CounterFact, a paraphrase may follow an unrelated sentence: here the second does.
        "paraphrase_prompts": [
            paraphrases[0].replace("{}", fact.subject),
            f"{lead} {paraphrases[1].replace('{}', fact.subject)}",
        ],
        "neighborhood_prompts": _prompts_of_others(world, relation, fact.value, fact.subject, rng),
        "attribute_prompts": _prompts_of_others(world, relation, new, fact.subject, rng),
        "generation_prompts": [
            t.replace("{}", fact.subject)
            for t in relation.train
            if t != relation.canonical and not t.endswith("Answer:")
        ],
        "same_subject_prompts": [
            {
                "prompt": _asked(other).replace("{}", other.subject),
                "answer": other.value,
                "relation_id": other.relation,
            }
            for other in world.attributes[fact.subject]
            if other.relation != fact.relation
        ],
        "portability_prompts": _portability(world, relation, fact, new),
        "relation_prompts": [
            {
                "prompt": template.replace("{}", fact.subject).replace("{object}", value),
                "object": value,
                "answer": relation.name,
            }
            for value in (new, fact.value)
            for template in (RELATION_PROMPTS[0], RELATION_PROMPTS_HELD_OUT[0])
        ],
    }


def _asked(fact: Fact) -> str:
    """Return the canonical template, or one that reads well where the value is unknown."""
    relation = relation_by_id(fact.relation)
    fitting = relation.templates_for(fact.value)
    return relation.canonical if relation.canonical in fitting else fitting[0]


def _target_new(world: World, relation: Relation, fact: Fact, rng: random.Random) -> str:
    """Draw a value that is new to the subject and, where it can, changes what follows from it."""
    own = {other.value for other in world.attributes[fact.subject]} | {fact.subject}
    values = [v for v in world.range_of(relation) if v not in own]
    hops = [hop for hop in TWO_HOPS if hop.first == relation.id]
    telling = [
        value
        for value in values
        if all(
            world.follow(fact.subject, hop, value) != world.follow(fact.subject, hop)
            for hop in hops
        )
    ]
    return rng.choice(telling or values)


def _prompts_of_others(
    world: World, relation: Relation, value: str, subject: str, rng: random.Random
) -> list[str]:
    """Return prompts about other subjects for which `value` is true, in trained phrasings."""
    others = [s for s in world.subjects_with.get((relation.id, value), ()) if s != subject]
    rng.shuffle(others)
    first = relation.canonical_index
    prompts = [t.replace("{}", s) for t in relation.train[first : first + 2] for s in others]
    return prompts[:PROMPTS_PER_KIND]


def _portability(world: World, relation: Relation, fact: Fact, new: str) -> list[dict[str, str]]:
    found = []
    for hop in TWO_HOPS:
        if hop.first != relation.id:
            continue
        true, changed = world.follow(fact.subject, hop), world.follow(fact.subject, hop, new)
        if true is not None and changed is not None and true != changed:
            found.append(
                {
                    "prompt": hop.train[0].replace("{}", fact.subject),
                    "answer_new": changed,
                    "answer_true": true,
                    "hop": hop.id,
                }
            )
    return found


def _unrelated_sentence(world: World, subject: str, rng: random.Random) -> str:
    """Return a true sentence about a subject of another kind."""
    kind = world.kind_of[subject]
    relations = [
        r for r in RELATIONS if r.subject_kind != kind and r.object_kind not in world.entities
    ]
    relation = rng.choice(relations)
    other = rng.choice(world.entities[relation.subject_kind])
    value = world.values[(other, relation.id)]
    return f"{relation.templates_for(value)[0].replace('{}', other)} {value}."
