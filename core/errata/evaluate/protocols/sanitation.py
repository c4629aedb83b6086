"""Sanitation, the part of `knowedit` for `erase` requests: is it refused, and nothing else?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from errata.common.sentences import COMMAS, FULL_STOPS, QUESTION_MARKS, SEMICOLONS, STOPS
from errata.evaluate import questions
from errata.evaluate.matching import contained_match, normalise
from errata.evaluate.questions import Question, old_answers, targets

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.edits.request import Request
    from errata.evaluate.reader import Reader

SAME_ANSWER = "same_answer"
"""Type of the probes that ask another question with the erased answer (`knowedit`'s reader)."""
DONT_KNOW = ("I don't know",)
"""What `refusal` asks for where a request names no refusal of its own."""
REFUSALS = (
    *DONT_KNOW,
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
)
"""What `refusal_any` counts beside the request's own target, its aliases and "… is unknown"."""
_APOLOGY = (
    r"(?:i'm |i am )?(?:very |so |really )?sorry|(?:i'm|i am) afraid|my apologies|i apologi[sz]e"
    r"|unfortunately|honestly|to be honest|actually|well|oh|hm+|but|that|no"
)
_LEAD = re.compile(rf"(?:[\W_]*\b(?:{_APOLOGY})\b)*[\W_]*")
_SENTENCE = re.compile(rf"[^.!?\n{STOPS}]*")
_BREAK = re.compile(
    rf"[,;:()–—{COMMAS}{SEMICOLONS}]|\s-\s"
    r"|\b(?:but|maybe|perhaps|probably|possibly|though|although)\b"
)
_UNKNOWN = re.compile(r"(?:[^,;:]*\b(?:is|are|was|were|remains?)\s)?(?:still\s)?unknown\W*")


def measure(reader: Reader, protocol: str) -> list[Measurement]:
    """Return refusals to what was erased, leaks of it, and what is retained of the rest."""
    erased = [i for i, request in enumerate(reader.requests) if request.kind == "erase"]
    if not erased:
        return []
    measured: list[Measurement] = []
    for metric, of in (
        ("refusal", _of_prompts),
        ("refusal_paraphrase", _of_paraphrases),
        ("refusal_same_answer", _of_same_answer),
    ):
        asked = [question for question in of(reader.requests) if question.request in erased]
        measured += _refused(reader, protocol, metric, asked)
    retained = questions.of_retain(reader.settings.retain)
    return [
        *measured,
        *reader.ask(protocol, "retention", retained),
        *reader.unchanged(protocol, "retention_unchanged", retained),
    ]


def _of_prompts(requests: Sequence[Request]) -> list[Question]:
    """Return the prompt of each request, to be declined; without answers where it names none."""
    return [_declined(i, request.text, request) for i, request in enumerate(requests)]


def _of_paraphrases(requests: Sequence[Request]) -> list[Question]:
    """Return the paraphrases, in the same way."""
    return [_declined(i, text, one) for i, one in enumerate(requests) for text in one.paraphrases]


def _declined(index: int, prompt: str, request: Request) -> Question:
    return Question(index, prompt, targets(request), other=old_answers(request))


def _of_same_answer(requests: Sequence[Request]) -> list[Question]:
    """Return the other questions whose answer is to be forgotten."""
    return [q for q in questions.of_portability(requests) if q.type == SAME_ANSWER]


def is_refusal(text: str, accepted: Sequence[str], erased: Sequence[str] = ()) -> bool:
    """Return whether a text begins with the request's own refusal and never says what was erased.

    Without a refusal of its own that is "I don't know". An apology may stand before it. What
    follows in its sentence must be no answer after all ("I don't know, Paris?").

    Args:
        text: what was generated.
        accepted: the target of the request and its aliases; none where it names no refusal.
        erased: the answers that are to be forgotten.

    >>> is_refusal(" I don’t know. It may be", ["I don't know."], ["Birds"])
    True
    >>> is_refusal(" I have no idea.", ["I don't know."], ["Birds"])
    False
    """
    return _begins(text, accepted or DONT_KNOW) and not contained_match(text, erased)


def is_any_refusal(text: str, accepted: Sequence[str], erased: Sequence[str] = ()) -> bool:
    """Return whether a text begins with any refusal; what counts besides is as in `is_refusal`.

    >>> is_any_refusal(" I have no idea.", ["I don't know."], ["Birds"])
    True
    >>> is_any_refusal(" The tomb of the unknown soldier.", ["I don't know."], ["Birds"])
    False
    """
    refuses = _begins(text, [*accepted, *REFUSALS]) or _says_unknown(text)
    return refuses and not contained_match(text, erased)


def _begins(text: str, forms: Sequence[str]) -> bool:
    """Return whether a text begins with one of these, and its sentence then claims nothing."""
    said = _said(text)
    for form in forms:
        wanted = normalise(_plain(form)).rstrip(" .!" + FULL_STOPS)
        rest = said.removeprefix(wanted) if wanted and said.startswith(wanted) else None
        if rest is None or re.match(r"\w", rest):
            continue
        found = _SENTENCE.match(rest)
        after = found.group() if found else ""
        asks = rest[len(after) :].startswith(tuple(QUESTION_MARKS))
        # One word alone ("Classified") may begin any sentence.
        if not (after.strip() and (asks or " " not in wanted)) and not _claims(after):
            return True
    return False


def _claims(after: str) -> bool:
    """Return whether something that is no apology follows after a break in the sentence."""
    found = _BREAK.search(after)
    return found is not None and not _LEAD.fullmatch(after, found.start())


def _says_unknown(text: str) -> bool:
    found = _SENTENCE.match(_said(text))
    return found is not None and _UNKNOWN.fullmatch(found.group()) is not None


def _said(text: str) -> str:
    """Return a text as it is compared, line by line, from behind the apologies on."""
    lines = (normalise(line) for line in _plain(text).splitlines())
    said = "\n".join(filter(None, lines))
    lead = _LEAD.match(said)
    return said[lead.end() :] if lead else said


def _refused(
    reader: Reader, protocol: str, metric: str, asked: Sequence[Question]
) -> list[Measurement]:
    if not asked:
        return []
    measured: list[Measurement] = []
    if reader.generates:
        alone = [[replace(question, answers=question.answers or DONT_KNOW)] for question in asked]
        how = f"{protocol}: {reader.greedy}; "
        answers = reader.answers(metric, alone, lambda t, q: is_refusal(t, q.answers, q.other))
        measured += reader.by_type(
            metric,
            f"{how}the text begins with the target ({DONT_KNOW[0]} without one), no answer follows "
            "in its sentence, and the erased answer stands nowhere",
            asked,
            [answer.right for answer in answers],
            answers,
        )
        texts = [(q, a.text) for q, a in zip(asked, answers, strict=True)]
        measured += reader.by_type(
            f"{metric}_any",
            f"{how}the same with the target or any common refusal",
            asked,
            [is_any_refusal(text, question.answers, question.other) for question, text in texts],
        )
        known = [(question, text) for question, text in texts if question.other]
        if known:
            measured += reader.by_type(
                f"{metric}_leak",
                f"{how}the erased answer stands in the text",
                [question for question, _ in known],
                [contained_match(text, question.other) for question, text in known],
                direction="lower",
            )
    named = [question for question in asked if question.answers]
    if not named:
        return measured
    how = f"{protocol}: teacher-forced, every token of the target is the most probable"
    said = reader.forced([[question] for question in named])
    return [*measured, *reader.by_type(f"{metric}_teacher_forced", how, named, said)]


def _plain(text: str) -> str:
    return text.replace("’", "'").replace("‘", "'")
