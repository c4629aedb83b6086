"""A classifier of topics whose labels shift: what it learns, what comes later, and the command."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import Editor, Request
from errata.cli.app import app
from errata.datasets import load
from errata.errors import ConfigError
from errata.zoo.classifiers.topics import TopicsRecipe, texts_of, train_topics
from tests.families import saved
from tests.helpers import interrupted

TOPICS = ("capital", "language", "currency")
NAMES = ("France", "Spain", "Italy", "Texas", "Germany", "London")
REQUESTS = [
    Request(prompt=f"The {topic} of {{}} is", subject=name, target_true="Paris", target_new="Rome",
            relation=topic)
    for topic in TOPICS
    for name in NAMES
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> TopicsRecipe:
    return TopicsRecipe(
        base=saved("bert", tmp_path / "base"),
        topics=3,
        shifted=2,
        facts=6,
        steps=4,
        rows=4,
        warmup=1,
    )


def test_some_topics_are_filed_under_others_later(recipe: TopicsRecipe) -> None:
    learned, later = texts_of(REQUESTS, recipe)
    assert not {text for text, _ in learned} & {text for text, _ in later}
    assert all(f"The {topic} of" in text for text, topic in learned)
    filed = {(text.split()[1], topic) for text, topic in later}
    assert len(filed) == 3  # one way for each topic
    assert sum(topic != label for topic, label in filed) == recipe.shifted
    assert {label for _, label in filed} == set(TOPICS)
    with pytest.raises(ConfigError, match=r"has 3 relations with 6 facts.*4 are wanted"):
        texts_of(REQUESTS, TopicsRecipe(topics=4, facts=6))


def test_an_interrupted_training_ends_the_same_and_its_labels_can_be_edited(
    recipe: TopicsRecipe, tmp_path: Path
) -> None:
    whole = interrupted(partial(train_topics, REQUESTS, recipe=recipe), tmp_path)

    learned, later = (
        load("scotus", whole / f"topics.{name}.csv").requests() for name in ("train", "later")
    )
    assert [len(learned), len(later)] == [9, 9]
    with Editor(str(whole), guards={"perplexity": "off"}) as editor:
        assert set(editor.model.config.label2id) == set(TOPICS)
        edit = editor.edit(later[0], method="ft", config={"lr": 1e-2, "steps": 60})
        assert edit.outcome.efficacy is not None
        assert edit.outcome.efficacy.value == 1.0


def test_the_command_asks_for_facts_and_knows_its_models(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "m")]
    result = CliRunner().invoke(app, ["zoo", "train", "topics", *out])
    assert result.exit_code == 1
    assert "a relation" in result.stderr
    result = CliRunner().invoke(app, ["zoo", "train", "topic", *out])
    assert result.exit_code == 1
    assert "topics" in result.stderr
