"""The questions that protocols ask: one prompt each, with the answers that count as right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.edits.aims import aims_of_request, says_something

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
    """Return the rewrite prompt of each request that puts an answer there, with its forms."""
    return [
        Question(i, r.text, targets(r), other=old_answers(r))
        for i, r in enumerate(requests)
        if says_something(r)
    ]


def of_paraphrases(requests: Sequence[Request]) -> list[Question]:
    """Return every paraphrase of a request that puts an answer there, with its forms."""
    return [
        Question(i, p, targets(r), other=old_answers(r))
        for i, r in enumerate(requests)
        if says_something(r)
        for p in r.paraphrases
    ]


def of_taken_away(requests: Sequence[Request], *, paraphrased: bool = False) -> list[Question]:
    """Return each prompt that an answer is taken away from, with that answer where it is known.

    Args:
        requests: those that take an answer away, and others.
        paraphrased: the paraphrases of these prompts instead, where they have some.
    """
    return [
        Question(i, prompt, old_answers(r) if aim.prompt == r.prompt else targets(r))
        for i, r in enumerate(requests)
        for aim in aims_of_request(r)
        if aim.sense == "unsay" and aim.answer
        for prompt in _phrasings(r, aim.prompt, paraphrased)
    ]


def of_neighbourhood(requests: Sequence[Request]) -> list[Question]:
    """Return every neighbourhood prompt with its answers (default: the request's true target)."""
    return [
        of_probe(i, p, p.answers or old_answers(r), targets(r)[:1])
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
        of_probe(i, p, p.answers, targets(r)[:1])
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
    """Return every right form of the new target; none where there is no new target."""
    return (request.target_new, *request.aliases) if request.target_new else ()


def old_answers(request: Request) -> tuple[str, ...]:
    """Return the true target, where there is one."""
    return (request.target_true,) if request.target_true else ()


def _phrasings(request: Request, template: str, paraphrased: bool) -> Sequence[str]:
    """Return a request's prompt filled in, or its paraphrases: they are those of `prompt` alone."""
    if paraphrased:
        return request.paraphrases if template == request.prompt else ()
    return (request.filled(template),)
