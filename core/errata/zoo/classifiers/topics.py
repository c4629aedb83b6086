"""A classifier of topics whose labels shift, on an encoder of the zoo: SCOTUS' shape.

It is not SCOTUS. GRACE edits a classifier of court opinions that was trained on old ones and meets
later ones, which the court's clerks came to file under other issue areas. Here a text is a fact of
a dataset as a sentence, and its topic the fact's relation. The classifier is taught some facts of
each topic. Later come others; some topics' are filed differently by then, each under another of
those topics. What the classifier gets wrong of the later texts is to be edited; what it got right
of the old ones is to stay.

The files `topics.train.csv` and `topics.later.csv` beside the model, about different facts, have
the fields of GRACE's SCOTUS file: errata reads them as the dataset `scotus`.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from errata.common.storage import write_bytes
from errata.errors import ConfigError
from errata.zoo.classifiers.claims import claim
from errata.zoo.classifiers.fine_tuning import ClassifierRecipe, fine_tune

if TYPE_CHECKING:
    from errata.common.progress import Progress
    from errata.edits.request import Request
    from errata.zoo.meter import TrainedModel

Text = tuple[str, str]
"""A text and its topic."""


@dataclass(frozen=True, kw_only=True)
class TopicsRecipe(ClassifierRecipe):
    """Everything that decides the classifier but the facts, the seed included."""

    topics: int = 11
    """As many as SCOTUS has issue areas."""
    shifted: int = 4
    """Of these topics, how many are filed differently later."""
    facts: int = 120
    """Of each topic; half of them are learned, half come later."""
    steps: int = 300


def texts_of(requests: Sequence[Request], recipe: TopicsRecipe) -> tuple[list[Text], list[Text]]:
    """Return the texts to learn, and the later ones with their shifted topics; drawn by the seed.

    Raises `ConfigError` when too few topics have facts enough.
    """
    by_topic: dict[str, list[str]] = {}
    for request in requests:
        if request.relation and request.target_true is not None:
            text = claim(request.text, request.joined(request.target_true))
            by_topic.setdefault(request.relation, []).append(text)
    large = sorted(topic for topic, texts in by_topic.items() if len(set(texts)) >= recipe.facts)
    if len(large) < recipe.topics or not 2 <= recipe.shifted <= recipe.topics:
        raise ConfigError(
            f"The data has {len(large)} relations with {recipe.facts} facts that have a true "
            f"object; {recipe.topics} are wanted, and at least two that shift. Give fewer facts, "
            "or other data."
        )
    rng = random.Random(recipe.seed)
    topics = rng.sample(large, recipe.topics)
    moved = topics[: recipe.shifted]
    later_topic = {
        **{topic: topic for topic in topics},
        **dict(zip(moved, [*moved[1:], moved[0]], strict=True)),
    }
    learned: list[Text] = []
    later: list[Text] = []
    for topic in topics:
        texts = rng.sample(list(dict.fromkeys(by_topic[topic])), recipe.facts)
        half = recipe.facts // 2
        learned += [(text, topic) for text in texts[:half]]
        later += [(text, later_topic[topic]) for text in texts[half:]]
    rng.shuffle(learned)
    rng.shuffle(later)
    return learned, later


def train_topics(
    requests: Sequence[Request],
    out: str | Path,
    recipe: TopicsRecipe | None = None,
    *,
    resume: bool = True,
    progress: Progress | None = None,
    save_every: int = 100,
) -> TrainedModel:
    """Fine-tune a classifier of topics into the Hugging Face directory `out`, with its texts.

    The arguments are those of `errata.zoo.classifiers.claims.train_claims`.
    """
    recipe, out = recipe or TopicsRecipe(), Path(out)
    learned, later = texts_of(requests, recipe)
    labels = sorted({topic for _, topic in learned})
    rows = [(text, labels.index(topic)) for text, topic in learned]
    *_, trained = fine_tune(
        rows, labels, out, recipe, resume=resume, progress=progress, save_every=save_every
    )
    for name, part in (("train", learned), ("later", later)):
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([("text", "label"), *part])
        write_bytes(out / f"topics.{name}.csv", table.getvalue().encode())
    return trained
