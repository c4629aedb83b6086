"""RippleEdits (Cohen et al. 2024): facts with the facts that ripple out from them.

The file names no subject and no object, only sentences ("The name of the mother of Leonardo
DiCaprio is Irmelin DiCaprio."). Both are cut out of the sentence by its relation's wording.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from errata.datasets.counterfact import case_id
from errata.datasets.probes import kind
from errata.datasets.reader import per_record
from errata.datasets.record import Record, probes, without
from errata.edits.request import Probe, Request

PORTABILITY = (
    "Logical_Generalization",
    "Subject_Aliasing",
    "Compositionality_I",
    "Compositionality_II",
)
LOCALITY = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")
"""The second is how the README spells the first."""

FRAMES = (
    "The name of the {noun} of {} is",
    "The {noun} of {} is",
    "The names of the {noun}s of {} are",
)
"""How most relations are worded; {noun} is the relation's id in words."""
WORDINGS = {
    "SEX_OR_GENDER": "The gender of {} is",
    "COUNTRY": "The name of the country which {} is associated with is",
    "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
    "RELIGION": "The name of the religion which {} is associated with is",
    "POSITION_HELD": "The name of the position held by {} is",
    "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
    "LEAGUE": "The name of the league which {} plays in is",
    "NUMBER_OF_CHILDREN": "The number of children {} has is",
    "AWARD_RECEIVED": "The name of the award {} won is",
    "CONTINENT": "The name of the continent which {} is part of is",
    "CAPITAL": "The name of the capital city of {} is",
    "CAPITAL_OF": "The name of the country which {} is the capital of is",
    "CURRENCY": "The name of the currency in {} is",
    "NATIVE_LANGUAGE": "The mother tongue of {} is",
    "FOLLOWS": "{} follows",
    "FOLLOWED_BY": "{} is followed by",
}
"""The others, as they read in the published prompts."""


def parse(record: Record) -> Request:
    """Return one edit with its tests.

    Left out, because a probe cannot say it: the condition queries (facts that the unedited model
    must know for a test to count), and that all of several answers are asked for (one is enough).
    """
    relation = record.text("edit.relation")
    queries = [query for field in (*PORTABILITY, *LOCALITY) for query in _queries(record, field)]
    template, subject, new = _cut(record, relation, {a for q in queries for a in _answers(q)})
    aliases = [
        alias
        for query in queries
        for answer in query.parts("answers")
        if answer.get("value") == new
        for alias in answer.answers("aliases")
    ]
    true = _target(record, template.replace("{}", subject), "edit.original_fact.prompt")
    return record.request(
        prompt=template,
        subject=subject,
        target_new=new,
        target_true=true,
        relation=relation,
        kind="insert" if true is None else "modify",
        case_id=case_id(record),
        aliases=without(aliases, new),
        portability=_probes(record, PORTABILITY, needs_answer=True),
        locality=_probes(record, LOCALITY, needs_answer=False),
    )


def _probes(record: Record, fields: tuple[str, ...], *, needs_answer: bool) -> tuple[Probe, ...]:
    """Return the tests of some types; queries of which one must be right share a group."""
    found: list[Probe] = []
    for field in fields:
        for place, test in enumerate(record.parts(field)):
            queries = list(test.parts("test_queries"))
            either = len(queries) > 1 and test.get("test_condition") != "AND"
            group = f"{kind(field)}-{place}" if either else ""
            for query in queries:
                answers = _answers(query)
                if answers or not needs_answer:
                    made = probes([query.text("prompt")], answers, kind(field))
                    found += [probe.model_copy(update={"group": group}) for probe in made]
    return tuple(found)


def _queries(record: Record, field: str) -> Iterator[Record]:
    for test in record.parts(field):
        yield from test.parts("test_queries")


def _answers(query: Record) -> tuple[str, ...]:
    """Return each answer followed by its aliases."""
    return tuple(
        dict.fromkeys(
            text
            for answer in query.parts("answers")
            for text in (*answer.answers("value"), *answer.answers("aliases"))
        )
    )


def _cut(record: Record, relation: str, known: set[str]) -> tuple[str, str, str]:
    """Return (template, subject, object) of the edit's sentence.

    Where the words between subject and object occur twice, the object is one that the tests
    know, or the subject is one that the original fact has as well.
    """
    sentence = record.text("edit.prompt")
    noun = relation.lower().replace("_", " ")
    wordings = [WORDINGS[relation]] if relation in WORDINGS else [
        frame.replace("{noun}", noun) for frame in FRAMES
    ]  # fmt: skip
    cuts = [(w, *cut) for w in wordings for cut in _cuts(w, sentence)]
    if len(cuts) > 1:
        original = record.optional_text("edit.original_fact.prompt") or ""
        subjects = {subject for w in wordings for subject, _ in _cuts(w, original)}
        by_object = [cut for cut in cuts if cut[2] in known]
        by_subject = [cut for cut in cuts if cut[1] in subjects]
        cuts = by_object or by_subject or cuts
    if len(cuts) != 1:
        raise record.bad(
            "edit.prompt",
            f"subject and object of the relation {relation} cannot be told apart in {sentence!r}"
            if cuts
            else f"{sentence!r} is not worded as the relation {relation} is known to be",
        )
    return cuts[0]


def _cuts(wording: str, sentence: str) -> Iterator[tuple[str, str]]:
    """Yield every (subject, object) that makes the sentence of the wording."""
    before, after = wording.split("{}")
    body = sentence.strip().removesuffix(".").strip()
    if not body.startswith(before):
        return
    for match in re.finditer(re.escape(f"{after} "), body):
        subject, target = body[len(before) : match.start()].strip(), body[match.end() :].strip()
        if subject and target:
            yield subject, target


def _target(record: Record, question: str, field: str) -> str | None:
    """Return the object of another sentence that asks the same question."""
    sentence = record.optional_text(field)
    if sentence is None:
        return None
    if not sentence.startswith(question):
        raise record.bad(field, f"{sentence!r} is not about the same subject as the edit")
    return sentence[len(question) :].strip().removesuffix(".").strip() or None


read = per_record(parse)
