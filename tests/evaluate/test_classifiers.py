"""The classifiers behind the ConvSent measures, and how a user's own takes their place."""

from __future__ import annotations

import builtins
import json
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

from errata.errors import ConfigError, MissingExtraError
from errata.evaluate.classifiers import (
    SentimentClassifier,
    TfidfTopic,
    TopicClassifier,
    VaderSentiment,
    names,
    sentiment_classifier,
    topic_classifier,
)
from tests.helpers import shared_path

pytest.importorskip("vaderSentiment", reason="the extra 'measure' is not installed")
pytest.importorskip("sklearn", reason="the extra 'measure' is not installed")

LYON = [
    "It is a fine old city on two rivers.",
    "I like the food there, the city is known for its cooks.",
    "I have never been to that part of France.",
]
CHESS = [
    "I play it every week with my father.",
    "The queen is the strongest piece on the board.",
    "I am not good at the openings.",
]


class Stubborn:
    """A user's classifier: sure of everything."""

    def positive(self, texts: Sequence[str]) -> list[float]:
        return [1.0 for _ in texts]

    def on_topic(self, texts: Sequence[str], topics: Sequence[str]) -> list[float]:
        return [1.0 for _ in texts]


def test_sentiment_follows_the_words_and_their_negation() -> None:
    texts = ["I love it, it is wonderful!", "I like it.", "", "I do not like it.", "I hate it."]
    found = VaderSentiment().positive(texts)
    assert found == sorted(found, reverse=True)
    assert all(0 < value < 1 for value in found)
    assert found[1] > 0.5 > found[3]
    assert VaderSentiment().positive([]) == []


def test_the_probability_is_the_stated_function_of_the_score() -> None:
    # "good" has the valence 1.9 in the lexicon: c = 1.9 / √(1.9² + 15) = 0.4404, and
    # σ(4 · 0.4404 - 0.7) = 0.743.
    assert VaderSentiment().positive(["good"]) == pytest.approx([0.743], abs=1e-3)


def test_a_topic_is_known_by_its_name_and_by_texts_about_it() -> None:
    topics = TfidfTopic({"Lyon": LYON, "Chess": CHESS})
    texts = ["The city lies in France.", "He moved his queen over the board.", "Lyon is dull."]
    on_lyon = topics.on_topic(texts, ["Lyon"] * 3)
    on_chess = topics.on_topic(texts, ["Chess"] * 3)
    assert on_lyon[0] > 0.5 > on_chess[0]
    assert on_chess[1] > 0.5 > on_lyon[1]
    assert on_lyon[2] > 0.8 > 0.2 > on_chess[2]


def test_one_topic_does_not_depend_on_the_others_or_on_the_order() -> None:
    texts = ["The city lies in France.", "He moved his queen."]
    together = TfidfTopic({"Lyon": LYON, "Chess": CHESS}).on_topic(texts, ["Lyon", "Chess"])
    alone = TfidfTopic({"Lyon": LYON}).on_topic(texts[:1], ["Lyon"])
    turned = TfidfTopic({"Chess": CHESS, "Lyon": LYON}).on_topic(texts[::-1], ["Chess", "Lyon"])
    assert together == pytest.approx([alone[0], turned[0]])
    assert turned[1] == pytest.approx(alone[0])


def test_without_texts_only_the_name_counts() -> None:
    for topics in (TfidfTopic(), TfidfTopic({"Lyon": []}), TfidfTopic({"Lyon": [""]})):
        found = topics.on_topic(["Lyon is old.", "It is old."], ["Lyon", "Lyon"])
        assert found == [TfidfTopic.ONLY_NAMED, TfidfTopic.NOT_NAMED]
    assert TfidfTopic().on_topic([], []) == []
    with pytest.raises(ConfigError, match="2 texts and 1 topics"):
        TfidfTopic().on_topic(["a", "b"], ["a"])


def test_a_name_stands_as_whole_words() -> None:
    assert names("We saw the beatles live.", "The Beatles")
    assert names("Miles Davis played.", "Davis Cup")
    assert not names("Parisian food", "Paris")
    assert not names("the end of the war", "War of the Roses 2")  # words of three letters


def test_a_users_classifier_takes_the_place_of_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_users_module")
    module.Stubborn, module.ready, module.number = Stubborn, Stubborn(), 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    for given in (Stubborn(), Stubborn, "a_users_module:Stubborn", "a_users_module:ready"):
        assert sentiment_classifier(given).positive(["bad"]) == [1.0]  # type: ignore[arg-type]
        assert topic_classifier(given).on_topic(["x"], ["y"]) == [1.0]  # type: ignore[arg-type]
    assert isinstance(Stubborn(), SentimentClassifier)
    assert isinstance(Stubborn(), TopicClassifier)
    for wrong, message in (
        ("vader", "write 'package.module:name'"),
        ("a_users_module:missing", "cannot be imported"),
        ("no_such_module:x", "cannot be imported"),
        ("a_users_module:number", "needs a method 'positive'"),
        (3, "needs a method 'positive'"),
    ):
        with pytest.raises(ConfigError, match=message):
            sentiment_classifier(wrong)  # type: ignore[arg-type]


def test_the_defaults_are_the_ones_described() -> None:
    assert isinstance(sentiment_classifier(), VaderSentiment)
    found = topic_classifier(references={"Lyon": LYON}).on_topic(["The city."], ["Lyon"])
    assert found == TfidfTopic({"Lyon": LYON}).on_topic(["The city."], ["Lyon"])


@pytest.mark.parametrize(
    ("blocked", "build"), [("vaderSentiment", sentiment_classifier), ("sklearn", topic_classifier)]
)
def test_without_its_package_the_extra_is_named(
    blocked: str, build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith(blocked):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"errata\[measure\]"):
        build()


def test_they_are_as_good_as_the_documentation_says_on_replies_not_fitted_on() -> None:
    path = shared_path("data", "knowedit", "benchmark_Convsent_blender_test.json")
    records = json.loads(path.read_text(encoding="utf-8"))[400::20]  # 20 of the second half
    sentiment, right, total = VaderSentiment(), 0, 0
    for record in records:
        right += sum(value > 0.5 for value in sentiment.positive(record["pos"]))
        right += sum(value <= 0.5 for value in sentiment.positive(record["neg"]))
        total += len(record["pos"]) + len(record["neg"])
    assert right / total > 0.75
    right = total = 0
    for own, other in zip(records, [*records[1:], records[0]], strict=True):
        replies = own["pos"] + own["neg"]
        for index, reply in enumerate(replies):
            topics = TfidfTopic(
                {
                    "own": replies[:index] + replies[index + 1 :],
                    "other": other["pos"] + other["neg"],
                }
            )
            on, off = topics.on_topic([reply, reply], ["own", "other"])
            right += (on > 0.5) + (off <= 0.5)
            total += 2
            break
    assert right / total > 0.6
