"""What a request asks of the model: which answers should be said where, and which no longer.

    modify, insert, text, label   say o* after p
    erase                         no longer say o after p; say the refusal, where one is given
    relation, add                 say r after the prompt that names s and o*
    relation, delete              no longer say r after the prompt that names s and oᶜ
    relation, both                the two at once, as one objective
    sentiment                     say the examples, each rather than a counterexample

RaKE (Wei et al. 2023) writes adding as the argmax of P(r | s, o*) and deleting as the argmin of
P(r | s, oᶜ); nothing is put in the place of what is deleted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.answers import TargetScore

Sense = Literal["say", "unsay", "rival"]

FLOOR = 0.01
"""Length-normalised probability below which a method drives no answer that should go."""
GONE = 2 * FLOOR
"""Length-normalised probability at which an answer is gone, whatever it was before."""


class Aim(NamedTuple):
    """One answer after one prompt, and what should become of it.

    Attributes:
        prompt: template with one {} for the request's subject.
        answer: what follows it, with what the request's `join` puts before it; "": whatever the
            model says there (`errata.edits.erasures` finds it).
        sense: "say"; "unsay": no longer; "rival": the answer of the aim before this one should be
            more probable than this one, token for token.
    """

    prompt: str
    answer: str
    sense: Sense = "say"


def aims_of_request(request: Request) -> tuple[Aim, ...]:
    """Return what a request asks for, an aim at its own prompt first."""
    say = Aim(request.prompt, request.target)
    forget = Aim(request.prompt, request.joined(request.target_true or ""), "unsay")
    if request.kind == "erase":
        return (say, forget) if request.target_new else (forget,)
    if request.kind == "relation" and request.operation == "delete":
        return (forget,)
    if request.kind == "relation" and request.operation == "both":
        return (say, Aim(request.remove or "", request.target, "unsay"))
    if request.kind == "sentiment" and request.examples:
        return tuple(_opinions(request))
    return (say,)


def says_something(request: Request) -> bool:
    """Say whether a request puts an answer anywhere, rather than only taking one away."""
    return any(aim.sense == "say" for aim in aims_of_request(request))


def unmet(
    aims: Sequence[Aim], scores: Sequence[TargetScore], before: Sequence[TargetScore | None] = ()
) -> list[Aim]:
    """Return the aims that are not met, by the scores of their answers.

    Said: every token is the most probable one. No longer said: `is_gone`. Rivals: on average the
    wished replies are more probable, token for token, than the others; else each rival is unmet.

    Args:
        aims: what should become of answers.
        scores: of those answers.
        before: their scores before the edit; () where they are not known.
    """
    pairs = list(zip(aims, scores, strict=True))
    rivals = [score.mean_nll for aim, score in pairs if aim.sense == "rival"]
    if rivals:
        ahead = fmean(score.mean_nll for aim, score in pairs if aim.sense == "say") < fmean(rivals)
        return [aim for aim in aims if aim.sense == "rival" and not ahead]
    return [
        aim
        for aim, score, once in zip(aims, scores, before or [None] * len(aims), strict=True)
        if not (score.exact if aim.sense == "say" else is_gone(score, once))
    ]


def is_gone(score: TargetScore, before: TargetScore | None = None) -> bool:
    """Say whether an answer that should go is gone, by its scores now and before the edit.

    It is not what the model says, and it became improbable: at most half as probable as before,
    length-normalised, or at most `GONE`. That one token of it is not the most probable one says
    little: the whole may be as probable as it was.
    """
    limit = GONE if before is None else max(GONE, before.probability / 2)
    return not score.exact and score.probability <= limit


def _opinions(request: Request) -> Iterable[Aim]:
    """Yield each example with its rival; the other phrasings of the question are left to test."""
    replies, against = (
        [request.joined(text.strip()) for text in texts if text.strip()]
        for texts in (request.examples, request.counterexamples)
    )
    for k, reply in enumerate(replies):
        yield Aim(request.prompt, reply)
        if against:
            yield Aim(request.prompt, against[k % len(against)], "rival")
