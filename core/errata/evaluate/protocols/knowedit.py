"""The `knowedit` protocol: edit success, portability, locality and fluency, as the survey's tables.

Facts (WikiData, ZsRE, WikiBio) are scored token by token with teacher forcing, as the authors'
script scores them, and by generation beside. Sentiment (ConvSent) and erasing (Sanitation) have
measures of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.fluency import weighted_entropy, words
from errata.evaluate.protocols import convsent, sanitation
from errata.evaluate.protocols.counterfact import ENTROPY, sampling
from errata.evaluate.protocols.easyedit import (
    KEPT,
    RIGHT,
    rewrite_prompt,
    token_accuracy,
    tokens_kept,
)
from errata.evaluate.sampled import GENERATED_TOKENS, TOP_K, written_texts

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "knowedit"
OWN_MEASURES = ("sentiment", "erase")
"""Kinds of request that are not scored as facts."""
_WRITTEN = (
    f"{GENERATED_TOKENS} new tokens without the prompt (of requests of kind text), sampled from "
    f"the top {TOP_K}, seed {{seed}}"
)


def measure(reader: Reader) -> list[Measurement]:
    """Return what the requests' kinds call for."""
    return [
        *_success(reader),
        *_portability(reader),
        *_locality(reader),
        *_fluency(reader),
        *convsent.measure(reader, NAME),
        *sanitation.measure(reader, NAME),
    ]


def _success(reader: Reader) -> list[Measurement]:
    """Return the share of right target tokens, and whole answers beside."""
    asked = _facts(reader, questions.of_requests(reader.requests))
    return [
        *_by_type(reader, "edit_success", asked, _accuracy(reader, asked), RIGHT),
        *reader.ask(NAME, "edit_success", asked),
    ]


def _portability(reader: Reader) -> list[Measurement]:
    """Return portability by type; in all, the mean of a case's types, as the authors' script."""
    asked = _facts(reader, questions.of_portability(reader.requests))
    return [
        *_by_type(reader, "portability", asked, _accuracy(reader, asked), RIGHT),
        *reader.ask(NAME, "portability_success", asked),
    ]


def _locality(reader: Reader) -> list[Measurement]:
    """Return the share of unchanged tokens and texts; neighbours are a type of their own."""
    neighbours = [
        questions.Question(q.request, q.prompt, q.answers, q.type or "neighbourhood", q.group)
        for q in questions.of_neighbourhood(reader.requests)
    ]
    asked = [*neighbours, *questions.of_locality(reader.requests)]
    answered = _facts(reader, asked)
    return [
        *_by_type(reader, "locality", answered, tokens_kept(reader, answered), KEPT),
        *reader.unchanged(NAME, "locality_unchanged", _facts(reader, asked, answered=False)),
    ]


def _facts(reader: Reader, asked: Sequence[Question], answered: bool = True) -> list[Question]:
    return [
        question
        for question in asked
        if reader.requests[question.request].kind not in OWN_MEASURES
        and (question.answers or not answered)
    ]


def _accuracy(reader: Reader, asked: Sequence[Question]) -> list[float]:
    return token_accuracy(reader, [[question] for question in asked])


def _by_type(
    reader: Reader, metric: str, asked: Sequence[Question], values: Sequence[float], how: str
) -> list[Measurement]:
    """Return the mean over a case's types of the mean within each, and each type alone."""
    if not values:
        return []
    types = {question.type for question in asked} - {""}
    found = reader.by_type(metric, f"{NAME}: {how}", asked, values)
    if not types:
        return found
    sorts: dict[tuple[str, str], list[float]] = {}
    for question, value in zip(asked, values, strict=True):
        sorts.setdefault((reader.case(question), question.type), []).append(value)
    means = ((case, sum(some) / len(some)) for (case, _), some in sorts.items())
    how = f"{NAME}: {how}; mean of the types' means"
    return [reader.mean(metric, means, how), *found[1:]]


def _fluency(reader: Reader) -> list[Measurement]:
    """Return the n-gram entropy of sampled texts; of `text` requests, of the new tokens alone.

    Their prompts are passages, many of them as long as a whole sampled text: the value would be
    that of the data.
    """
    if not reader.generates or "fluency" in reader.settings.leave_out:
        return []
    entropies: list[tuple[int, float]] = []
    hows: list[str] = []
    for i, request in enumerate(reader.requests):
        if request.kind in OWN_MEASURES:
            continue
        if request.kind == "text":
            with reader.state():
                texts = written_texts(reader.model, [request.text], reader.settings.seed)
            hows.append(_WRITTEN.format(seed=reader.settings.seed))
        else:
            texts = reader.samples(rewrite_prompt(request))
            hows.append(sampling(reader))
        entropies += [(i, weighted_entropy(words(text))) for text in texts]
    if not entropies:
        return []
    how = f"{ENTROPY}, {'; '.join(sorted(set(hows), reverse=True))}"
    return [reader.mean("fluency", entropies, f"{NAME}: {how}", unit="bits")]


PROTOCOL = Protocol(
    NAME,
    "edit success, portability and locality by type, token by token and generated; fluency; "
    "sentiment × topic and KL locality for sentiment requests; refusal and retention for erasing",
    "Zhang et al. 2024, A Comprehensive Study of Knowledge Editing for Large Language Models, "
    "section 4; Mitchell et al. 2022 (SERAC) for sentiment",
    measure,
)
