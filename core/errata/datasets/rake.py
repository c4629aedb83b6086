"""RaKE (Wei et al. 2023): the same edits, seen from the relation's side.

The authors describe how they built it from CounterFact, but their file can be had nowhere. Here it
is built the same way; a file in the authors' schema is read as it is.

An edit (s, r, o → o*) also says which relation joins s to which object: it *adds* r between s and
o*, and *deletes* r between s and o. The same change can so be asked for by two atomic operations
on the relation. Beyond the paper (which leaves it as future work) each case has prompts for the
*specificity* of that: other pairs of r must stay joined by r, and s to its other objects by what
joins them.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from errata.datasets import counterfact
from errata.datasets.pararel import folder as pararel_folder
from errata.datasets.reader import Item, parsed
from errata.datasets.record import Record
from errata.datasets.relations import NAMES
from errata.datasets.source import Source, open_source
from errata.edits.request import OPERATIONS, Operation, Probe, RelationView, Request
from errata.errors import ConfigError, DatasetError, RequestError

PROMPT = "The relation between {} and [object] is"
PARAPHRASES = (
    "The relationship that links {} to [object] is",
    "{} and [object] are connected by the relation",
    "The link from {} to [object] is called",
    "What relates {} to [object] is",
    "The relation that holds between {} and [object] is",
    "{} stands to [object] in the relation",
)
"""Ours, for every relation; ParaRel's wordings of a relation come to them."""
SAME_RELATION, SAME_PAIR = "same_relation", "same_pair"
PAIRS = 500
"""How many pairs of each relation are remembered to choose other pairs from."""
SPARE = 10
NOTHING = "None"
"""What the authors' code has a model say of a pair that no relation joins."""


def read(
    source: Source, pararel: str | None = None, specificity: int = 5, seed: int = 0
) -> Iterator[Item]:
    """Yield the cases of a CounterFact file with their relation view, or the authors' own file.

    Args:
        source: the file; it is read once more beforehand, for the pairs.
        pararel: folder of ParaRel, whose facts are further pairs.
        specificity: prompts of each type, at most.
        seed: of their choice.
    """
    if specificity < 0:
        raise ConfigError(f"specificity is {specificity}; it must be 0 or more.")
    facts = Facts.collect(source, pararel)
    for record in source.records():
        yield from parsed(record, parse, facts=facts, specificity=specificity, seed=seed)


def parse(record: Record, facts: Facts, specificity: int, seed: int) -> Request:
    """Return a case with both views."""
    request = counterfact.parse(record)
    published = record.texts("requested_rewrite.relation.strs")
    rng = random.Random(f"{seed}:{record.index}")
    if published:
        view = RelationView(
            names=published,
            add=_template(record, "requested_rewrite.add_rel_prompt", request.subject),
            remove=_template(record, "requested_rewrite.rm_rel_prompt", request.subject),
            paraphrases=record.texts("rel_prompts"),
            specificity=facts.specificity(request, published, specificity, rng),
        )
    else:
        view = _built(record, request, facts, specificity, rng)
    return request.model_copy(update={"relation_view": view})


def relation_requests(
    request: Request, operations: Sequence[Operation] = OPERATIONS
) -> list[Request]:
    """Return what asks for the change on the relation's side, with these operations.

    Adding: P(r | s, o*) up after "The relation between s and o* is". Deleting: P(r | s, o) down
    after "The relation between s and o is". With "both" it is one request with one objective, else
    one for each, which share the case's id and are made together. Their probes ask for the other
    side: that s now has o* (portability, "entity_view"), that the neighbourhood and the other
    relations stay (locality).

    Raises:
        RequestError: the request has no relation view.
    """
    view = request.relation_view
    if view is None:
        raise RequestError(
            f"The request {request.text!r} has no relation view: load it with the dataset 'rake', "
            "or give relation_view."
        )
    name, *others = view.names
    true = (request.target_true,) if request.target_true else ()
    kept = tuple(
        Probe(prompt=probe.prompt, answers=probe.answers or true, type="neighbourhood")
        for probe in request.neighbourhood
    )
    answers = (request.target_new, *request.aliases)
    common: dict[str, Any] = {
        "subject": request.subject,
        "relation": request.relation,
        "kind": "relation",
        "case_id": request.case_id or request.digest[:12],
        "locality": (*view.specificity, *kept),
        "join": request.join,
        "chat": request.chat,
    }
    add: dict[str, Any] = {
        **common,
        "operation": "add",
        "prompt": view.add,
        "target_new": name,
        "target_true": NOTHING,
        "aliases": tuple(others),
        "paraphrases": view.paraphrases,
        "portability": tuple(
            Probe(prompt=prompt, answers=answers, type="entity_view")
            for prompt in (request.text, *request.paraphrases)
        ),
        "generation": request.generation,
    }
    if "both" in operations:
        return [Request(**{**add, "operation": "both", "remove": view.remove})]
    delete = Request(
        **common,
        operation="delete",
        prompt=view.remove,
        target_true=name,
        paraphrases=view.remove_paraphrases,
    )
    return [Request(**add) if operation == "add" else delete for operation in operations]


def prompts(template: str, target: str) -> str:
    """Return a template for a pair with this object; {} stays for the subject."""
    return template.replace("[object]", target)


class Facts:
    """True pairs of every relation, to choose from; at most `PAIRS` of each, drawn evenly."""

    def __init__(self) -> None:
        self.pairs: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        self.of_subject: defaultdict[str, dict[tuple[str, str], None]] = defaultdict(dict)
        self.wordings: dict[str, tuple[str, ...]] = {}
        self._seen: defaultdict[str, int] = defaultdict(int)
        self._rng = random.Random(0)

    @classmethod
    def collect(cls, source: Source, folder: str | None) -> Facts:
        """Return the true facts of a CounterFact file, and of ParaRel where it is given."""
        facts = cls()
        for record in source.records():
            request = parsed(record, counterfact.parse)[0]
            if isinstance(request, Request) and request.relation and request.target_true:
                facts.add(request.relation, request.subject, request.target_true)
        if folder is not None:
            found = pararel_folder(open_source(Path(folder)))
            for path in found.facts:
                facts.wordings[path.stem] = asked_for(found.wordings(path.stem), path.stem)
                bad: list[Item] = []
                for subject, target in found.relation(path.stem, bad).facts:
                    facts.add(path.stem, subject, target)
        return facts

    def add(self, relation: str, subject: str, target: str) -> None:
        """Take note of one fact."""
        self.of_subject[subject][(relation, target)] = None
        self._seen[relation] += 1
        pairs = self.pairs[relation]
        if len(pairs) < PAIRS:
            pairs.append((subject, target))
        elif (slot := self._rng.randrange(self._seen[relation])) < PAIRS:
            pairs[slot] = (subject, target)

    def joined_by(self, subject: str, target: str, names: Sequence[str] = ()) -> tuple[str, ...]:
        """Return every name of every relation that is known to join a pair."""
        known = [r for r, other in self.of_subject.get(subject, ()) if other == target]
        return tuple(dict.fromkeys([*names, *(n for r in known for n in NAMES.get(r, ()))]))

    def specificity(
        self, request: Request, names: Sequence[str], count: int, rng: random.Random
    ) -> tuple[Probe, ...]:
        """Return prompts whose relation must stay: other pairs of r, other objects of s."""
        pairs = self.pairs.get(request.relation or "", [])
        # A few more than needed are drawn: some may be about the subject itself, or drawn twice.
        drawn = dict.fromkeys(rng.sample(pairs, min(count + SPARE, len(pairs))))
        others = [pair for pair in drawn if pair[0] != request.subject][:count]
        changed = {request.target_new, request.target_true}
        own = sorted(
            {
                target
                for relation, target in self.of_subject.get(request.subject, ())
                if relation != request.relation and relation in NAMES and target not in changed
            }
        )
        return (
            *(self._probe(subject, target, names, SAME_RELATION) for subject, target in others),
            *(
                self._probe(request.subject, target, (), SAME_PAIR)
                for target in rng.sample(own, min(count, len(own)))
            ),
        )

    def _probe(self, subject: str, target: str, names: Sequence[str], kind: str) -> Probe:
        prompt = prompts(PROMPT, target).replace("{}", subject)
        return Probe(prompt=prompt, answers=self.joined_by(subject, target, names), type=kind)


def _built(
    record: Record, request: Request, facts: Facts, specificity: int, rng: random.Random
) -> RelationView:
    """Return the view of a CounterFact case, which has none of its own."""
    if request.relation is None:
        raise record.bad("relation_id", "missing: without it the relation has no name")
    if request.relation not in NAMES:
        raise record.bad(
            "relation_id", f"{request.relation!r} has no name here; known are {', '.join(NAMES)}"
        )
    if request.target_true is None:
        raise record.bad("target_true", "missing: without it there is no pair to delete")
    names = NAMES[request.relation]
    new, true = request.target_new, request.target_true
    phrased = (*PARAPHRASES, *facts.wordings.get(request.relation, ()))
    return RelationView(
        names=names,
        add=prompts(PROMPT, new),
        remove=prompts(PROMPT, true),
        paraphrases=_filled(phrased, new, request.subject),
        remove_paraphrases=_filled(phrased, true, request.subject),
        specificity=facts.specificity(request, names, specificity, rng),
    )


def asked_for(wordings: Sequence[str], relation: str) -> tuple[str, ...]:
    """Return ParaRel's wordings that end with a relation's name, as prompts that ask for it.

    >>> asked_for(["[Y] is [X]'s native language.", "[X] spoke [Y]."], "P103")
    ("[object] is {}'s",)
    """
    found = []
    for wording in wordings:
        said = wording.rstrip(" .").removesuffix(f" {NAMES.get(relation, ('',))[0]}")
        if said != wording.rstrip(" .") and said.count("[X]") == said.count("[Y]") == 1:
            found.append(said.replace("[X]", "{}").replace("[Y]", "[object]"))
    return tuple(dict.fromkeys(found))


def _filled(templates: Sequence[str], target: str, subject: str) -> tuple[str, ...]:
    return tuple(prompts(t, target).replace("{}", subject) for t in templates)


def _template(record: Record, field: str, subject: str) -> str:
    """Return a relation prompt of the authors' file as a template."""
    if record.text(field).count("{}") == 1:
        return record.text(field)
    try:
        return record.place(field, subject)[0]
    except DatasetError:
        raise record.bad(field, "has no place {} for the subject") from None
