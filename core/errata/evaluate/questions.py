"""The questions that protocols ask: one prompt each, with the answers that count as right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.edits.request import Probe, Request


@dataclass(frozen=True)
class Question:
    """One prompt, the answers that count as right, and the request it belongs to.

    Attributes:
        request: index of the request; of retained probe k it is -1 - k.
        prompt: the question.
        answers: every answer that counts as right.
        type: the benchmark's name for this sort of question.
        group: questions of one case with the same group are phrasings of one question.
        other: the fact's other answer (the old one, or the new one where the old must stay): what
            a wrong answer is compared with to say what sort of mistake it is.
        case: name of the case, for a question that belongs to no request.
    """

    request: int
    prompt: str
    answers: tuple[str, ...]
    type: str = ""
    group: str = ""
    other: tuple[str, ...] = ()
    case: str = ""


def accepting(match: Callable[[str, Sequence[str]], bool]) -> Callable[[str, Question], bool]:
    """Return whether a text matches any of a question's answers, as a rule for `Reader.answers`."""
    return lambda text, question: match(text, question.answers)


def of_requests(requests: Sequence[Request]) -> list[Question]:
    """Return the rewrite prompt of each request with its new target and aliases."""
    return [Question(i, r.text, targets(r), other=old_answers(r)) for i, r in enumerate(requests)]


def of_paraphrases(requests: Sequence[Request]) -> list[Question]:
    """Return every paraphrase with the new target and its aliases."""
    return [
        Question(i, p, targets(r), other=old_answers(r))
        for i, r in enumerate(requests)
        for p in r.paraphrases
    ]


def of_neighbourhood(requests: Sequence[Request]) -> list[Question]:
    """Return every neighbourhood prompt with its answers (default: the request's true target)."""
    return [
        of_probe(i, p, p.answers or old_answers(r), (r.target_new,))
        for i, r in enumerate(requests)
        for p in r.neighbourhood
    ]


def of_portability(requests: Sequence[Request]) -> list[Question]:
    """Return every portability probe."""
    return [
        of_probe(i, p, p.answers, old_answers(r))
        for i, r in enumerate(requests)
        for p in r.portability
    ]


def of_locality(requests: Sequence[Request]) -> list[Question]:
    """Return every locality probe."""
    return [
        of_probe(i, p, p.answers, (r.target_new,))
        for i, r in enumerate(requests)
        for p in r.locality
    ]


def of_retain(retain: Sequence[Probe]) -> list[Question]:
    """Return the dataset's probes that no edit may change; each question is a case of its own."""
    return [
        Question(-1 - i, p.prompt, p.answers, p.type, p.group, case=f"retain-{p.group or i}")
        for i, p in enumerate(retain)
    ]


def of_probe(
    request: int, probe: Probe, answers: tuple[str, ...], other: tuple[str, ...]
) -> Question:
    """Return a probe of a request as a question."""
    return Question(request, probe.prompt, answers, probe.type, probe.group, other)


def targets(request: Request) -> tuple[str, ...]:
    """Return every right form of the new target."""
    return (request.target_new, *request.aliases)


def old_answers(request: Request) -> tuple[str, ...]:
    """Return the true target, where there is one."""
    return (request.target_true,) if request.target_true else ()
