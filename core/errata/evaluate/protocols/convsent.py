"""ConvSent, the part of `knowedit` for `sentiment` requests: feeling about a topic, and the rest.

Success is z_sentiment · z_topic, in two forms: from the likelihood of known replies (SERAC,
Mitchell et al. 2022), and from what classifiers say of generated replies. Locality is the
divergence from the base on prompts about other topics.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from errata.errors import MissingExtraError
from errata.evaluate.classifiers import (
    SentimentClassifier,
    TopicClassifier,
    sentiment_classifier,
    topic_classifier,
)

if TYPE_CHECKING:
    from errata.contract.measurement import Measurement
    from errata.edits.request import Request
    from errata.evaluate.reader import Reader

logger = logging.getLogger("errata")


def measure(reader: Reader, protocol: str) -> list[Measurement]:
    """Return sentiment and topic by likelihood and by classifier, and KL locality."""
    asked = {i: r for i, r in enumerate(reader.requests) if r.kind == "sentiment"}
    if not asked:
        return []
    return [
        *_by_likelihood(reader, protocol, asked),
        *_by_classifier(reader, protocol, asked),
        *_kl_locality(reader, protocol, asked),
    ]


def reply_likelihood(reader: Reader, request: Request, replies: Sequence[str]) -> float:
    """Return the mean log-probability, in nats, of a token of these replies to a request.

    Reply k follows phrasing k of the question (round and round), where the authors draw one.
    """
    prompts = (request.text, *request.paraphrases)
    said = [request.joined(reply.strip()) for reply in replies]
    pairs = [(prompts[k % len(prompts)], reply) for k, reply in enumerate(said)]
    logprobs = [value for score in reader.scores(pairs) for value in score.logprobs]
    return math.fsum(logprobs) / len(logprobs)


def _by_likelihood(
    reader: Reader, protocol: str, asked: Mapping[int, Request]
) -> list[Measurement]:
    """Return z_sentiment = σ(l⁺ − l⁻), z_topic = min(1, exp(l⁺ − l⁺ of the base)), and both."""
    found: dict[str, list[tuple[int, float]]] = {}
    for i, request in asked.items():
        wished, unwished = (
            [reply for reply in replies if reply.strip()]
            for replies in (request.examples, request.counterexamples)
        )
        if not wished or not unwished:
            continue
        likely = reply_likelihood(reader, request, wished)
        sentiment = _sigmoid(likely - reply_likelihood(reader, request, unwished))
        found.setdefault("z_sentiment", []).append((i, sentiment))
        if reader.base is not None:
            before = reply_likelihood(reader.base, request, wished)
            topic = math.exp(min(0.0, likely - before))
            found.setdefault("z_topic", []).append((i, topic))
            found.setdefault("sentiment_success", []).append((i, sentiment * topic))
    rules = {
        "z_sentiment": "σ(l⁺ − l⁻)",
        "z_topic": "min(1, exp(l⁺ − l⁺ of the unedited model))",
        "sentiment_success": "σ(l⁺ − l⁻) · min(1, exp(l⁺ − l⁺ of the unedited model))",
    }
    how = "l the mean token log-probability of the wished (⁺) and the opposite (⁻) replies"
    return [
        reader.mean(f"{name}_likelihood", values, f"{protocol}: {rules[name]}, {how}", unit="score")
        for name, values in found.items()
    ]


def _by_classifier(
    reader: Reader, protocol: str, asked: Mapping[int, Request]
) -> list[Measurement]:
    """Return how far generated replies have the wished sentiment, and are about the topic."""
    if not reader.generates:
        return []
    try:
        judge = sentiment_classifier(reader.settings.sentiment)
        topics = topic_classifier(
            reader.settings.topic,
            {r.subject: (*r.examples, *r.counterexamples) for r in asked.values()},
        )
    except MissingExtraError as error:
        logger.warning("Sentiment and topic of generated replies are left out: %s", error)
        return []
    questions = [
        (i, prompt)
        for i, request in asked.items()
        for prompt in (request.text, *request.paraphrases, *request.generation)
    ]
    texts = [text.strip() for text in reader.texts(prompt for _, prompt in questions)]
    wishes = {i: wishes_positive(request, judge) for i, request in asked.items()}
    positive = judge.positive(texts)
    about = topics.on_topic(texts, [asked[i].subject for i, _ in questions])
    sentiment = [
        value if wishes[i] else 1 - value for (i, _), value in zip(questions, positive, strict=True)
    ]
    how = f"{protocol}: {reader.greedy}; {_named(judge)} and {_named(topics)} on the replies: "
    cases = [i for i, _ in questions]
    return [
        reader.mean(
            f"{name}_generated", zip(cases, values, strict=True), f"{how}{rule}", unit="score"
        )
        for name, values, rule in (
            ("z_sentiment", sentiment, "probability of the wished sentiment"),
            ("z_topic", about, "probability of the topic"),
            (
                "sentiment_success",
                [a * b for a, b in zip(sentiment, about, strict=True)],
                "product of the probabilities of sentiment and topic",
            ),
        )
    ]


def wishes_positive(request: Request, judge: SentimentClassifier) -> bool:
    """Return whether a request asks for the positive sentiment.

    Its relation or its target is "positive" or "negative"; or else the classifier says so of its
    examples against its counterexamples.
    """
    for said in (request.relation, request.target_new):
        if said is not None and said.strip().casefold() in ("positive", "negative"):
            return said.strip().casefold() == "positive"
    wished = judge.positive(request.examples or (request.target_new,))
    opposite = judge.positive(request.counterexamples) if request.counterexamples else [0.5]
    return sum(wished) / len(wished) > sum(opposite) / len(opposite)


def _kl_locality(reader: Reader, protocol: str, asked: Mapping[int, Request]) -> list[Measurement]:
    """Return the mean divergence from the base on other topics; the retained probes without any."""
    from errata.evaluate.divergence import kl_to_base

    if reader.base is None:
        return []
    prompts: list[tuple[int | str, str]] = [
        (i, probe.prompt) for i, request in asked.items() for probe in request.locality
    ] or [(f"retain-{k}", probe.prompt) for k, probe in enumerate(reader.settings.retain)]
    if not prompts:
        return []
    values = kl_to_base(reader, [prompt for _, prompt in prompts])
    cases = [case for case, _ in prompts]
    how = (
        f"{protocol}: KL(unedited ‖ edited), mean over the next-token distributions of prompts on "
        "other topics"
    )
    pairs = zip(cases, values, strict=True)
    return [reader.mean("kl_locality", pairs, how, unit="nats", direction="lower")]


def _named(judge: SentimentClassifier | TopicClassifier) -> str:
    return type(judge).__name__


def _sigmoid(value: float) -> float:
    # exp of a large positive number overflows
    return 1 / (1 + math.exp(-value)) if value > 0 else 1 - 1 / (1 + math.exp(value))
