"""The `lifelong` protocol: GRACE's ERR and TRR of the model as it stands.

It looks at one state: which edits were made so far, and when to look, is the caller's business. ERR
of requests that were right before, and were not edited, is what GRACE calls ARR.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.evaluate import questions
from errata.evaluate.protocols.easyedit import RIGHT, token_accuracy
from errata.model.joining import join
from errata.model.perplexity import joint_perplexity

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "lifelong"


def measure(reader: Reader) -> list[Measurement]:
    """Return ERR over the requests and TRR over the retained probes, in four ways each."""
    retained = questions.of_retain(reader.settings.retain)
    return [
        *_rate(reader, "ERR", questions.of_requests(reader.requests)),
        *_text_perplexity(reader),
        *_rate(reader, "TRR", retained),
        *reader.unchanged(NAME, "TRR_unchanged", retained),
    ]


def _rate(reader: Reader, metric: str, questions_: Sequence[Question]) -> list[Measurement]:
    """Return token accuracy, F1 and whole answers on these questions."""
    asked = reader.grouped([question for question in questions_ if question.answers])
    if not asked:
        return []
    firsts = [phrasings[0] for phrasings in asked]
    values = token_accuracy(reader, asked)
    classes = reader.model.task == "classify"
    how = "share of texts whose most probable class is the label" if classes else RIGHT
    measured = reader.by_type(metric, f"{NAME}: {how}", firsts, values)
    if classes:
        return measured
    if reader.generates:
        how = f"{NAME}: {reader.greedy}; F1 of the sets of token ids of the text and of the answer"
        measured += reader.by_type(f"{metric}_f1", how, firsts, _f1(reader, asked), unit="F1")
    flat = [question for phrasings in asked for question in phrasings]
    return [*measured, *reader.ask(NAME, metric, flat)]


def _f1(reader: Reader, asked: Sequence[Sequence[Question]]) -> list[float]:
    """Return the best F1 of a question's phrasings and answers, on token ids as GRACE's code."""
    texts = iter(reader.texts(q.prompt for phrasings in asked for q in phrasings))
    found = []
    for phrasings in asked:
        values = []
        for question in phrasings:
            said = _token_set(reader, next(texts))
            values += [token_f1(said, _token_set(reader, a)) for a in question.answers]
        found.append(max(values))
    return found


def token_f1(said: frozenset[int], wanted: frozenset[int]) -> float:
    """Return the harmonic mean of precision and recall of two sets; 0 without a common member."""
    common = len(said & wanted)
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def _token_set(reader: Reader, text: str) -> frozenset[int]:
    """Return the ids of a text as it is read after a prompt: with a space before it, if any."""
    read = join("a", text.strip()).removeprefix("a")
    return frozenset(reader.model.tokenizer(read, add_special_tokens=False)["input_ids"])


def _text_perplexity(reader: Reader) -> list[Measurement]:
    """Return the perplexity of long targets, which GRACE's hallucination task measures."""
    asked = [(i, request) for i, request in enumerate(reader.requests) if request.kind == "text"]
    if not asked:
        return []
    scores = reader.scores((request.text, request.target) for _, request in asked)
    return [
        reader.mean(
            "ERR_perplexity",
            (
                (i, joint_perplexity([(score.mean_nll, 1)]))
                for (i, _), score in zip(asked, scores, strict=True)
            ),
            f"{NAME}: exp of the mean negative log-probability per target token, teacher-forced; "
            "mean over requests",
            unit="perplexity",
            direction="lower",
        )
    ]


PROTOCOL = Protocol(
    NAME,
    "ERR, accuracy on the edits so far, and TRR, accuracy on the retained probes: token-level, "
    "F1 and generated",
    "Hartvigsen et al. 2023, Aging with GRACE, section 3.1",
    measure,
)
