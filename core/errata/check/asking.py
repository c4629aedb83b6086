"""Asking a model what a file of facts wants to know, and judging the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.check.base_answers import BaseAnswer, RecordedAnswers, answer_logprobs, texts_now
from errata.check.fact_file import FactFile, FactTest
from errata.check.result import CheckReport, FactResult
from errata.common.sentences import first_sentence
from errata.evaluate.matching import contained_match, exact_match, normalise
from errata.model.generation import require_generation
from errata.model.model import Model

if TYPE_CHECKING:
    from errata.editor import Editor

SHOWN = 60
"""Characters of a text that a sentence repeats."""
SAME = "the base, with every edit off"


def check_facts(
    model: Editor | Model,
    facts: FactFile | Sequence[FactTest],
    recorded: RecordedAnswers | None = None,
    *,
    source: str = "facts",
    changed: bool | None = None,
) -> CheckReport:
    """Ask a model as it stands, and say what of the facts holds.

    What must not change is compared with what was recorded; without a record, with the base of
    the same model (asked once, every edit off), where an edit is on it.

    Args:
        model: an editor, or its model.
        facts: a file of facts, or questions.
        recorded: answers that must not change.
        source: what the report calls the facts.
        changed: whether the model differs from its base, say by an adapter; None: whether edits
            are on it.

    Raises:
        CapabilityError: the model generates no text.
        ConfigError: a record that lacks a question.
    """
    own = model if isinstance(model, Model) else model.model
    require_generation(own)
    tests = facts.tests() if isinstance(facts, FactFile) else list(facts)
    of_base = [test for test in tests if test.of_base]
    active = tuple(own.stack.ids)
    compared = "nothing"
    if recorded is not None and of_base:
        compared = f"what was recorded of {recorded.model} ({recorded.fingerprint[:12]})"
    elif of_base and (active if changed is None else changed):
        recorded = RecordedAnswers.ask(own, tests)
        compared = SAME
    with own.access.running():  # one state of the model for all questions
        results = _results(own, tests, recorded)
    return CheckReport(source, own.name, active, compared, results)


def _results(
    model: Model, tests: Sequence[FactTest], recorded: RecordedAnswers | None
) -> tuple[FactResult, ...]:
    bases: list[BaseAnswer | None] = [
        recorded.of(test) if test.of_base and recorded is not None else None for test in tests
    ]
    asked = [t for t, base in zip(tests, bases, strict=True) if base is not None or not t.of_base]
    texts = texts_now(model, [t for t in asked if t.criterion != "probability" or t.never])
    by_chance = [t for t in asked if t.criterion == "probability"]
    answers = [
        _forms(test, base)
        for test, base in zip(tests, bases, strict=True)
        if test.criterion == "probability" and (base is not None or not test.of_base)
    ]
    flat = [(t, form) for t, forms in zip(by_chance, answers, strict=True) for form in forms]
    chances = answer_logprobs(model, [t for t, _ in flat], [form for _, form in flat], whole=True)
    best: dict[int, float] = {}
    for (test, _), chance in zip(flat, chances, strict=True):
        if chance is not None:
            best[id(test)] = max(chance, best.get(id(test), -math.inf))
    return tuple(
        _judged(test, base, texts.get(test.key, ""), best.get(id(test)))
        for test, base in zip(tests, bases, strict=True)
    )


def _forms(test: FactTest, base: BaseAnswer | None) -> tuple[str, ...]:
    return test.answers if base is None else (first_sentence(base.text),)


def _judged(
    test: FactTest, base: BaseAnswer | None, said: str, logprob: float | None
) -> FactResult:
    """Return whether an answer is right, and why not."""
    if test.of_base and base is None:
        return FactResult(test, "skipped", why="no edit is on the model and nothing was recorded")
    chance = None if logprob is None else math.exp(logprob)
    before = None if base is None else base.text
    why = _forbidden(test, said) or _wrong(test, base, said, chance)
    return FactResult(test, "failed" if why else "passed", said, chance, before, why)


def _forbidden(test: FactTest, said: str) -> str:
    found = next((text for text in test.never if contained_match(said, [text])), None)
    return "" if found is None else f"it says {found!r}: {_shown(said)}"


def _wrong(test: FactTest, base: BaseAnswer | None, said: str, chance: float | None) -> str:
    if test.section == "must_not_say":
        return ""
    if base is not None:
        if test.criterion == "probability":
            return _less_probable(test, base, chance)
        same = normalise(first_sentence(said)) == normalise(first_sentence(base.text))
        return "" if same else f"it was {_shown(base.text)}, it is {_shown(said)}"
    wanted = " or ".join(map(repr, test.answers[:3])) + (" …" if len(test.answers) > 3 else "")
    if test.criterion == "probability":
        enough = chance is not None and chance >= test.at_least
        return "" if enough else f"P({wanted}) is {chance or 0:.3g}, less than {test.at_least:g}"
    match = exact_match if test.criterion == "exact" else contained_match
    if match(said, test.answers):
        return ""
    how = "does not say" if test.criterion == "contained" else "does not say exactly"
    return f"it {how} {wanted}: {_shown(said)}"


def _less_probable(test: FactTest, base: BaseAnswer, chance: float | None) -> str:
    if base.logprob is None:
        return ""
    before = math.exp(base.logprob)
    if chance is not None and chance >= test.at_least * before:
        return ""
    return (
        f"P({_shown(first_sentence(base.text))}) fell from {before:.3g} to {chance or 0:.3g}, to "
        f"less than {test.at_least:g} of it"
    )


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else f"{line[: SHOWN - 1]}…")
