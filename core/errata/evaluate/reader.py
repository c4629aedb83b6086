"""Asking one model in one state: questions by generation and by teacher forcing, side by side."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from errata.contract.measurement import Answer, Measurement
from errata.edits.rendering import rendered
from errata.edits.request import Probe
from errata.errors import SelfComparisonError, UnknownNameError
from errata.evaluate.failures import classify_failure
from errata.evaluate.matching import NORMALISATION, contained_match, exact_match, has_room
from errata.evaluate.questions import accepting
from errata.evaluate.retained import RetainedProbe, rendered_probes
from errata.evaluate.sampled import sampled_texts
from errata.model.answers import ENDINGS, TargetScore, ending_of
from errata.model.generation import generated
from errata.model.joining import with_join
from errata.model.perplexity import text_nlls
from errata.model.sampling import GenerationSettings
from errata.model.scoring import score_targets

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.evaluate.classifiers import SentimentClassifier, TopicClassifier
    from errata.evaluate.questions import Question
    from errata.model.model import Model

logger = logging.getLogger("errata")

Case = TypeVar("Case", int, str)
Key = TypeVar("Key", bound=Hashable)

OPTIONAL = ("GE", "RS", "fluency", "attribute_nll")
"""Metrics that a measurement may leave out: the first three sample texts of 100 tokens, which takes
longer than everything else that `counterfact` measures."""


@dataclass(frozen=True)
class MeasureSettings:
    """How questions are asked, the same for every protocol.

    Attributes:
        max_new_tokens: length limit of generated answers.
        batch_size: rows per forward.
        seed: of what is sampled (the texts of GE).
        texts: held-out texts for perplexity; None for the canary texts.
        retain: probes of the dataset as a whole that no edit may change.
        references: texts that the word weights of RS are fitted on; the requests' own when empty.
        sentiment: a `SentimentClassifier` or "package.module:name"; None for VADER.
        topic: a `TopicClassifier` or "package.module:name"; None for tf-idf and the topic's name.
        harness_tasks: lm-evaluation-harness tasks that `general` runs, by name or YAML file.
        leave_out: metrics that are not measured, of `OPTIONAL`: those that cost most.
    """

    max_new_tokens: int = 32
    batch_size: int = 32
    seed: int = 0
    texts: tuple[str, ...] | None = None
    retain: tuple[Probe | RetainedProbe, ...] = ()
    references: tuple[str, ...] = ()
    sentiment: SentimentClassifier | str | None = None
    topic: TopicClassifier | str | None = None
    harness_tasks: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in self.leave_out:
            if name not in OPTIONAL:
                raise UnknownNameError("metric that can be left out", name, OPTIONAL)


@dataclass
class KnownAnswers:
    """What a model in one state has answered.

    Attributes:
        texts: prompt → greedy generation, with a natural stop.
        scores: (prompt, target) → teacher-forced score.
        nlls: text → (summed negative log-probability in nats, tokens).
        samples: (seed, prompts sampled together) → their texts, prompts included.
        details: prompt → what is known of how its generation came about. The base has none: only
            what an edit puts in the model's place has a trace.
    """

    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[tuple[str, str], TargetScore] = field(default_factory=dict)
    nlls: dict[str, tuple[float, int]] = field(default_factory=dict)
    samples: dict[tuple[int, tuple[str, ...]], list[str]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)

    def unknown(self, what: str, keys: Iterable[Key]) -> list[Key]:
        """Return which of these questions are to be asked, each once.

        Args:
            what: the field that answers them.
            keys: the questions, as that field has them.
        """
        known = getattr(self, what)
        return [key for key in dict.fromkeys(keys) if key not in known]

    def beyond(self, other: KnownAnswers) -> KnownAnswers:
        """Return what is answered here and not there."""
        return KnownAnswers(
            **{
                name: {key: value for key, value in known.items() if key not in vars(other)[name]}
                for name, known in self._fields()
            }
        )

    def add(self, other: KnownAnswers) -> None:
        """Take in what is answered there, in place of what is answered here."""
        for name, known in other._fields():
            getattr(self, name).update(known)

    def _fields(self) -> list[tuple[str, dict[Any, Any]]]:
        return [(one.name, getattr(self, one.name)) for one in fields(KnownAnswers)]


class Reader:
    """Asks one model in one state; what was asked once is not run again.

    Make one per evaluation: it does not notice when the model's edits change.

    Args:
        model: the model.
        requests: whose prompts the protocols read.
        settings: how to ask.
        baseline: the base's answers that are known already. With them an unedited model has a base
            too, from which it differs in nothing: so it counts where an edit was refused.
        of_base: ask the base: every edit is off while something runs.
        memory: what the model as it stands is known to answer (of the base: see `baseline`).
    """

    def __init__(
        self,
        model: Model,
        requests: Sequence[Request],
        settings: MeasureSettings,
        baseline: KnownAnswers | None = None,
        *,
        of_base: bool = False,
        memory: KnownAnswers | None = None,
    ) -> None:
        self.model = model
        self.requests = rendered(model, requests)
        self.settings = replace(settings, retain=rendered_probes(model, settings.retain))
        self._of_base = of_base
        self._baseline = KnownAnswers() if baseline is None else baseline
        unedited = not model.stack.ids
        self._has_base = not of_base and (not unedited or baseline is not None)
        # Unedited it gives the base's answers: what is known of those is not asked again, in other
        # batches whose last digits differ.
        shared = of_base or (unedited and baseline is not None and memory is None)
        self._memory = self._baseline if shared else memory or KnownAnswers()

    @cached_property
    def base(self) -> Reader | None:
        """The unedited model, asked the same way; None where this is it and no baseline is given.

        An unedited model that is measured beside a baseline (a refused case) is equal to it.
        """
        if not self._has_base:
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
        return self.model.generates

    @property
    def greedy(self) -> str:
        """How texts are generated, as protocols say it."""
        return f"greedy, natural stop, at most {self.settings.max_new_tokens} new tokens"

    def texts(self, prompts: Iterable[str]) -> list[str]:
        """Return the greedy generation after each prompt."""
        wanted, known = list(prompts), self._memory.texts
        new = self._memory.unknown("texts", wanted)
        if new:
            with self.state():
                how = GenerationSettings(
                    max_new_tokens=self.settings.max_new_tokens,
                    batch_size=self.settings.batch_size,
                )
                found = generated(self.model, new, how)
            known.update({p: one.text for p, one in zip(new, found, strict=True)})
            traces = {p: one.details for p, one in zip(new, found, strict=True) if one.details}
            self._memory.details.update(traces)
        return [known[prompt] for prompt in wanted]

    def scores(self, pairs: Iterable[tuple[str, str]]) -> list[TargetScore]:
        """Return the teacher-forced score of each (prompt, target)."""
        wanted, known = list(pairs), self._memory.scores
        new = self._memory.unknown("scores", wanted)
        if new:
            with self.state():
                scores = score_targets(
                    self.model, [p for p, _ in new], [t for _, t in new], self.settings.batch_size
                )
            known.update(zip(new, scores, strict=True))
        return [known[pair] for pair in wanted]

    def pair(self, request: int | str, prompt: str, answer: str) -> tuple[str, str]:
        """Return a prompt of a request and an answer, joined as the request says."""
        if isinstance(request, str):
            return prompt, answer
        if request < 0:  # of the dataset as a whole
            probe = self.settings.retain[-1 - request]
            return prompt, with_join(answer, getattr(probe, "join", None))
        return prompt, self.requests[request].joined(answer)

    def nlls(self, texts: Sequence[str]) -> list[tuple[float, int]]:
        """Return (summed negative log-probability in nats, predicted tokens) of each text."""
        known = self._memory.nlls
        new = self._memory.unknown("nlls", texts)
        if new:
            with self.state():
                known.update(zip(new, text_nlls(self.model, new), strict=True))
        return [known[text] for text in texts]

    def samples(self, prompts: Sequence[str]) -> list[str]:
        """Return a sampled text for each prompt of one request, with the prompt before it."""
        key, known = (self.settings.seed, tuple(prompts)), self._memory.samples
        if self._memory.unknown("samples", [key]):
            with self.state():
                known[key] = sampled_texts(self.model, prompts, self.settings.seed)
        return known[key]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of the case that each request belongs to; requests of one case share it."""
        return tuple(request.case_id or request.digest[:12] for request in self.requests)

    def case_ids(self, cases: Iterable[int]) -> tuple[str, ...]:
        """Return the names of these requests, as measurements carry them."""
        return tuple(self.names[i] for i in cases)

    def mean(
        self, metric: str, values: Iterable[tuple[int | str, float]], protocol: str, **more: Any
    ) -> Measurement:
        """Return the mean over cases of the mean over each case's values.

        Args:
            metric: its name.
            values: (request index or name of a case, value) pairs.
            protocol: how the values were measured.
            **more: further arguments of `Measurement.mean`.
        """
        cases = per_case(
            (case if isinstance(case, str) else self.names[case], value) for case, value in values
        )
        ranks = {name: rank for rank, name in reversed(list(enumerate(self.names)))}
        order = sorted(cases, key=lambda case: ranks.get(case, len(self.names)))  # the requests'
        return Measurement.mean(
            metric, [cases[case] for case in order], protocol, case_ids=order, **more
        )

    def ask(self, protocol: str, metric: str, questions: Sequence[Question]) -> list[Measurement]:
        """Measure questions: exact, contained, teacher-forced; in all and per type.

        A question asked in several phrasings (one `group`) is right if any of them is. A case's
        value is the mean over its questions. The exact metric carries the answers, one for each
        question. A `text` request whose answers are all longer than the generated text may be is
        asked with teacher forcing only.

        Args:
            protocol: name of the protocol.
            metric: stem of the metrics' names.
            questions: those without answers are left out.
        """
        asked = self.grouped([question for question in questions if question.answers])
        if not asked:
            return []
        measured: list[Measurement] = []
        room, left = self._with_room(asked) if self.generates else ([], "")
        if room:
            how = f"{protocol}: {self.greedy}; "
            for name, match, rule in (
                ("exact", exact_match, "the answer and nothing after it in its sentence"),
                ("contained", contained_match, "the answer anywhere, as whole words"),
            ):
                answers = self.answers(f"{metric}_{name}", room, accepting(match))
                measured += self.by_type(
                    f"{metric}_{name}",
                    f"{how}{name} match: {rule} ({NORMALISATION}){left}",
                    [phrasings[0] for phrasings in room],
                    [answer.right for answer in answers],
                    answers if name == "exact" else (),
                )
        measured += self.by_type(
            f"{metric}_teacher_forced",
            f"{protocol}: teacher-forced, every token of one accepted answer is the most probable",
            [phrasings[0] for phrasings in asked],
            self.forced(asked),
        )
        return measured

    def _with_room(self, asked: Sequence[list[Question]]) -> tuple[list[list[Question]], str]:
        """Return the questions that a generated text has room to answer, and what protocols say."""
        limit, tokenizer = self.settings.max_new_tokens, self.model.tokenizer
        long = {i for i, request in enumerate(self.requests) if request.kind == "text"}
        room = [
            ps for ps in asked
            if any(q.request not in long or has_room(q.answers, limit, tokenizer) for q in ps)
        ]  # fmt: skip
        if left := len(asked) - len(room):
            logger.info("%d of %d questions are not asked by generation: their answers have more "
                        "than %d tokens (max_new_tokens).", left, len(asked), limit)  # fmt: skip
        # Said by kind, not by what was left out: all evaluations of a dataset have one protocol.
        texts = any(q.request in long for ps in asked for q in ps)
        return room, "; questions whose answers are all longer left out" if texts else ""

    def answers(
        self,
        metric: str,
        asked: Sequence[Sequence[Question]],
        match: Callable[[str, Question], bool],
    ) -> list[Answer]:
        """Return the generated answer to each question, asked in one or more phrasings.

        Of several phrasings the first whose text matches, else the first.
        """
        texts = iter(self.texts(q.prompt for phrasings in asked for q in phrasings))
        found = []
        for phrasings in asked:
            said = [(question, next(texts)) for question in phrasings]
            hits = [match(text, question) for question, text in said]
            right = any(hits)
            question, text = said[hits.index(True) if right else 0]
            details = self._memory.details.get(question.prompt, {})
            # A loop that came to no answer has said nothing; how it ended is counted (`endings`).
            untyped = right or (bool(ending_of(details)) and not text.strip())
            found.append(
                Answer(
                    self.case(question),
                    question.prompt,
                    question.answers,
                    text,
                    right,
                    metric,
                    question.type,
                    "" if untyped else classify_failure(text, question.answers, question.other),
                    details,
                )
            )
        return found

    def endings(self, protocol: str, questions: Sequence[Question]) -> list[Measurement]:
        """Return how the loops that answered ended: the share of questions for each of `ENDINGS`.

        [] where no loop answered one of them; an ending of a loop's own follows.
        """
        asked = [question for question in questions if question.answers]
        if not self.generates or not asked:
            return []
        self.texts(question.prompt for question in asked)
        details = self._memory.details
        found = [ending_of(details.get(question.prompt, {})) for question in asked]
        if not any(found):
            return []
        how = f"{protocol}: {self.greedy}; the loop that answers in the model's place ended so"
        cases = [self.case(question) for question in asked]
        return [
            self.mean(
                f"ending_{name}",
                zip(cases, [float(one == name) for one in found], strict=True),
                how,
                direction="higher" if name == ENDINGS[0] else "lower",
            )
            for name in dict.fromkeys([*ENDINGS, *sorted(set(found) - {""})])
        ]

    def forced(self, asked: Sequence[Sequence[Question]]) -> list[bool]:
        """Return whether each question is answered with gold tokens before every token."""
        pairs = [
            self.pair(q.request, q.prompt, answer)
            for phrasings in asked
            for q in phrasings
            for answer in q.answers
        ]
        scores = iter(self.scores(pairs))
        # A list, not a generator: every score of a question must be taken off the iterator.
        return [any([next(scores).exact for q in ps for _ in q.answers]) for ps in asked]

    def grouped(self, questions: Sequence[Question]) -> list[list[Question]]:
        """Return the phrasings of each question; a question without a group stands alone."""
        found: dict[Any, list[Question]] = {}
        for index, question in enumerate(questions):
            named = (self.case(question), question.type, question.group)
            found.setdefault(named if question.group else index, []).append(question)
        return list(found.values())

    def case(self, question: Question) -> str:
        """Return the name of the case that a question belongs to."""
        return question.case or self.names[question.request]

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
        self,
        metric: str,
        protocol: str,
        questions: Sequence[Question],
        values: Sequence[float],
        answers: Sequence[Answer] = (),
        **more: Any,
    ) -> list[Measurement]:
        """Return the mean value over all questions, and over each type when there are any.

        `answers` go with the first alone; `more` are further arguments of `Measurement.mean`.
        """
        cases = [self.case(question) for question in questions]
        pairs = zip(cases, values, strict=True)
        found = [self.mean(metric, pairs, protocol, answers=answers, **more)]
        for only in sorted({question.type for question in questions} - {""}):
            some = [
                (case, value)
                for case, value, question in zip(cases, values, questions, strict=True)
                if question.type == only
            ]
            found.append(self.mean(f"{metric}.{only}", some, protocol, **more))
        return found


def per_case(values: Iterable[tuple[Case, float]]) -> dict[Case, float]:
    """Return the mean per case of (case, value) pairs, in the order of first appearance."""
    collected: dict[Case, list[float]] = {}
    for case, value in values:
        collected.setdefault(case, []).append(float(value))
    return {case: math.fsum(found) / len(found) for case, found in collected.items()}
