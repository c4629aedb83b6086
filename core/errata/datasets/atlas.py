"""`atlas`: a benchmark for editing the models of the zoo, in CounterFact's schema.

Its subjects, facts and phrasings come from the invented world that the zoo models were trained on
(`errata.zoo.atlas.world`, seed 0), so that every case is known to the model before it is edited.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from errata.common.storage import file_sha256
from errata.datasets.reader import Item
from errata.datasets.record import Record
from errata.datasets.source import Source
from errata.errors import ConfigError

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from errata.edits.request import Probe, RelationView, Request

KINDS = ("modify", "erase")


class Shipped(Source):
    """The file that comes with errata."""

    def __init__(self) -> None:
        super().__init__("atlas", None)

    def _records(self) -> Iterator[Record]:
        for index, case in enumerate(cases()):
            yield Record(case, self.name, index)

    def digest(self) -> str:
        """Return the SHA-256 of the file's bytes."""
        with resources.as_file(_file()) as path:
            return file_sha256(Path(path))


def cases() -> list[dict[str, Any]]:
    """Return the shipped cases as they are stored.

    The keys of CounterFact (`case_id`, `requested_rewrite`, `paraphrase_prompts`,
    `neighborhood_prompts`, `attribute_prompts`, `generation_prompts`), and `same_subject_prompts`,
    `portability_prompts` and `relation_prompts`: see `errata.zoo.atlas.benchmark`.
    """
    loaded: list[dict[str, Any]] = json.loads(_file().read_text(encoding="utf-8"))
    return loaded


def requests(n: int | None = None, *, kind: Literal["modify", "erase"] = "modify") -> list[Request]:
    """Return the first `n` cases (all by default) as requests.

    `kind="erase"` asks to forget instead: the relations that the world has unknown values for,
    with "unknown" as what is to be said instead.

    >>> requests(1)[0].kind
    'modify'
    """
    if n is not None and n < 0:
        raise ValueError(f"n is {n}; it must be 0 or more, or None for all cases")
    return list(itertools.islice(_each(kind), n))


def _each(kind: Literal["modify", "erase"]) -> Iterator[Request]:
    for case in cases():
        if kind == "modify" or case["requested_rewrite"]["relation_id"] in ERASABLE:
            yield to_request(case, kind)


def read(source: Source, kind: str = "modify") -> Iterator[Item]:
    """Yield the cases as requests, to change or to erase."""
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    del source
    yield from _each(kind)  # type: ignore[arg-type]  # checked above


ERASABLE = ("profession", "instrument", "sport", "learns", "collects", "colour")
"""Relations with subjects whose value is "unknown", so that the models know such sentences."""


def to_request(case: dict[str, Any], kind: Literal["modify", "erase"] = "modify") -> Request:
    """Turn one case into a request."""
    from errata.edits.request import Probe, Request
    from errata.zoo.atlas.relations import UNKNOWN

    rewrite = case["requested_rewrite"]
    true = rewrite["target_true"]["str"]
    modify = kind == "modify"
    return Request(
        prompt=rewrite["prompt"],
        subject=rewrite["subject"],
        target_new=rewrite["target_new"]["str"] if modify else UNKNOWN,
        target_true=true,
        relation=rewrite["relation_id"],
        kind=kind,
        case_id=str(case["case_id"]),
        paraphrases=tuple(case["paraphrase_prompts"]),
        neighbourhood=tuple(
            Probe(prompt=prompt, answers=(true,)) for prompt in case["neighborhood_prompts"]
        ),
        locality=tuple(
            Probe(prompt=probe["prompt"], answers=(probe["answer"],), type="relation_specificity")
            for probe in case["same_subject_prompts"]
        ),
        portability=tuple(
            Probe(prompt=probe["prompt"], answers=(probe["answer_new"],), type="two_hop")
            for probe in (case["portability_prompts"] if modify else ())
        ),
        generation=tuple(case["generation_prompts"]),
        attribute=tuple(
            Probe(prompt=prompt, answers=(rewrite["target_new"]["str"],))
            for prompt in (case["attribute_prompts"] if modify else ())
        ),
        relation_view=_relation_view(case) if modify else None,
    )


def _file() -> Traversable:
    return resources.files("errata.datasets") / "data" / "atlas.json"


def _relation_view(case: dict[str, Any]) -> RelationView:
    """Return the case's relation prompts, and what of the relations around it must stay.

    The neighbours' pairs stay joined by this relation, and the subject to its other values by
    whatever joins them, which may be several relations at once.
    """
    from errata.edits.request import Probe, RelationView
    from errata.zoo.atlas.relations import RELATION_PROMPTS, UNKNOWN, relation_by_id

    rewrite = case["requested_rewrite"]
    subject, template = rewrite["subject"], rewrite["prompt"]
    new, true = rewrite["target_new"]["str"], rewrite["target_true"]["str"]
    prompts: dict[str, list[str]] = {}
    for prompt in case["relation_prompts"]:
        prompts.setdefault(prompt["object"], []).append(prompt["prompt"])
    (add, *adding), (remove, *removing) = prompts[new], prompts[true]
    name = case["relation_prompts"][0]["answer"]
    before, after = template.split("{}")
    neighbours = [
        prompt[len(before) : len(prompt) - len(after)]
        for prompt in case["neighborhood_prompts"]
        if prompt.startswith(before) and prompt.endswith(after)
    ]
    joined: dict[str, list[str]] = {}
    for probe in case["same_subject_prompts"]:
        names = joined.setdefault(probe["answer"], [])
        names.append(relation_by_id(probe["relation_id"]).name)

    def asked(who: str, value: str, names: tuple[str, ...], kind: str) -> Probe:
        prompt = RELATION_PROMPTS[0].replace("{}", who).replace("{object}", value)
        return Probe(prompt=prompt, answers=names, type=kind)

    return RelationView(
        names=(name,),
        add=add.replace(subject, "{}", 1),
        remove=remove.replace(subject, "{}", 1),
        paraphrases=tuple(adding),
        remove_paraphrases=tuple(removing),
        specificity=(
            *(asked(other, true, (name,), "same_relation") for other in neighbours),
            *(
                asked(subject, value, tuple(names), "same_pair")
                for value, names in joined.items()
                if value not in (UNKNOWN, true, new)
            ),
        ),
    )
