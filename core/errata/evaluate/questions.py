"""Questions with known answers: asked by free generation and by teacher forcing, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.evaluate.generation import NORMALISATION, contained_match, exact_match, generate
from errata.evaluate.measurement import Measurement
from errata.evaluate.scoring import TargetScore, score_targets

if TYPE_CHECKING:
    from errata.model import Model
    from errata.request import Request


@dataclass(frozen=True)
class Question:
    """One prompt, the answers that count as right, and the request it belongs to."""

    request: int
    prompt: str
    answers: tuple[str, ...]
    type: str = ""


class Reader:
    """Asks one model in one state; what was asked once is not run again.

    Make one per evaluation: it does not notice when the model's edits change.
    """

    def __init__(
        self, model: Model, requests: Sequence[Request], max_new_tokens: int, batch_size: int
    ) -> None:
        self.model = model
        self.requests = requests
        self.max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._texts: dict[str, str] = {}
        self._scores: dict[tuple[str, str], TargetScore] = {}

    @property
    def generates(self) -> bool:
        """Whether the model can continue a text at all."""
        return self.model.anatomy.kind != "encoder"

    def texts(self, prompts: Iterable[str]) -> list[str]:
        """Return the greedy generation after each prompt."""
        wanted = list(prompts)
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self._texts]
        if new:
            texts = generate(
                self.model, new, max_new_tokens=self.max_new_tokens, batch_size=self._batch_size
            )
            self._texts.update(zip(new, texts, strict=True))
        return [self._texts[prompt] for prompt in wanted]

    def scores(self, pairs: Iterable[tuple[str, str]]) -> list[TargetScore]:
        """Return the teacher-forced score of each (prompt, target)."""
        wanted = list(pairs)
        new = [pair for pair in dict.fromkeys(wanted) if pair not in self._scores]
        if new:
            scores = score_targets(
                self.model, [p for p, _ in new], [t for _, t in new], self._batch_size
            )
            self._scores.update(zip(new, scores, strict=True))
        return [self._scores[pair] for pair in wanted]

    def case_ids(self, cases: Iterable[int]) -> tuple[str, ...]:
        """Return the names of these requests, as measurements carry them."""
        return tuple(self.requests[i].case_id or self.requests[i].digest[:12] for i in cases)

    def ask(self, protocol: str, metric: str, questions: Sequence[Question]) -> list[Measurement]:
        """Measure questions: exact, contained, teacher-forced; in all and per type.

        A case is a request: its value is the mean over its questions.

        Args:
            protocol: name of the protocol.
            metric: stem of the metrics' names.
            questions: those without answers are left out.
        """
        asked = [question for question in questions if question.answers]
        if not asked:
            return []
        measured: list[tuple[str, list[bool], str]] = []
        if self.generates:
            texts = self.texts(question.prompt for question in asked)
            how = f"{protocol}: greedy, natural stop, at most {self.max_new_tokens} new tokens; "
            for name, match, rule in (
                ("exact", exact_match, "the answer and nothing after it in its sentence"),
                ("contained", contained_match, "the answer anywhere, as whole words"),
            ):
                hits = [match(t, q.answers) for t, q in zip(texts, asked, strict=True)]
                measured.append((name, hits, f"{how}{name} match: {rule} ({NORMALISATION})"))
        how = f"{protocol}: teacher-forced, every token of one accepted answer is the most probable"
        measured.append(("teacher_forced", self._forced(asked), how))
        return [
            item
            for name, hits, how in measured
            for item in self.by_type(f"{metric}_{name}", how, asked, hits)
        ]

    def by_type(
        self, metric: str, protocol: str, questions: Sequence[Question], hits: Sequence[bool]
    ) -> list[Measurement]:
        """Return the share of hits over all questions, and over each type when there are any."""
        types = sorted({question.type for question in questions} - {""})
        found = []
        for only in (None, *types):
            cases = per_case(
                (question.request, float(hit))
                for question, hit in zip(questions, hits, strict=True)
                if only in (None, question.type)
            )
            found.append(
                Measurement.mean(
                    metric if only is None else f"{metric}.{only}",
                    list(cases.values()),
                    protocol,
                    case_ids=self.case_ids(cases),
                )
            )
        return found

    def _forced(self, questions: Sequence[Question]) -> list[bool]:
        scores = iter(self.scores((q.prompt, answer) for q in questions for answer in q.answers))
        # A list, not a generator: every score of a question must be taken off the iterator.
        return [any([next(scores).exact for _ in q.answers]) for q in questions]


def per_case(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Return the mean per case of (case, value) pairs."""
    collected: dict[int, list[float]] = {}
    for case, value in values:
        collected.setdefault(case, []).append(value)
    return {case: math.fsum(found) / len(found) for case, found in sorted(collected.items())}


def of_requests(requests: Sequence[Request]) -> list[Question]:
    """Return the rewrite prompt of each request with its new target and aliases."""
    return [Question(i, r.text, _targets(r)) for i, r in enumerate(requests)]


def of_paraphrases(requests: Sequence[Request]) -> list[Question]:
    """Return every paraphrase with the new target and its aliases."""
    return [Question(i, p, _targets(r)) for i, r in enumerate(requests) for p in r.paraphrases]


def of_neighbourhood(requests: Sequence[Request]) -> list[Question]:
    """Return every neighbourhood prompt with its answers (default: the request's true target)."""
    return [
        Question(i, p.prompt, p.answers or ((r.target_true,) if r.target_true else ()), p.type)
        for i, r in enumerate(requests)
        for p in r.neighbourhood
    ]


def of_portability(requests: Sequence[Request]) -> list[Question]:
    """Return every portability probe."""
    return [
        Question(i, p.prompt, p.answers, p.type)
        for i, r in enumerate(requests)
        for p in r.portability
    ]


def of_locality(requests: Sequence[Request]) -> list[Question]:
    """Return every locality probe."""
    return [
        Question(i, p.prompt, p.answers, p.type) for i, r in enumerate(requests) for p in r.locality
    ]


def _targets(request: Request) -> tuple[str, ...]:
    return (request.target_new, *request.aliases)
