"""Other subjects of a kind with a given one: whose answers an edit should leave alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from errata.evaluate.matching import contained_match, normalise
from errata.model.forward.trace import trace
from errata.model.tokens import encode

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

SUBJECTS: Mapping[str, tuple[str, ...]] = {
    "country": (
        "Germany", "Spain", "Japan", "Brazil", "Canada", "Egypt", "India", "France", "Italy",
        "China", "Russia", "Australia", "Sweden", "Poland", "Greece", "Portugal", "Mexico",
        "Argentina", "Norway", "Turkey", "England", "Austria", "Switzerland", "Ireland", "Finland",
        "Denmark", "Hungary", "Kenya", "Nigeria", "Iran", "Peru", "Chile", "Cuba", "Vietnam",
        "Thailand", "Ukraine", "Belgium", "the Netherlands", "the United States",
        "the United Kingdom",
    ),
    "city": (
        "London", "Tokyo", "Berlin", "Madrid", "Chicago", "Cairo", "Mumbai", "Vienna", "Toronto",
        "Sydney", "Paris", "Rome", "Moscow", "Boston", "New York", "Beijing", "Athens", "Lyon",
    ),
    "person": (
        "Albert Einstein", "Marie Curie", "William Shakespeare", "Barack Obama", "Pablo Picasso",
        "Serena Williams", "Elvis Presley", "Jane Austen", "Isaac Newton", "Nelson Mandela",
        "Wolfgang Amadeus Mozart", "Leonardo da Vinci",
    ),
    "company": (
        "Microsoft", "Toyota", "Boeing", "Samsung", "Siemens", "Apple", "Amazon", "IBM",
        "Volkswagen", "Google",
    ),
    "university": (
        "Harvard University", "the University of Oxford", "Stanford University", "Yale University",
        "the University of Tokyo",
    ),
    "landmark": (
        "the Eiffel Tower", "Big Ben", "the Statue of Liberty", "the Taj Mahal", "the Colosseum",
        "the Louvre", "the Golden Gate Bridge", "the Space Needle",
    ),
    "product": (
        "the iPhone", "Windows 95", "the Boeing 747", "the PlayStation 2", "the Toyota Corolla",
        "Gmail",
    ),
    "work": (
        "Hamlet", "The Godfather", "Pride and Prejudice", "Star Wars", "Don Quixote", "Titanic",
    ),
    "series": ("The Simpsons", "Friends", "Sesame Street", "Doctor Who", "Breaking Bad"),
    "language": (
        "English", "Spanish", "French", "German", "Japanese", "Arabic", "Russian", "Hindi",
    ),
    "team": (
        "Real Madrid", "the Chicago Bulls", "Manchester United", "the New York Yankees",
        "FC Barcelona",
    ),
    "animal": ("the elephant", "the dog", "the eagle", "the horse", "the shark"),
}  # fmt: skip
"""Well-known subjects by kind; the first ones are asked first."""

CARRIER = "We have read a lot about {}"
"""Where the model meets a name whose kind is looked for; it ends with the name."""
EXAMPLES = 4
"""Names of each kind that an unknown name is compared with."""


def other_subjects(
    model: Model, request: Request, limit: int, *, but: Collection[str] = ()
) -> list[str]:
    """Return up to `limit` other subjects of the same kind, to ask the request's prompt about.

    The kind is that of a list which has the subject: well-known names, or the world of the
    embedded models. For other subjects it is the kind whose names the base represents most alike.
    Call it with every edit off.

    Args:
        model: the model.
        request: whose subject and prompt.
        limit: how many.
        but: further names to leave out: subjects of other edits.
    """
    named = _listed(request.subject)
    if not named and model.task == "causal":
        named = SUBJECTS[_kind_by_likeness(model, request.subject)]
    taken = {_key(name) for name in (request.subject, request.target_new, *but)}
    text = request.prompt.replace("{}", " ")
    found = [
        name for name in named if _key(name) not in taken and not contained_match(text, [name])
    ]
    return found[:limit]


def _listed(subject: str) -> Sequence[str]:
    """Return the names of the list that the subject stands in; none if it is in none."""
    from errata.zoo.atlas.world import make_world

    wanted = _key(subject)
    for names in SUBJECTS.values():
        if wanted in map(_key, names):
            return names
    world = make_world()
    kind = world.kind_of.get(subject.strip())
    if kind is None:
        return ()
    members = world.entities[kind]
    place = members.index(subject.strip())
    return (*members[place + 1 :], *members[:place])


def _key(name: str) -> str:
    return normalise(name).removeprefix("the ")


def _kind_by_likeness(model: Model, subject: str) -> str:
    """Return the kind whose names the base represents most like this subject.

    Compared are states of the names' last tokens, two thirds of the way up, where small models
    tell kinds apart best; the mean over all names is taken away first, since it drowns the rest.
    """
    examples = [(kind, name) for kind, names in SUBJECTS.items() for name in names[:EXAMPLES]]
    digest = hashlib.sha256(json.dumps([CARRIER, examples]).encode()).hexdigest()[:16]

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"states": _states(model, [name for _, name in examples])}, {}

    known = model.of_base("subject_kinds", digest, compute=compute, as_it_stands=False)[0]["states"]
    mean = known.mean(0)
    alike = torch.cosine_similarity(known - mean, _states(model, [subject]) - mean, dim=-1)
    scores: dict[str, float] = {}
    for (kind, _), score in zip(examples, alike.tolist(), strict=True):
        scores[kind] = scores.get(kind, 0.0) + score
    return max(scores, key=scores.__getitem__)


def _states(model: Model, names: Sequence[str]) -> Tensor:
    """Return (N, d) states of the names' last tokens, in float32 on the CPU."""
    block = model.anatomy.block(2 * model.anatomy.n_layers // 3)
    texts = [CARRIER.replace("{}", name) for name in names]
    batch = encode(model.tokenizer, texts, device=model.device)
    with torch.no_grad(), trace(model.module, block, stop=True) as seen:
        model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    output = seen[block].output
    assert output is not None
    rows = torch.arange(len(names), device=output.device)
    last = torch.tensor(batch.lengths, device=output.device) - 1
    return output[rows, last].float().cpu()
