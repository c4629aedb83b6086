"""WISE: masks, shards, TIES, and the defects of the published code that are not repeated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers.activations import ACT2FN

from errata.contract.registry import Registry
from errata.model.forward import trace
from errata.model.running import prepare, run
from errata_wise import WiseConfig
from errata_wise.delta import ShardDelta, packed, unpacked
from errata_wise.memories import Settings, Shards, moved, ties
from tests.families import build_model
from tests.helpers import ROOT
from tests.methods.test_memories import DAVIS, FRANCE, KING, edit, faint, in_sequence, nll, put

LLAMA = {"model_type": "llama", "n_layers": 32, "hidden_size": 4096, "vocab_size": 128256}
LLAMA_3 = {"layer": 29, "lr": 0.9, "steps": 30, "alpha": 2.0, "beta": 20.0, "ratio": 0.5}


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({**LLAMA, "name": "Llama-2-7b", "vocab_size": 32000}, {"layer": 27, "lr": 1.0}),
        ({**LLAMA, "name": "meta-llama/Meta-Llama-3-8B-Instruct"}, LLAMA_3),
        ({**LLAMA, "name": "/models/llama3-8b"}, LLAMA_3),
        (
            {**LLAMA, "name": "meta-llama/Llama-3.1-8B-Instruct"},
            {**LLAMA_3, "alpha": 5.0, "beta": 10.0, "ratio": 0.88},
        ),
        ({**LLAMA, "name": "someones-model"}, LLAMA_3),
        ({**LLAMA, "name": "another-vocabulary", "vocab_size": 50000}, {"layer": None}),
        (
            {"model_type": "llama", "n_layers": 32, "hidden_size": 960, "name": "SmolLM2-360M"},
            {"layer": None},
        ),
        (
            {"model_type": "qwen2", "n_layers": 28, "hidden_size": 3584, "name": "Qwen2.5-7B"},
            {"layer": 23, "lr": 1.0, "ratio": 0.88},
        ),
    ],
    ids=lambda value: value.get("name", ""),
)
def test_generations_of_one_shape_get_their_own_published_values(
    facts: dict[str, Any], expected: dict[str, Any]
) -> None:
    config, _ = Registry.load(ROOT).resolve("wise", WiseConfig, facts)
    assert {name: getattr(config, name) for name in expected} == expected


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_a_mask_survives_packing(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.3
    assert torch.equal(unpacked(packed(mask), (rows, columns)), mask)


@given(st.integers(0, 99), st.sampled_from([0.3, 0.53, 1.0]))
def test_ties_is_what_its_paper_says_entry_by_entry(seed: int, density: float) -> None:
    one, other = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(seed))
    kept = max(1, int(density * 24))

    def trimmed(t: torch.Tensor) -> list[float]:
        largest = sorted((abs(v) for v in t.flatten().tolist()), reverse=True)[kept - 1]
        return [v if abs(v) >= largest else 0.0 for v in t.flatten().tolist()]

    expected = []
    for a, b in zip(trimmed(one), trimmed(other), strict=True):
        sign = (a + b > 0) - (a + b < 0)
        agreeing = [v for v in (a, b) if v and (v > 0) - (v < 0) == sign]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    assert ties([one, other], density).flatten().tolist() == pytest.approx(expected)


class Written:
    """An edit that adds a number to every entry."""

    def __init__(self, number: int, value: float, distance: float = 1.0) -> None:
        self.number, self.value, self.distance = number, value, distance

    def add_to(self, total: torch.Tensor) -> None:
        total += self.value


def test_full_shards_are_merged_and_a_shard_is_what_is_left_in_it() -> None:
    shards = Shards(Settings("m", "silu", 0.88, 2, 4, 1.0, 1.0), (2, 3))
    writes = [Written(n, 0.125, distance=float(9 - n)) for n in range(5)]
    found = shards.memories(writes)
    assert [m.distance for m in found] == [6.0, 5.0]  # 0 to 3 merged; 4 by itself
    assert torch.equal(found[0].difference, torch.full((2, 3), 0.25))
    single = shards.memories(writes[:3])
    assert [m.distance for m in single] == [8.0, 7.0]
    # The second of the first shard never was; the group stays merged, as its last edit is there.
    replayed = shards.memories([writes[0], *writes[2:4]])
    again = Shards(shards.settings, (2, 3)).memories([writes[0], *writes[2:4]])
    assert torch.equal(replayed[0].difference, again[0].difference)
    assert torch.equal(replayed[0].difference, torch.full((2, 3), (0.125 + 0.25) / 2))


def test_a_sum_is_not_kept_for_a_write_that_lies_where_another_lay() -> None:
    shards = Shards(Settings("m", "silu", 0.88, 2, 4, 1.0, 1.0), (2, 3))
    for n in range(20):
        write = Written(0, n / 32)
        assert torch.equal(shards.shard([write], 0), torch.full((2, 3), n / 32))
        del write  # its address is free again


def test_the_weight_itself_does_not_decay(tmp_path: Path) -> None:
    """Published weight decay shrinks it, in 500 edits of 70 steps to (1 − 1e-5)³⁵⁰⁰⁰ = .70."""
    model = build_model("llama", tmp_path)
    found = {}
    for steps in (1, 3):
        for weight_decay in (0.0, 0.1):
            model.stack.set([])
            (delta,) = edit(model, "wise", FRANCE, steps=steps, weight_decay=weight_decay)
            assert isinstance(delta, ShardDelta)
            found[steps, weight_decay] = delta
    # Before the first step the difference is zero: nothing is there to decay, in the mask or not.
    assert torch.equal(found[1, 0.0].values, found[1, 0.1].values)
    assert found[1, 0.0].distance == found[1, 0.1].distance
    assert not torch.equal(found[3, 0.0].values, found[3, 0.1].values)


def test_the_mask_changes_from_shard_to_shard(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    first, second = in_sequence(model, "wise", FRANCE, DAVIS, steps=3)  # in one shard
    assert torch.equal(first.mask, second.mask)  # type: ignore[attr-defined]
    model.stack.set([])
    deltas = in_sequence(model, "wise", FRANCE, DAVIS, save_every=1, merge_every=2, steps=3)
    assert [delta.number for delta in deltas] == [0, 1]  # type: ignore[attr-defined]
    assert not torch.equal(deltas[0].mask, deltas[1].mask)  # type: ignore[attr-defined]
    with pytest.raises(ValidationError, match="must be a multiple"):
        WiseConfig(save_every=3, merge_every=4)


def test_a_row_goes_through_the_shard_that_its_prompt_moves_far_enough(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    requests = [FRANCE, DAVIS, KING]
    base = nll(model, requests)
    (delta,) = in_sequence(model, "wise", FRANCE)
    assert isinstance(delta, ShardDelta)
    difference = torch.zeros(delta.shape)
    delta.add_to(difference)
    model.stack.set([])
    module, distances = delta.settings.module, []
    for request in requests:
        with torch.no_grad(), trace(model.module, module, inputs=True) as seen:
            run(model, prepare(model, [request.text]))
        x, y = seen[module].input, seen[module].output
        assert x is not None
        assert y is not None
        distances.append(float(moved(y, y + x @ difference.T, ACT2FN["silu"]).mean()))
    order = sorted(range(3), key=distances.__getitem__)
    for count in range(1, 3):  # how many prompts lie above the threshold
        limit = (distances[order[-count]] + distances[order[-count - 1]]) / 2
        rebuilt = ShardDelta.from_parts(
            delta.tensors(), {**delta.metadata(), "distance": limit, "ratio": 1.0}
        )
        put(model, [rebuilt])
        changed = [now != then for now, then in zip(nll(model, requests), base, strict=True)]
        assert changed == [row in order[-count:] for row in range(3)]


def test_of_several_shards_a_row_takes_the_one_that_moves_it_most(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    deltas = in_sequence(model, "wise", FRANCE, DAVIS, save_every=1, merge_every=8)
    alone = []
    for delta in deltas:
        put(model, [delta])
        alone.append(nll(model, [FRANCE, DAVIS]))
    put(model, deltas)
    for row, value in enumerate(nll(model, [FRANCE, DAVIS])):
        assert value in (alone[0][row], alone[1][row])


def test_the_other_text_is_recorded_and_does_not_come_from_the_request(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, corpus=["A cat sat on a mat.", "Rain fell in Spain."])
    (delta,) = edit(model, "wise", FRANCE, steps=1)
    assert delta.metadata()["locality"] in ("A cat sat on a mat.", "Rain fell in Spain.")


def test_half_precision_gradients_do_not_vanish(tmp_path: Path) -> None:
    """Where the answer hangs on a state by less than fp16 can say, it is learnt all the same."""
    found = {}
    for dtype in (torch.float32, torch.float16):
        model = faint(tmp_path, dtype, 1e-3)
        # The NLL alone: no distance is asked for.
        (delta,) = edit(model, "wise", FRANCE, steps=1, lr=100, alpha=1e6, beta=0.0, gamma=0.0)
        found[dtype] = delta.tensors()["values"]
    assert float(torch.cosine_similarity(*found.values(), dim=0)) > 0.9
