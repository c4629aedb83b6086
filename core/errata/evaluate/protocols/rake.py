"""The `rake` protocol: one change measured from both sides, the entity's and the relation's.

An edit (s, r, o → o*) should also make r the relation of s and o*, and no longer that of s and o.
Entity view: `counterfact`'s numbers under E-. Relation view: the relation's name against "None".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import reader as questions
from errata.evaluate.matching import NORMALISATION, contained_match
from errata.evaluate.pooling import harmonic_mean
from errata.evaluate.protocols.counterfact import Contest, contests, entity_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from errata.contract.measurement import Measurement
    from errata.edits.request import RelationView
    from errata.evaluate.reader import Question, Reader

NAME = "rake"
NONE = "None"
"""What the authors' code names the absence of a relation."""
HOW = f'mean-token log-probability, relation vs "{NONE}", teacher-forced'


def measure(reader: Reader) -> list[Measurement]:
    """Return both views, their harmonic means, and the relation's specificity."""
    views = list(_views(reader))
    if not views:
        return []
    entity = entity_view(reader, NAME, "E-", "E-Score", lambda r: r.relation_view is not None)
    relation = _relation_view(reader, views)
    found = {one.metric: one for one in (*entity, *relation)}
    scores: list[Measurement] = []
    for metric, parts in (
        ("R-Score", ("R-ES", "R-PS", "R-NS")),
        ("Score", ("E-ES", "E-PS", "E-NS", "R-ES", "R-PS")),
    ):
        if all(part in found for part in parts):
            how = f"{NAME}: {HOW}; harmonic mean of {', '.join(parts)}"
            scores += harmonic_mean(metric, [found[part] for part in parts], how)
    return [*entity, *relation, *scores, *_generated(reader, views)]


def _views(reader: Reader) -> Iterator[tuple[int, RelationView]]:
    for i, request in enumerate(reader.requests):
        if request.relation_view is not None:
            yield i, request.relation_view


def _relation_view(reader: Reader, views: list[tuple[int, RelationView]]) -> list[Measurement]:
    """Return success (S) and magnitude (M) of adding, removing and leaving alone."""
    subject = {i: reader.requests[i].subject for i, _ in views}
    none = (NONE,)
    adds = [Contest(i, v.add.replace("{}", subject[i]), v.names[:1], none) for i, v in views]
    more = [Contest(i, p, v.names[:1], none) for i, v in views for p in v.paraphrases]
    takes = [Contest(i, v.remove.replace("{}", subject[i]), none, v.names[:1]) for i, v in views]
    less = [Contest(i, p, none, v.names[:1]) for i, v in views for p in v.remove_paraphrases]
    keeps = [
        Contest(i, probe.prompt, probe.answers, rivals(probe.answers, view), probe.type)
        for i, view in views
        for probe in view.specificity
        if probe.answers
    ]
    ahead = ("P(relation)", f'P("{NONE}")')
    measured: list[Measurement] = []
    for letter, asked, what, sides in (
        ("R-E", adds, "prompt with the new object", ahead),
        ("R-P", more, "its paraphrases", ahead),
        ("R-D", takes, "prompt with the old object", ahead[::-1]),
        ("R-DP", less, "its paraphrases", ahead[::-1]),
        ("R-N", keeps, "other pairs and other relations", ("P(answer)", "P(rival)")),
    ):
        how = (f"{NAME}: {HOW}; {what}, ", *sides)
        measured += contests(reader, (f"{letter}S", f"{letter}M"), asked, how)
    return measured


def rivals(answers: tuple[str, ...], view: RelationView) -> tuple[str, ...]:
    """Return what a kept answer must beat: "None", and the edited relation unless it is that."""
    same = {answer.casefold() for answer in answers} & {name.casefold() for name in view.names}
    return tuple(
        rival for rival in ((NONE,) if same else (NONE, view.names[0])) if rival not in answers
    )


def _generated(reader: Reader, views: list[tuple[int, RelationView]]) -> list[Measurement]:
    """Return what the model says, beside what it finds probable."""
    subject = {i: reader.requests[i].subject for i, _ in views}
    adds: list[Question] = []
    takes: list[Question] = []
    keeps: list[Question] = []
    for i, view in views:
        for template, asked, extra in (
            (view.add, adds, view.paraphrases),
            (view.remove, takes, view.remove_paraphrases),
        ):
            prompts = (template.replace("{}", subject[i]), *extra)
            asked += [questions.Question(i, prompt, view.names) for prompt in prompts]
        keeps += [
            questions.Question(i, p.prompt, p.answers, p.type, p.group) for p in view.specificity
        ]
    measured = reader.ask(NAME, "relation_add", adds)
    if reader.generates:
        texts = reader.texts(question.prompt for question in takes)
        gone = [not contained_match(t, q.answers) for t, q in zip(texts, takes, strict=True)]
        how = (
            f"{NAME}: {reader.greedy}; no form of the relation's name in the text ({NORMALISATION})"
        )
        measured += reader.by_type("relation_removed", how, takes, gone)
    return [
        *measured,
        *reader.ask(NAME, "relation_kept", keeps),
        *reader.unchanged(NAME, "relation_unchanged", keeps),
    ]


PROTOCOL = Protocol(
    NAME,
    "success and magnitude from the entity's side (E-) and the relation's side (R-): adding, "
    "paraphrases, removing, specificity; their harmonic means",
    "Wei et al. 2023, Assessing Knowledge Editing in Language Models via Relation Perspective "
    "(RaKE); removal and specificity as docs/protocols.md says",
    measure,
)
