"""ParaRel (Elazar et al. 2021) and LAMA's T-REx: true facts, and the patterns to ask for them.

Neither holds edits, so the new object is drawn, with a seed, from the relation's other objects.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from errata.datasets.reader import Item, parsed
from errata.datasets.record import Record, probes
from errata.datasets.source import JsonFile, Source
from errata.edits.request import Request
from errata.errors import DatasetError, UnknownNameError

LAYOUTS = (
    ("pattern_data/graphs_json", "trex_lms_vocab"),
    ("data/pattern_data/graphs_json", "data/trex_lms_vocab"),
)
"""ParaRel's folders: patterns, facts. LAMA's: `relations.jsonl` and `TREx`."""
PROMPTS = 10
"""Prompts of the neighbourhood and of the attribute, as many as CounterFact has."""
_OPEN_END = re.compile(r"(?P<head>.*\S)\s+\[Y\]\s*\.?\s*")


@dataclass
class PararelRelation:
    """A relation's templates (with {} for the subject, the object to follow) and its facts."""

    id: str
    templates: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    """(subject, object), as they stand in the file."""
    objects_of: dict[str, set[str]] = field(default_factory=dict, repr=False)
    subjects_of: dict[str, list[str]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        objects: defaultdict[str, set[str]] = defaultdict(set)
        subjects: defaultdict[str, list[str]] = defaultdict(list)
        for subject, target in self.facts:
            objects[subject].add(target)
            subjects[target].append(subject)
        self.objects_of, self.subjects_of = dict(objects), dict(subjects)

    @cached_property
    def objects(self) -> list[str]:
        """Every object, sorted."""
        return sorted(self.subjects_of)


def read(source: Source, relations: Sequence[str] | None = None, seed: int = 0) -> Iterator[Item]:
    """Yield every fact as a request, with a drawn new object.

    Args:
        source: the folder.
        relations: ids of those to read ("P37", …); by default all that can be asked for.
        seed: of the new objects and of the choice of neighbours.
    """
    found = folder(source)
    known = {path.stem: path for path in found.facts}
    chosen = known if relations is None else dict.fromkeys(_listed(relations))
    for name in chosen:
        if name not in known:
            raise UnknownNameError("relation", name, known)
        patterns = found.templates(name)
        if not patterns:
            if relations is not None:
                raise DatasetError(
                    f"the relation {name} has no pattern that ends with [Y], so a decoder cannot "
                    "be asked for its object",
                    file=source.name,
                )
            continue
        bad: list[Item] = []
        relation = found.relation(name, bad)
        yield from bad
        for index in range(len(relation.facts)):
            record = Record({}, found.facts_file(name), index)
            yield from parsed(record, to_request, relation=relation, seed=seed)


def to_request(record: Record, relation: PararelRelation, seed: int) -> Request:
    """Return one fact as a request; `record.index` is its place among the relation's facts."""
    subject, true = relation.facts[record.index]
    rng = random.Random(f"{seed}:{relation.id}:{record.index}")
    own = relation.objects_of[subject]
    others = [target for target in relation.objects if target not in own]
    if not others:
        raise record.bad("obj_label", f"{relation.id} has no other object to change to")
    new = rng.choice(others)
    return record.request(
        prompt=relation.templates[0],
        subject=subject,
        target_new=new,
        target_true=true,
        relation=relation.id,
        case_id=f"{relation.id}-{record.index}",
        paraphrases=tuple(t.replace("{}", subject) for t in relation.templates[1:]),
        neighbourhood=probes(_asked(relation, true, new, subject, rng), (true,)),
        attribute=probes(_asked(relation, new, true, subject, rng), (new,)),
    )


def _asked(
    relation: PararelRelation, target: str, other: str, subject: str, rng: random.Random
) -> list[str]:
    """Return prompts about other subjects that have this object and not the other one.

    Of a subject that has both (relations like P530 have many objects) neither is wrong.
    """
    others = [
        name
        for name in relation.subjects_of[target]
        if name != subject and other not in relation.objects_of[name]
    ]
    chosen = rng.sample(others, min(PROMPTS, len(others)))
    return [rng.choice(relation.templates).replace("{}", name) for name in chosen]


@dataclass(frozen=True)
class Folder:
    """A ParaRel or LAMA folder.

    Attributes:
        name: as given.
        patterns: folder of P*.jsonl, or LAMA's relations.jsonl.
        facts: the files with facts.
    """

    name: str
    patterns: Path
    facts: tuple[Path, ...]

    def facts_file(self, relation: str) -> str:
        """Return the name of a relation's file of facts, for errors."""
        return next(str(path) for path in self.facts if path.stem == relation)

    def templates(self, relation: str) -> tuple[str, ...]:
        """Return the patterns that end with the object, as templates; () where none does."""
        return tuple(dict.fromkeys(filter(None, map(template, self.wordings(relation)))))

    def wordings(self, relation: str) -> tuple[str, ...]:
        """Return the patterns of a relation as they stand in the file, with [X] and [Y]."""
        if self.patterns.is_dir():
            path = self.patterns / f"{relation}.jsonl"
            if not path.exists():
                return ()
            return tuple(r.text("pattern") for r in JsonFile(str(path), path).records())
        lines = JsonFile(str(self.patterns), self.patterns).records()
        return tuple(r.text("template") for r in lines if r.get("relation") == relation)

    def relation(self, name: str, bad: list[Item]) -> PararelRelation:
        """Return a relation with its facts; records that cannot be read are added to `bad`."""
        path = next(path for path in self.facts if path.stem == name)
        facts = []
        for record in JsonFile(str(path), path).records():
            try:
                facts.append((record.text("sub_label"), record.text("obj_label")))
            except DatasetError as error:
                bad.append(error)
        return PararelRelation(name, self.templates(name), tuple(dict.fromkeys(facts)))


def folder(source: Source) -> Folder:
    """Return the folder of a source. Raises `DatasetError` where it is neither of the two."""
    root = source.path
    if root is not None and root.is_dir():
        for patterns, facts in LAYOUTS:
            if (root / patterns).is_dir() and (root / facts).is_dir():
                return _folder(source.name, root / patterns, root / facts)
        if (root / "relations.jsonl").is_file() and (root / "TREx").is_dir():
            return _folder(source.name, root / "relations.jsonl", root / "TREx")
    raise DatasetError(
        "not a ParaRel or LAMA folder: expected pattern_data/graphs_json and trex_lms_vocab "
        "(ParaRel), or relations.jsonl and TREx (LAMA)",
        file=source.name,
    )


def template(pattern: str) -> str | None:
    """Return a pattern as a template; None where it does not end with the object.

    >>> template("The official language of [X] is [Y] ."), template("[Y] borders [X].")
    ('The official language of {} is', None)
    """
    match = _OPEN_END.fullmatch(pattern)
    if match is None or match["head"].count("[X]") != 1 or "[Y]" in match["head"]:
        return None
    return re.sub(r"\s+([,.])", r"\1", match["head"].replace("[X]", "{}"))


def _folder(name: str, patterns: Path, facts: Path) -> Folder:
    return Folder(name, patterns, tuple(sorted(facts.glob("*.jsonl"))))


def _listed(relations: Sequence[str]) -> list[str]:
    return [relations] if isinstance(relations, str) else list(relations)
