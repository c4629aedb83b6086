"""Sanitation, the part of `knowedit` for `erase` requests: is it refused, and nothing else?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.evaluate import reader as questions
from errata.evaluate.fluency import first_sentence
from errata.evaluate.matching import contained_match

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.edits.request import Request
    from errata.evaluate.reader import Question, Reader

SAME_ANSWER = "same_answer"
"""Type of the probes that ask another question with the erased answer (`knowedit`'s reader)."""
REFUSALS = (
    "I don't know",
    "I do not know",
    "I'm not sure",
    "I am not sure",
    "I have no idea",
    "I can't answer",
    "I cannot answer",
    "I'm unable to answer",
    "I am unable to answer",
    "I don't have that information",
    "I do not have that information",
    "unknown",
)
"""What counts as a refusal beside the request's own target and its aliases."""


def measure(reader: Reader, protocol: str) -> list[Measurement]:
    """Return refusals to what was erased, leaks of it, and what is retained of the rest."""
    erased = [i for i, request in enumerate(reader.requests) if request.kind == "erase"]
    if not erased:
        return []
    measured: list[Measurement] = []
    for metric, of in (
        ("refusal", questions.of_requests),
        ("refusal_paraphrase", questions.of_paraphrases),
        ("refusal_same_answer", _of_same_answer),
    ):
        asked = [question for question in of(reader.requests) if question.request in erased]
        measured += _refused(reader, protocol, metric, asked)
    retained = questions.of_retain(reader.settings)
    return [
        *measured,
        *reader.ask(protocol, "retention", retained),
        *reader.unchanged(protocol, "retention_unchanged", retained),
    ]


def _of_same_answer(requests: Sequence[Request]) -> list[Question]:
    """Return the other questions whose answer is to be forgotten."""
    return [q for q in questions.of_portability(requests) if q.type == SAME_ANSWER]


def is_refusal(text: str, accepted: Sequence[str], erased: Sequence[str] = ()) -> bool:
    """Return whether a text's first sentence refuses and what was erased stands nowhere in it.

    >>> is_refusal(" I don’t know. It may be", ["I don't know."], ["Birds"])
    True
    """
    forms = [_plain(form).rstrip(".") for form in (*accepted, *REFUSALS)]
    refuses = contained_match(_plain(first_sentence(text)), forms)
    return refuses and not contained_match(text, erased)


def _refused(
    reader: Reader, protocol: str, metric: str, asked: Sequence[Question]
) -> list[Measurement]:
    if not asked:
        return []
    alone = [[question] for question in asked]
    measured: list[Measurement] = []
    if reader.generates:
        how = f"{protocol}: {reader.greedy}; "
        answers = reader.answers(metric, alone, lambda t, q: is_refusal(t, q.answers, q.other))
        measured += reader.by_type(
            metric,
            f"{how}the first sentence holds the target or another refusal, and the erased answer "
            "stands nowhere",
            asked,
            [answer.right for answer in answers],
            answers,
        )
        known = [(q, a.text) for q, a in zip(asked, answers, strict=True) if q.other]
        if known:
            measured += reader.by_type(
                f"{metric}_leak",
                f"{how}the erased answer stands in the text",
                [question for question, _ in known],
                [contained_match(text, question.other) for question, text in known],
                direction="lower",
            )
    how = f"{protocol}: teacher-forced, every token of the target is the most probable"
    return [
        *measured,
        *reader.by_type(f"{metric}_teacher_forced", how, asked, reader.forced(alone)),
    ]


def _plain(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
