"""The `easyedit` protocol: the token-level, teacher-forced numbers of the EasyEdit library.

Each value is a share of tokens with the gold tokens before them, not a share of right answers: it
is here so that published numbers can be compared with, beside what `generation` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.protocols.counterfact import fluency

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.edits.request import Request
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "easyedit"
RIGHT = "token-level, teacher-forced: share of target tokens that are the most probable"
KEPT = (
    "token-level, teacher-forced: share of the answer's places with the same most probable token "
    "as in the unedited model"
)


def measure(reader: Reader) -> list[Measurement]:
    """Return rewrite, rephrase, portability and locality accuracy by type, and fluency."""
    requests = reader.requests
    measured: list[Measurement] = []
    for metric, asked in (
        ("rewrite_acc", [_first(q) for q in questions.of_requests(requests)]),
        ("rephrase_acc", [_first(q) for q in questions.of_paraphrases(requests)]),
        *_by_type("portability", questions.of_portability(requests)),
    ):
        shares = token_accuracy(reader, [[question] for question in asked])
        values = ((q.request, share) for q, share in zip(asked, shares, strict=True))
        if asked:
            measured.append(reader.mean(metric, values, f"{NAME}: {RIGHT}"))
    neighbours = [
        questions.Question(q.request, q.prompt, q.answers, q.type or "neighbourhood")
        for q in questions.of_neighbourhood(requests)
    ]
    for metric, asked in _by_type("locality", [*neighbours, *questions.of_locality(requests)]):
        kept = tokens_kept(reader, asked)
        if kept:
            values = ((q.request, share) for q, share in zip(asked, kept, strict=True))
            measured.append(reader.mean(metric, values, f"{NAME}: {KEPT}"))
    return [*measured, *fluency(reader, NAME, "fluency", rewrite_prompt)]


def token_accuracy(reader: Reader, asked: Sequence[Sequence[Question]]) -> list[float]:
    """Return, per question, the share of right tokens of its best answer in its best phrasing."""
    pairs = [reader.pair(q.request, q.prompt, a) for ps in asked for q in ps for a in q.answers]
    scores = iter(reader.scores(pairs))
    return [max([_share(next(scores).greedy) for q in ps for _ in q.answers]) for ps in asked]


def tokens_kept(reader: Reader, asked: Sequence[Question]) -> list[float]:
    """Return, per question, the share of its first answer's places that the edit left alone.

    [] for the base, which nothing is compared with.
    """
    if reader.base is None:
        return []
    pairs = [reader.pair(q.request, q.prompt, q.answers[0]) for q in asked]
    return [
        _share([a == b for a, b in zip(after.predicted, before.predicted, strict=True)])
        for after, before in zip(reader.scores(pairs), reader.base.scores(pairs), strict=True)
    ]


def rewrite_prompt(request: Request) -> Sequence[str]:
    """Return the prompt of a request, as what to generate from."""
    return (request.text,)


def _by_type(stem: str, asked: Sequence[Question]) -> list[tuple[str, list[Question]]]:
    """Return (metric, its questions) for each type, with their first answer only."""
    found: dict[str, list[Question]] = {}
    for question in asked:
        if question.answers:
            name = f"{stem}.{question.type}_acc" if question.type else f"{stem}_acc"
            found.setdefault(name, []).append(_first(question))
    return sorted(found.items())


def _first(question: Question) -> Question:
    """Return a question with its first answer alone, which is the one that EasyEdit reads."""
    first = question.answers[:1]
    return questions.Question(question.request, question.prompt, first, question.type)


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


PROTOCOL = Protocol(
    NAME,
    "token-level, teacher-forced accuracy of rewrite, rephrase and portability; share of tokens "
    "unchanged on locality; fluency. A share of tokens, not of right answers",
    "Wang et al. 2024, EasyEdit: An Easy-to-use Knowledge Editing Framework for LLMs; its "
    "compute_edit_quality",
    measure,
)
