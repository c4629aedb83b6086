"""CaliNET's calibration data (Dong et al. 2022): true facts, and prompts that make them false.

Built as the authors build it: the facts are those of LAMA's T-REx (or ParaRel), the templates those
of their `cka/relations.jsonl`, one right one and up to three wrong ones for each relation
("[X] was born in [Y] .": "[X] visited [Y] ."). Only templates that end with the object can be asked
of a decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from errata.datasets.pararel import PararelRelation, folder, template
from errata.datasets.reader import Item, parsed
from errata.datasets.record import Record
from errata.datasets.source import JsonFile, Source
from errata.edits.request import Request
from errata.errors import ConfigError, DatasetError, UnknownNameError


def read(
    source: Source, templates: str | None = None, relations: Sequence[str] | None = None
) -> Iterator[Item]:
    """Yield every fact of a relation with a right and a wrong template, as an insertion of itself.

    The first fact of each relation comes first, then the second of each that has one, and so on:
    a few facts are of many relations.

    Args:
        source: the folder with facts.
        templates: the authors' file of templates.
        relations: ids of those to read; by default all that can be asked for.
    """
    if templates is None:
        raise ConfigError(
            "calibration needs templates=FILE, cka/relations.jsonl of github.com/dqxiu/CaliNet."
        )
    right, wrong = _templates(Path(templates))
    found = folder(source)
    asked = {path.stem: path for path in found.facts if path.stem in right}
    if not asked:
        raise DatasetError(
            f"its templates are of {', '.join(list(right)[:12])}, and {source.name} has facts of "
            "none of these",
            file=templates,
        )
    wanted = [relations] if isinstance(relations, str) else relations
    each = []
    for name in asked if wanted is None else dict.fromkeys(wanted):
        if name not in asked:
            raise UnknownNameError("relation", name, asked)
        bad: list[Item] = []
        each.append(found.relation(name, bad))
        yield from bad
    for index in range(max((len(relation.facts) for relation in each), default=0)):
        for relation in (one for one in each if index < len(one.facts)):
            record = Record({}, found.facts_file(relation.id), index)
            yield from parsed(
                record, to_request, relation=relation,
                right=right[relation.id], wrong=wrong[relation.id],
            )  # fmt: skip


def to_request(
    record: Record, relation: PararelRelation, right: str, wrong: Sequence[str]
) -> Request:
    """Return one fact as a request; `record.index` is its place among the relation's facts."""
    subject, target = relation.facts[record.index]
    return record.request(
        prompt=right,
        subject=subject,
        target_new=target,
        kind="insert",
        relation=relation.id,
        case_id=f"{relation.id}-{record.index}",
        paraphrases=tuple(t.replace("{}", subject) for t in relation.templates if t != right),
        counterexamples=tuple(t.replace("{}", subject) for t in wrong),
    )


def _templates(path: Path) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """Return the right template of each relation that has one, and its wrong ones."""
    if not path.is_file():
        raise DatasetError("there is no such file of templates", file=str(path))
    right: dict[str, str] = {}
    wrong: dict[str, tuple[str, ...]] = {}
    for record in JsonFile(str(path), path).records():
        name, found = record.text("relation"), template(record.text("template"))
        others = tuple(filter(None, map(template, record.texts("wrong"))))
        if found and others:
            right[name], wrong[name] = found, others
    if not right:
        raise DatasetError(
            "no relation has a right template and a wrong one that end with [Y]: fields "
            "'relation', 'template' and 'wrong'",
            file=str(path),
        )
    return right, wrong
