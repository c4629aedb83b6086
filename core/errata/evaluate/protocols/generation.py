"""The `generation` protocol: what a user of the model sees, with teacher forcing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.protocol import Protocol
from errata.edits.aims import GONE, is_gone
from errata.evaluate import questions
from errata.evaluate.matching import NORMALISATION, contained_match

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.evaluate.questions import Question
    from errata.evaluate.reader import Reader

NAME = "generation"


def measure(reader: Reader) -> list[Measurement]:
    """Return the share of right answers to rewrite prompts, paraphrases and neighbours.

    Of requests that take an answer away, the share of prompts where it is gone.
    """
    rewrite = questions.of_requests(reader.requests)
    paraphrases = questions.of_paraphrases(reader.requests)
    taken_away = questions.of_taken_away(reader.requests)
    taken_away_elsewhere = questions.of_taken_away(reader.requests, paraphrased=True)
    neighbourhood = questions.of_neighbourhood(reader.requests)
    return [
        *reader.ask(NAME, "rewrite", rewrite),
        *reader.ask(NAME, "paraphrase", paraphrases),
        *_gone(reader, "rewrite_gone", taken_away),
        *_gone(reader, "paraphrase_gone", taken_away_elsewhere),
        *reader.ask(NAME, "neighbourhood", neighbourhood),
        *reader.unchanged(NAME, "neighbourhood_unchanged", neighbourhood),
        *reader.endings(NAME, [*rewrite, *paraphrases, *neighbourhood]),
    ]


def _gone(reader: Reader, metric: str, asked: Sequence[Question]) -> list[Measurement]:
    """Return the share of questions that are not answered any more with what was taken away."""
    if not asked:
        return []
    measured: list[Measurement] = []
    if reader.generates:
        texts = reader.texts(question.prompt for question in asked)
        gone = [not contained_match(t, q.answers) for t, q in zip(texts, asked, strict=True)]
        how = f"{NAME}: {reader.greedy}; what was taken away stands nowhere in the text"
        measured += reader.by_type(metric, f"{how} ({NORMALISATION})", asked, gone)
    how = (
        f"{NAME}: teacher-forced, what was taken away is not every most probable token, and half "
        f"as probable as in the unedited model, or {GONE:g} at most (length-normalised)"
    )
    pairs = [reader.pair(q.request, q.prompt, answer) for q in asked for answer in q.answers]
    once = reader.base.scores(pairs) if reader.base else [None] * len(pairs)
    each = map(is_gone, reader.scores(pairs), once)
    forced = [all([next(each) for _ in question.answers]) for question in asked]
    return [*measured, *reader.by_type(f"{metric}_teacher_forced", how, asked, forced)]


PROTOCOL = Protocol(
    NAME,
    "greedy answers with a natural stop, exact and contained, to the rewrite prompt, its "
    "paraphrases and its neighbourhood; share of prompts whose answer to be forgotten is gone; "
    "share of neighbours with the base's text; teacher-forced beside",
    "Yang et al. 2025, The Mirage of Model Editing (WILD)",
    measure,
)
