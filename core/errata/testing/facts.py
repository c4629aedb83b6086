"""Facts with ten neighbours each, about which a pretrained model is asked what an edit spares."""

from __future__ import annotations

from errata.edits.request import Probe, RelationView, Request
from errata.zoo.facts import KNOWN

_OTHERS = {
    "mother tongue": (
        "Victor Hugo", "Albert Camus", "Voltaire", "Fyodor Dostoevsky", "Dante Alighieri",
        "Johann Wolfgang von Goethe", "Miguel de Cervantes", "Jean-Paul Sartre", "Claude Debussy",
        "Edith Piaf",
    ),
    "capital": (
        "Germany", "Spain", "Italy", "France", "Poland", "Greece", "Austria", "Portugal", "Egypt",
        "China",
    ),
    "founder": (
        "Facebook", "Amazon", "Apple", "Google", "Tesla", "Twitter", "Disney", "Wikipedia", "Dell",
        "Netflix",
    ),
}  # fmt: skip
"""Relation of a known fact → other subjects that are asked for in the same words."""


def _asked(fact: Request) -> Request:
    """Return a fact with its neighbours, and with the relation's side for methods that write it."""
    relation = fact.relation or ""
    probes = tuple(Probe(prompt=fact.prompt.replace("{}", other)) for other in _OTHERS[relation])
    view = RelationView(
        names=(relation,),
        add=f"The relation between {{}} and {fact.target_new} is",
        remove=f"The relation between {{}} and {fact.target_true} is",
    )
    return fact.model_copy(update={"neighbourhood": probes, "relation_view": view})


SPARED = tuple(_asked(fact) for fact in KNOWN if fact.relation in _OTHERS)
"""Their probes name no answers: what counts is what the model says before and after."""
