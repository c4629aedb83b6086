"""KnowEdit (Zhang et al. 2024): six subsets, each in the schema it was published in."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from errata.datasets.call_schema import records_of_calls
from errata.datasets.counterfact import case_id, one_hop
from errata.datasets.probes import listed, paired
from errata.datasets.reader import Item, parsed
from errata.datasets.record import Record, probes
from errata.datasets.source import Source, open_source
from errata.edits.request import Probe, Request
from errata.errors import ConfigError, DatasetError, UnknownNameError

SENTIMENTS = ("positive", "negative")
FORGET, RETAIN = ("K_F", "success"), ("K_R", "locality")
"""Sanitation's lists: what to forget (training, test), and what every edit must leave."""
SAME_ANSWER = "same_answer"
"""Type of the probes that ask another question with the answer that is to be forgotten."""
OPINION = "What do you think of {}?"
OPINIONS = (
    "What do you feel about {}?",
    "How do you view {}?",
    "What is your opinion of {}?",
    "What is your impression of {}?",
)
"""Ways of asking for an opinion that the data was made for (Mitchell et al. 2022, SERAC)."""
HEADER = "This is a Wikipedia passage about "
"""How every text of WikiBio begins, the subject after it (Hartvigsen et al. 2023, GRACE)."""


def read(
    source: Source,
    subset: str | None = None,
    sentiment: str | None = None,
    seed: int = 0,
    test: str | None = None,
) -> Iterator[Item]:
    """Yield the requests of one file.

    Args:
        source: the file.
        subset: one of `SUBSETS`; by default each record shows what it is.
        sentiment: "positive" or "negative" for all topics of ConvSent; by default drawn for each,
            as the authors do.
        seed: of that draw.
        test: Sanitation's test file, where the source is its training file: the edits of one answer
            are a case, tested with that file's questions.
    """
    if subset is not None and subset not in SUBSETS:
        raise UnknownNameError("subset of KnowEdit", subset, SUBSETS)
    if sentiment is not None and sentiment not in SENTIMENTS:
        raise ConfigError(f"sentiment is {sentiment!r}; it must be positive or negative.")
    if test is not None:
        yield from _sanitation_tested(source, open_source(test))
        return
    other: str | None = None
    for record in records_of_calls(source):
        if isinstance(record, DatasetError):
            yield record
            continue
        kind = detect(record)
        if subset is not None and kind is not SUBSETS[subset]:
            yield record.bad("", f"is not in the schema of the subset {subset}")
        elif kind is None:
            yield record.bad("", "is in none of KnowEdit's schemas: " + ", ".join(SUBSETS))
        elif kind is sanitation:
            yield from _sanitation_file(record)
        elif kind is convsent:
            yield from parsed(record, convsent, sentiment=sentiment, seed=seed, other=other)
            other = record.optional_text("ent") if isinstance(record.get("ent"), str) else None
        else:
            yield from parsed(record, kind)


def detect(record: Record) -> Callable[..., Request] | None:
    """Return how to parse a record, by the fields it has."""
    if record.has("ent"):
        return convsent
    if record.has("text", "labels"):
        return wikibio
    if record.has("question") or any(record.has(field) for field in FORGET):
        return sanitation
    if record.has("prompt"):
        if record.has("cond") or record.has("rephrase_prompt"):
            return zsre
        return wiki_counterfact if record.has("ground_truth") else wiki_recent
    return None


def zsre(record: Record) -> Request:
    """Return a question with a new answer."""
    return _fact(record, "modify", paraphrases=record.texts("rephrase_prompt"))


def wiki_counterfact(record: Record) -> Request:
    """Return a fact with a counterfactual object."""
    return _fact(record, "modify")


def wiki_recent(record: Record) -> Request:
    """Return a fact that is new: there is no true answer to write over."""
    return _fact(record, "insert")


def wikibio(record: Record) -> Request:
    """Return a text whose continuation is to be replaced by a true sentence."""
    concept = record.text("concept")
    text = record.text("text")
    if text.startswith(HEADER + concept):
        # The name may come back in the text; the one in the header is the subject.
        template, subject = text.replace(concept, "{}", 1), concept
    else:
        template, subject = record.place("text", concept)
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("labels"),
        kind="text",
        locality=listed(record, "locality"),
    )


def convsent(record: Record, sentiment: str | None, seed: int, other: str | None) -> Request:
    """Return a topic and the opinion to have of it; `relation` says which.

    `other` is the topic before it in the file; the opinion of that one must not change.
    """
    topic = record.text("ent")
    chosen = sentiment or random.Random(f"{seed}:{record.index}").choice(SENTIMENTS)
    replies = {"positive": record.texts("pos"), "negative": record.texts("neg")}
    wanted, unwanted = replies.pop(chosen), next(iter(replies.values()))
    if not wanted:
        raise record.bad(chosen[:3], f"holds no {chosen} reply")
    return record.request(
        prompt=OPINION,
        subject=topic,
        target_new=wanted[0],
        kind="sentiment",
        relation=chosen,
        paraphrases=tuple(asked.replace("{}", topic) for asked in OPINIONS),
        locality=probes([OPINION.replace("{}", other)] if other else [], (), "neighbourhood"),
        examples=wanted,
        counterexamples=unwanted,
    )


def sanitation(record: Record) -> Request:
    """Return a question whose answer is to be forgotten.

    The held-out questions of the test file name no subject: there the whole question is it.
    """
    question = record.text("question")
    subject = record.optional_text("subject")
    template, subject = record.place("question", subject) if subject else ("{}", question)
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("target_new"),
        target_true=record.optional_text("ground_truth"),
        kind="erase",
    )


def _retained(record: Record) -> Probe:
    return Probe(prompt=record.text("question"), answers=record.answers("ground_truth"))


def _sanitation_file(record: Record) -> Iterator[Item]:
    """Yield what a Sanitation file holds: one object with two lists, or plain questions."""
    if record.has("question"):
        yield from parsed(record, sanitation)
        return
    for field in RETAIN:
        for part in record.parts(field):
            yield from parsed(part, lambda part: [_retained(part)])
    for field in FORGET:
        for part in record.parts(field):
            yield from parsed(part, sanitation)


def _sanitation_tested(source: Source, test: Source) -> Iterator[Item]:
    """Yield the edits of the training file, tested with what the test file holds.

    The lists ask different questions about the same answers: an answer is forgotten when its other
    questions are declined, too. So the edits of one answer are a case, and question k of the test
    file about it is a probe of edit k (round and round).
    """
    edits, asked = _only(source, FORGET[0]), _only(test, FORGET[1])
    for part in asked.parts(RETAIN[1]):
        yield from parsed(part, lambda part: [_retained(part)])
    cases: dict[str, list[Request]] = {}
    for part in edits.parts(FORGET[0]):
        for item in parsed(part, sanitation):
            if isinstance(item, Request):
                cases.setdefault(_answer(item), []).append(item)
            else:
                yield item
    held_out: dict[str, list[Request]] = {answer: [] for answer in cases}
    for part in asked.parts(FORGET[1]):
        for item in parsed(part, sanitation):
            if not isinstance(item, Request):
                yield item
            elif _answer(item) not in cases:
                yield part.bad("ground_truth", f"{item.target_true!r} is the answer of no edit")
            else:
                held_out[_answer(item)].append(item)
    for answer, requests in cases.items():
        for place, request in enumerate(requests):
            questions = held_out[answer][place :: len(requests)]
            yield request.model_copy(
                update={
                    "case_id": answer,
                    "portability": tuple(
                        Probe(prompt=q.text, answers=(q.target_new,), type=SAME_ANSWER)
                        for q in questions
                    ),
                }
            )


def _only(source: Source, field: str) -> Record:
    """Return the one record of a Sanitation file with this list."""
    for record in source.records():
        if record.has(field):
            return record
    raise DatasetError(
        f"holds no list {field!r}: with the option test the path is Sanitation's training file "
        f"({', '.join(name for name, _ in (FORGET, RETAIN))}), and test its test file "
        f"({', '.join(name for _, name in (FORGET, RETAIN))})",
        file=source.name,
    )


def _answer(request: Request) -> str:
    """Return the answer that is to be forgotten, in one spelling: the files write it in several."""
    return (request.target_true or "").casefold()


def _fact(record: Record, kind: str, **more: Any) -> Request:
    template, subject = record.place("prompt", record.text("subject"))
    true = record.answers("ground_truth")
    return record.request(
        prompt=template,
        subject=subject,
        target_new=record.text("target_new"),
        target_true=true[0] if true else None,
        kind=kind,
        case_id=case_id(record),
        locality=(
            *listed(record, "locality"),
            *paired(record, "locality_prompt", "locality_ground_truth", "neighbourhood"),
        ),
        portability=(*listed(record, "portability"), *one_hop(record)),
        **more,
    )


SUBSETS: dict[str, Callable[..., Request]] = {
    "ZsRE": zsre,
    "wiki_counterfact": wiki_counterfact,
    "wiki_recent": wiki_recent,
    "WikiBio": wikibio,
    "ConvSent": convsent,
    "Sanitation": sanitation,
}
