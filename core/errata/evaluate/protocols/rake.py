"""The `rake` protocol: one change measured from both sides, the entity's and the relation's.

An edit (s, r, o → o*) should also make r the relation of s and o*, and no longer that of s and o.
Entity view: `counterfact`'s numbers under E-. Relation view: the relation's name for the pair that
it was added to against the pair that it was taken from; and, as the authors' code has it, against
"None".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.matching import NORMALISATION, contained_match
from errata.evaluate.pooling import harmonic_mean
from errata.evaluate.protocols.counterfact import Contest, contests, entity_view

if TYPE_CHECKING:
    from collections.abc import Iterator

    from errata.contract.measurement import Measurement
    from errata.edits.request import RelationView
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "rake"
NONE = "None"
"""What the authors' code names the absence of a relation."""
HOW = "mean-token log-probability of the relation, s and o* vs s and o, teacher-forced"
HOW_NONE = f'mean-token log-probability, relation vs "{NONE}", teacher-forced'


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
    pairs = [
        (i, view, view.add.replace("{}", subject[i]), view.remove.replace("{}", subject[i]))
        for i, view in views
    ]
    none = (NONE,)
    both = [Contest(i, add, v.names[:1], v.names[:1], against=take) for i, v, add, take in pairs]
    phrased = [
        Contest(i, add, view.names[:1], view.names[:1], against=take)
        for i, view in views
        for add, take in zip(view.paraphrases, view.remove_paraphrases, strict=False)
    ]
    adds = [Contest(i, add, v.names[:1], none) for i, v, add, _ in pairs]
    more = [Contest(i, p, v.names[:1], none) for i, v in views for p in v.paraphrases]
    takes = [Contest(i, take, none, v.names[:1]) for i, v, _, take in pairs]
    less = [Contest(i, p, none, v.names[:1]) for i, v in views for p in v.remove_paraphrases]
    keeps = [
        Contest(i, probe.prompt, probe.answers, rivals(probe.answers, view), probe.type)
        for i, view in views
        for probe in view.specificity
        if probe.answers
    ]
    apart = ("P(relation | s, o*)", "P(relation | s, o)")
    ahead = ("P(relation)", f'P("{NONE}")')
    measured: list[Measurement] = []
    for (success, magnitude), asked, how, what, sides in (
        (("R-ES", "R-EM"), both, HOW, "prompts with the new and the old object", apart),
        (("R-PS", "R-PM"), phrased, HOW, "their paraphrases", apart),
        (("R-ES-None", "R-EM-None"), adds, HOW_NONE, "prompt with the new object", ahead),
        (("R-PS-None", "R-PM-None"), more, HOW_NONE, "its paraphrases", ahead),
        (("R-DS-None", "R-DM-None"), takes, HOW_NONE, "prompt with the old object", ahead[::-1]),
        (("R-DPS-None", "R-DPM-None"), less, HOW_NONE, "its paraphrases", ahead[::-1]),
        (("R-NS", "R-NM"), keeps, HOW_NONE, "other pairs and other relations",
         ("P(answer)", "P(rival)")),
    ):  # fmt: skip
        measured += contests(
            reader, (success, magnitude), asked, (f"{NAME}: {how}; {what}, ", *sides)
        )
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
    "success and magnitude from the entity's side (E-) and the relation's side (R-): the pair that "
    "r joins now against the one that it no longer joins, paraphrases, specificity; their means",
    "Wei et al. 2023, Assessing Knowledge Editing in Language Models via Relation Perspective "
    "(RaKE); removal and specificity as docs/protocols.md says",
    measure,
    needs="relation_view: the change seen from the relation's side "
    "(in a request file: docs/datasets.md)",
)
