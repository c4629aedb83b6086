"""Asking one model in one state: questions by generation and by teacher forcing, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from errata.errors import SelfComparisonError
from errata.evaluate.generation import NORMALISATION, contained_match, exact_match, generate
from errata.evaluate.measurement import Measurement
from errata.evaluate.scoring import TargetScore, score_targets
from errata.evaluate.text import text_nlls

if TYPE_CHECKING:
    from errata.model import Model
    from errata.request import Probe, Request


@dataclass(frozen=True)
class Question:
    """One prompt, the answers that count as right, and the request it belongs to."""

    request: int
    prompt: str
    answers: tuple[str, ...]
    type: str = ""


@dataclass(frozen=True)
class MeasureSettings:
    """How questions are asked, the same for every protocol.

    Attributes:
        max_new_tokens: length limit of generated answers.
        batch_size: rows per forward.
        seed: of what is sampled (the texts of GE).
        texts: held-out texts for perplexity; None for the canary texts.
        retain: probes of the dataset as a whole that no edit may change.
    """

    max_new_tokens: int = 32
    batch_size: int = 32
    seed: int = 0
    texts: tuple[str, ...] | None = None
    retain: tuple[Probe, ...] = ()


@dataclass
class Memory:
    """What a model in one state has answered.

    Attributes:
        texts: prompt → greedy generation, with a natural stop.
        scores: (prompt, target) → teacher-forced score.
        nlls: text → (summed negative log-probability in nats, tokens).
    """

    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[tuple[str, str], TargetScore] = field(default_factory=dict)
    nlls: dict[str, tuple[float, int]] = field(default_factory=dict)


class Reader:
    """Asks one model in one state; what was asked once is not run again.

    Make one per evaluation: it does not notice when the model's edits change.

    Args:
        model: the model.
        requests: whose prompts the protocols read.
        settings: how to ask.
        baseline: the base's answers that are known already.
        of_base: ask the base: every edit is off while something runs.
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        settings: MeasureSettings,
        baseline: Memory | None = None,
        *,
        of_base: bool = False,
    ) -> None:
        self.model = model
        self.requests = requests
        self.settings = settings
        self._of_base = of_base
        self._baseline = Memory() if baseline is None else baseline
        self._memory = self._baseline if of_base else Memory()

    @cached_property
    def base(self) -> Reader | None:
        """The unedited model, asked the same way; None where this is the unedited model."""
        if self._of_base or not self.model.stack.ids:
            return None
        return Reader(self.model, self.requests, self.settings, self._baseline, of_base=True)

    @contextmanager
    def state(self) -> Iterator[None]:
        """Have the model in the state that this reader asks.

        Raises:
            SelfComparisonError: the base is asked but an edit is still on the model.
        """
        if not self._of_base:
            yield
            return
        stack = self.model.stack
        touched = stack.touched
        with self.model.base_state():
            left = [*stack.ids, *stack.differing(touched)]
            if left:
                raise SelfComparisonError(
                    f"The base of {self.model.name} was to be measured, but {', '.join(left)} is "
                    "not the base's: an edited model would be compared with itself."
                )
            yield

    @property
    def generates(self) -> bool:
        """Whether the model can continue a text at all."""
        return self.model.anatomy.kind != "encoder"

    @property
    def greedy(self) -> str:
        """How texts are generated, as protocols say it."""
        return f"greedy, natural stop, at most {self.settings.max_new_tokens} new tokens"

    def texts(self, prompts: Iterable[str]) -> list[str]:
        """Return the greedy generation after each prompt."""
        wanted, known = list(prompts), self._memory.texts
        new = [prompt for prompt in dict.fromkeys(wanted) if prompt not in known]
        if new:
            with self.state():
                texts = generate(
                    self.model,
                    new,
                    max_new_tokens=self.settings.max_new_tokens,
                    batch_size=self.settings.batch_size,
                )
            known.update(zip(new, texts, strict=True))
        return [known[prompt] for prompt in wanted]

    def scores(self, pairs: Iterable[tuple[str, str]]) -> list[TargetScore]:
        """Return the teacher-forced score of each (prompt, target)."""
        wanted, known = list(pairs), self._memory.scores
        new = [pair for pair in dict.fromkeys(wanted) if pair not in known]
        if new:
            with self.state():
                scores = score_targets(
                    self.model, [p for p, _ in new], [t for _, t in new], self.settings.batch_size
                )
            known.update(zip(new, scores, strict=True))
        return [known[pair] for pair in wanted]

    def nlls(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Return (summed negative log-probability in nats, predicted tokens) of each text."""
        known = self._memory.nlls
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            with self.state():
                known.update(zip(new, text_nlls(self.model, new), strict=True))
        return [known[text] for text in texts]

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
            how = f"{protocol}: {self.greedy}; "
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

    def unchanged(
        self, protocol: str, metric: str, questions: Sequence[Question]
    ) -> list[Measurement]:
        """Return the share of generations that are word for word the base's; [] for the base."""
        if self.base is None or not self.generates or not questions:
            return []
        prompts = [question.prompt for question in questions]
        before, after = self.base.texts(prompts), self.texts(prompts)
        hits = [a.strip() == b.strip() for a, b in zip(after, before, strict=True)]
        how = f"{protocol}: {self.greedy}; same text as the unedited model"
        return self.by_type(metric, how, questions, hits)

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
