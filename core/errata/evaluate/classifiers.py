"""Who says whether a generated text is positive, and whether it is on its topic: pluggable.

What is measured with a classifier is no better than the classifier. How good the two that come
with errata are, measured on the ConvSent data, stands in docs/results/classifiers.md.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from errata.errors import ConfigError, MissingExtraError
from errata.evaluate.matching import contained_match

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXTRA = "measure"


@runtime_checkable
class SentimentClassifier(Protocol):
    """Says how likely texts are positive."""

    def positive(self, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is positive, between 0 and 1."""


@runtime_checkable
class TopicClassifier(Protocol):
    """Says how likely texts are about their topics."""

    def on_topic(self, texts: Sequence[str], topics: Sequence[str]) -> list[float]:
        """Return the probability that each text is about the topic at its place, 0 to 1."""


def sentiment_classifier(given: SentimentClassifier | str | None = None) -> SentimentClassifier:
    """Return the classifier that is meant.

    Args:
        given: a classifier; "package.module:name" of one, or of what makes one when it is called
            without arguments; None for `VaderSentiment`.

    Raises:
        ConfigError: there is nothing by that name, or it is no classifier.
        MissingExtraError: the default's package is not installed.
    """
    if given is None:
        return VaderSentiment()
    return cast(SentimentClassifier, _resolved(given, "sentiment", "positive"))


def topic_classifier(
    given: TopicClassifier | str | None = None,
    references: Mapping[str, Sequence[str]] | None = None,
) -> TopicClassifier:
    """Return the classifier that is meant; see `sentiment_classifier`.

    Args:
        given: a classifier or "package.module:name"; None for `TfidfTopic(references)`.
        references: texts that are known to be about a topic, by topic.
    """
    if given is None:
        return TfidfTopic(references)
    return cast(TopicClassifier, _resolved(given, "topic", "on_topic"))


class VaderSentiment:
    """VADER, the rule-based sentiment lexicon, with its score turned into a probability.

    The compound score c, between -1 and 1, becomes σ(4.0 c - 0.7): a logistic fit on the replies
    of the first 400 records of ConvSent (8,000 replies of a chat model). A text without a word of
    the lexicon has c = 0 and thus 0.33: a neutral reply is more often meant negatively there.

    Hutto and Gilbert 2014, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text. English only.

    >>> positive, negative = VaderSentiment().positive(["I love it!", "I do not like it."])
    >>> positive > 0.8, negative < 0.3
    (True, True)
    """

    SLOPE, OFFSET = 4.0, -0.7

    def __init__(self) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise MissingExtraError(
                "The default sentiment classifier", "vaderSentiment", EXTRA
            ) from error
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def positive(self, texts: Sequence[str]) -> list[float]:
        """Return the probability that each text is positive."""
        scores = [self._analyzer.polarity_scores(text)["compound"] for text in texts]
        return [_logistic(self.SLOPE * score + self.OFFSET) for score in scores]


class TfidfTopic:
    """Likeness to texts that are known to be on the topic, and whether the topic is named.

    A text is compared with the centre of the topic's known texts: tf-idf vectors (logarithmic
    counts, inverse document frequencies from the general text that ships with errata, so that a
    result does not depend on what else is measured), cosine. A topic is named where its name
    stands in the text as whole words, or one of the name's words of more than three letters. The
    probability is σ(9.5 cosine + 4.4 named - 2.1), a logistic fit on the replies of the first
    400 records of ConvSent against those about another topic. For a topic without known texts
    only the name counts: 0.99 where it is named, 0.47 where it is not (same data).

    Args:
        references: texts about each topic, by topic. A text that is among its topic's is like
            itself: leave what is to be judged out.

    >>> topics = TfidfTopic({"Lyon": ["It is a fine old city on two rivers in France."]})
    >>> on, off = topics.on_topic(["The city lies in France.", "He scored twice."], ["Lyon"] * 2)
    >>> on > 0.5 > off
    True
    """

    COSINE, NAMED, OFFSET = 9.5, 4.4, -2.1
    ONLY_NAMED, NOT_NAMED = 0.99, 0.47

    def __init__(self, references: Mapping[str, Sequence[str]] | None = None) -> None:
        try:
            from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        except ImportError as error:
            raise MissingExtraError(
                "The default topic classifier", "scikit-learn", EXTRA
            ) from error
        self._references = {topic: list(texts) for topic, texts in (references or {}).items()}
        self._centres: dict[str, NDArray[np.float64] | None] = {}
        # Hashed words have no vocabulary: one that the general text lacks counts as rare.
        self._counter: Any = HashingVectorizer(alternate_sign=False, norm=None)
        self._transformer: Any = TfidfTransformer(sublinear_tf=True)

    def on_topic(self, texts: Sequence[str], topics: Sequence[str]) -> list[float]:
        """Return the probability that each text is about the topic at its place."""
        if len(texts) != len(topics):
            raise ConfigError(
                f"{len(texts)} texts and {len(topics)} topics were given: give one topic each."
            )
        if not texts:
            return []
        vectors = self._vectors(texts)
        return [
            self._one(text, vectors[row], topic)
            for row, (text, topic) in enumerate(zip(texts, topics, strict=True))
        ]

    def _one(self, text: str, vector: Any, topic: str) -> float:
        named = names(text, topic)
        centre = self._centre(topic)
        if centre is None:
            return self.ONLY_NAMED if named else self.NOT_NAMED
        cosine = float((vector @ centre).item())  # both have length one (or zero)
        return _logistic(self.COSINE * cosine + self.NAMED * named + self.OFFSET)

    def _centre(self, topic: str) -> NDArray[np.float64] | None:
        """Return the direction (features,) of the topic's known texts; None without any."""
        import numpy as np

        if topic not in self._centres:
            known = self._references.get(topic)
            total = np.asarray(self._vectors(known).sum(axis=0)).ravel() if known else None
            length = 0.0 if total is None else float(np.linalg.norm(total))
            self._centres[topic] = total / length if total is not None and length else None
        return self._centres[topic]

    def _vectors(self, texts: Sequence[str]) -> Any:
        """Return (texts, features) sparse rows of length one."""
        return self._weights.transform(self._counter.transform(texts))

    @cached_property
    def _weights(self) -> Any:
        """The inverse document frequencies of general English; a document is a sentence."""
        from errata.zoo.atlas.corpus import shipped_text

        sentences = [
            sentence
            for paragraph in shipped_text("heldout")
            for sentence in re.split(r"(?<=[.!?]) +", paragraph)
        ]
        return self._transformer.fit(self._counter.transform(sentences))


def names(text: str, topic: str) -> bool:
    """Return whether a text names a topic: its name, or one of the name's longer words.

    >>> names("I like the Beatles.", "The Beatles"), names("The end.", "The Beatles")
    (True, False)
    """
    words = [word for word in topic.split() if len(word) > 3]
    return contained_match(text, [topic, *words])


def _resolved(given: Any, role: str, method: str) -> Any:
    """Return a classifier from an object, a class or a name; say what is wrong otherwise."""
    found = _imported(given, role) if isinstance(given, str) else given
    if isinstance(found, type) or (callable(found) and not hasattr(found, method)):
        found = found()
    if not callable(getattr(found, method, None)):
        raise ConfigError(
            f"{role}={given!r} is no {role} classifier: it needs a method {method!r} as described "
            "in errata.evaluate.classifiers."
        )
    return found


def _imported(name: str, role: str) -> Any:
    module, _, path = name.partition(":")
    if not module or not path:
        raise ConfigError(
            f"{role}={name!r} names no classifier: write 'package.module:name', or leave it out "
            "for the default."
        )
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{role}={name!r} cannot be imported: {error}") from error
    return found


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value))
