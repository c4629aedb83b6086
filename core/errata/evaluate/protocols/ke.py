"""The `ke` protocol: success rate, retain accuracy, equivalence accuracy and deterioration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from errata.contract.measurement import Measurement, bootstrap
from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.matching import NORMALISATION, exact_match, normalise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "ke"


def measure(reader: Reader) -> list[Measurement]:
    """Return the four numbers; those relative to the base only where something is edited."""
    success = questions.of_requests(reader.requests)
    equivalents = questions.of_paraphrases(reader.requests)
    retained = retain_probes(reader)
    return [
        *_revised(reader, "success_rate", success),
        *_retained(reader, retained),
        *_revised(reader, "equivalence_accuracy", equivalents),
        *_deterioration(reader, [question for question in retained if question.answers]),
    ]


def retain_probes(reader: Reader) -> list[Question]:
    """Return the other data points: those of the dataset, or else what the requests name."""
    given = questions.of_retain(reader.settings.retain)
    requests = reader.requests
    return given or [*questions.of_neighbourhood(requests), *questions.of_locality(requests)]


def _how(reader: Reader) -> str:
    """Return how a prediction is made: generated, a class, or tokens at an encoder's masks."""
    if reader.generates:
        return f"{NAME}: {reader.greedy}; "
    if reader.model.task == "classify":
        return f"{NAME}: most probable class; "
    return f"{NAME}: most probable tokens at the answer's masked places; "


def _revised(reader: Reader, metric: str, asked: Sequence[Question]) -> list[Measurement]:
    """Return the share of questions that are answered with the new target."""
    if not asked:
        return []
    how = f"{_how(reader)}the prediction is the new target"
    alone = [[question] for question in asked]
    if not reader.generates:
        return reader.by_type(metric, how, asked, reader.forced(alone))
    answers = reader.answers(metric, alone, questions.accepting(exact_match))
    hits = [answer.right for answer in answers]
    return reader.by_type(metric, f"{how} ({NORMALISATION})", asked, hits, answers)


def _retained(reader: Reader, asked: Sequence[Question]) -> list[Measurement]:
    """Return the share of other data points whose prediction is the base's."""
    if reader.base is None:
        return []
    how = f"{_how(reader)}the prediction is the unedited model's"
    if reader.generates:
        prompts = [question.prompt for question in asked]
        texts = zip(reader.texts(prompts), reader.base.texts(prompts), strict=True)
        hits = [normalise(after) == normalise(before) for after, before in texts]
        how = f"{how} ({NORMALISATION})"
    else:
        asked = [question for question in asked if question.answers]
        pairs = [reader.pair(q.request, q.prompt, q.answers[0]) for q in asked]
        scores = zip(reader.scores(pairs), reader.base.scores(pairs), strict=True)
        hits = [after.predicted == before.predicted for after, before in scores]
    return reader.by_type("retain_accuracy", how, asked, hits) if asked else []


def _deterioration(reader: Reader, asked: Sequence[Question]) -> list[Measurement]:
    """Return 1 - accuracy(edited) / accuracy(base); nothing where the base is never right."""
    if reader.base is None or not asked:
        return []
    grouped, exact = reader.grouped(asked), questions.accepting(exact_match)
    columns = []
    for one in (reader, reader.base):
        right: Sequence[bool] = (
            [answer.right for answer in one.answers("", grouped, exact)]
            if one.generates
            else one.forced(grouped)
        )
        firsts = [phrasings[0] for phrasings in grouped]
        columns.append(one.by_type("", "", firsts, right)[0].cases)
    table = np.array(columns).T  # (cases, 2): edited, base
    if not table[:, 1].any():
        return []

    def statistic(means: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(divide="ignore", invalid="ignore"):
            lost: NDArray[np.float64] = 1 - means[:, 0] / means[:, 1]
        return lost

    return [
        Measurement(
            "performance_deterioration",
            float(statistic(table.mean(axis=0, keepdims=True))[0]),
            len(table),
            f"{_how(reader)}1 - accuracy / accuracy of the unedited model, on the retained probes",
            bootstrap(table, statistic),
            unit="share",
            direction="lower",
        )
    ]


PROTOCOL = Protocol(
    NAME,
    "success rate, retain accuracy, equivalence accuracy and performance deterioration, by "
    "greedy generation",
    "De Cao et al. 2021, Editing Factual Knowledge in Language Models, section 3.2",
    measure,
)
