"""Overlap of the layers identified, chains of facts, and phrasings side by side."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest

from errata import Request, plots
from errata.datasets import load
from errata.edits.request import Probe
from errata.errors import ConfigError
from errata.locate import LayerOverlap, chain_sets, identified, layer_overlap, rsim
from tests.helpers import ROOT

SAMPLES = ROOT / "tests" / "data" / "datasets"

SETS = [
    [[9.0, 8, 1, 0, 0.5], [9.0, 1, 8, 0, 0.5]],
    [[0.0, 1, 2, 9, 8], [1.0, 0, 2, 9, 8], [0.0, 1, 9, 2, 8]],
    [[5.0, 4, 3, 2, 1]],
]


def test_the_layers_identified_are_the_highest() -> None:
    assert identified([0.1, -5.0, 0.3, 0.2], 3) == [2, 3, 0]
    assert identified([1.0, 2.0, 2.0, 1.0], 3) == [1, 2, 0]  # of equal ones the lower


def test_the_overlap_at_each_number_of_layers_is_counted_pair_by_pair() -> None:
    found = layer_overlap(SETS)
    assert (found.layers, found.sets, found.prompts) == (5, 2, 6)
    np.testing.assert_allclose(found.chance, [0.2, 0.4, 0.6, 0.8, 1.0])
    for k in range(1, 6):
        chosen = [[frozenset(identified(row, k)) for row in group] for group in SETS]
        inner = [
            np.mean([len(a & b) / k for a, b in combinations(group, 2)]) for group in chosen[:2]
        ]
        outer = [
            len(a & b) / k
            for one, other in combinations(chosen, 2) for a in one for b in other
        ]  # fmt: skip
        assert found.within[k - 1] == pytest.approx(np.mean(inner))
        assert found.across[k - 1] == pytest.approx(np.mean(outer))
        expected = rsim(chosen, lambda a, b, k=k: len(a & b) / k)  # type: ignore[misc]
        assert found.rsim[k - 1] == pytest.approx(expected.value)
        ends = found.rsim_low[k - 1], found.rsim_high[k - 1]
        assert ends == pytest.approx(expected.interval)
        assert found.within_low[k - 1] <= found.within[k - 1] <= found.within_high[k - 1]
    assert found.rsim[-1] == 0  # every choice of all layers is the same


def test_random_profiles_overlap_by_chance() -> None:
    rows = np.random.default_rng(0).random((60, 10))
    found = layer_overlap(rows.reshape(20, 3, 10).tolist())
    np.testing.assert_allclose(found.across, found.chance, atol=0.03)
    np.testing.assert_allclose(found.within, found.chance, atol=0.1)


def test_an_overlap_is_plain_data_and_drawn() -> None:
    found = layer_overlap(SETS)
    again = LayerOverlap.from_json(json.loads(json.dumps(found.as_json(), allow_nan=False)))
    assert again.as_json() == found.as_json()
    figure = plots.layer_overlaps({"paraphrases": again, "relations": found}, "by hand")
    titles = [ax.get_title() for ax in figure.axes]
    assert titles == ["paraphrases: 2 sets, 6 prompts", "relations: 2 sets, 6 prompts", ""]
    drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_allclose(drawn["random choices, k / L"], found.chance)
    with pytest.raises(ConfigError, match="no overlap to draw"):
        plots.layer_overlaps({})
    longer = layer_overlap([[[*row, 0.0] for row in group] for group in SETS])
    with pytest.raises(ConfigError, match=r"\[5, 6\] layers"):
        plots.layer_overlaps({"a": found, "b": longer})
    with pytest.raises(ConfigError, match="different numbers of layers"):
        layer_overlap([SETS[0], [[1.0, 2.0], [2.0, 1.0]]])
    with pytest.raises(ConfigError, match="at least two"):
        layer_overlap(SETS[:1])


def test_a_chain_is_the_fact_with_what_is_asked_through_it() -> None:
    fact = Request(
        prompt="The spouse of {} is", subject="Ann Druyan", target_new="x", target_true="Carl",
        case_id="1", portability=(
            Probe(prompt="The employer of the spouse of Ann Druyan is", type="reasoning"),
            Probe(prompt="Who married Ann Druyan?", type="single_hop"),
            Probe(prompt="Where does the man work?", type="multi_hop"),  # no subject in it
            Probe(prompt="The spouse of Annie is", type="subject_alias"),
            Probe(prompt="The wife of Carl is Ann Druyan", type="logical_generalisation"),
        ),
    )  # fmt: skip
    alone = fact.model_copy(update={"case_id": "2", "portability": ()})
    other = Request(
        prompt="{} teaches at", subject="Cornell", target_new="y", target_true="z", case_id="1"
    )
    (group,) = chain_sets([fact, alone, other])
    assert [one.text for one in group] == [
        fact.text, "The employer of the spouse of Ann Druyan is", "Who married Ann Druyan?",
        other.text,
    ]  # fmt: skip
    # What the probes answer holds after the edit: each prompt follows what the model says.
    assert {one.target_true for one in group} == {None}
    assert [len(group) for group in chain_sets([fact, other], size=2)] == [2]


@pytest.mark.parametrize(
    ("name", "file", "asked"),
    [
        ("knowedit", "knowedit_wiki.json", "The currency of Berta Quill's country is"),
        ("mquake", "mquake.json", "Which instrument does Berta Quill play?"),
        ("klob", "klob_r.jsonl", "the employer of the spouse of Berta Quill is"),
    ],
)
def test_published_records_hold_chains(name: str, file: str, asked: str) -> None:
    groups = chain_sets(load(name, SAMPLES / file).requests())
    assert asked in [one.text for group in groups for one in group]
    assert all(len(group) > 1 for group in groups)
