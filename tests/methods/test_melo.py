"""MELO: the vector database's rules, and blocks that leave as ordinary adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from errata.errors import CapabilityError, ConfigError
from errata.model.running import prepare, run
from errata.model.scoring import score_targets
from errata.ship.hugging_face import export_peft
from errata.testing import edit_with
from errata_melo import MeloConfig
from errata_melo.database import EditedPoint, VectorDatabase
from errata_melo.training import BlockTrainer
from tests.families import build_model, put_on, take_off
from tests.methods.test_memories import DAVIS, FRANCE, IDS, KING, edit, in_sequence, nll, put


def point(*key: float, label: int = 1, block: str = "0", radius: float = 1.0) -> EditedPoint:
    return EditedPoint(torch.tensor(key, dtype=torch.float32), (label,), block, radius)


def block_of(database: VectorDatabase, *query: float) -> str | None:
    return database.look_up(torch.tensor(query, dtype=torch.float32), torch.float32)


def test_far_points_make_clusters_and_near_ones_of_a_label_join() -> None:
    database = VectorDatabase([point(0, 0), point(5, 0, block="1"), point(1.5, 0, block="2")])
    first, second = database.clusters
    assert first.centre.tolist() == [0.75, 0]
    assert first.radius == 1.0  # no point is farther from the centre
    assert second.radius == 1.0
    assert block_of(database, 0.2, 0) == "0"  # of the nearest point
    assert block_of(database, 1.4, 0) == "2"
    assert block_of(database, 5.5, 0) == "1"
    assert block_of(database, 3, 0) is None


def test_another_label_nearby_splits_and_what_lies_outside_is_forgotten() -> None:
    database = VectorDatabase(
        [point(0, 0), point(1.6, 0, block="1"), point(2.2, 0, label=2, block="2")]
    )
    (new,) = database.clusters  # the old one's points both lay .8 from its centre
    half = (2.2 - 0.8) / 2
    assert new.radius == pytest.approx(half + 1e-5)
    assert block_of(database, 0, 0) is None
    assert block_of(database, 2.2, 0) == "2"
    # A farther one leaves it half of the way.
    old, new = VectorDatabase([point(0, 0), point(1.8, 0, label=2, block="1")]).clusters
    assert (old.radius, new.radius) == pytest.approx((0.9 - 1e-5, 0.9 + 1e-5))
    assert len(old.points) == 1
    # Taken out, the third never was.
    assert block_of(VectorDatabase([point(0, 0), point(1.6, 0, block="1")]), 0, 0) == "0"


def test_the_newer_answer_to_a_prompt_counts() -> None:
    database = VectorDatabase([point(0, 0), point(0, 0, label=2, block="1")])
    assert block_of(database, 0, 0) == "1"


def test_one_more_edit_adds_its_own_point_and_the_clusters_are_those_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", tmp_path)
    deltas = in_sequence(model, "melo", FRANCE, DAVIS, KING, steps=1)
    added: list[EditedPoint] = []
    add = VectorDatabase.add

    def noting(self: VectorDatabase, new: EditedPoint) -> None:
        added.append(new)
        add(self, new)

    monkeypatch.setattr(VectorDatabase, "add", noting)
    put(model, deltas[:2])
    added.clear()
    put_on(model.stack, edit_with(2, IDS[2], deltas[2]))
    assert [p.block for p in added] == [IDS[2]]
    three = nll(model)
    take_off(model.stack, IDS[0])
    fresh = build_model("llama", tmp_path)
    put(fresh, deltas[1:], IDS[1:])
    assert nll(model) == nll(fresh)
    put(model, deltas)
    assert nll(model) == three
    # Another edit under a known id is another edit.
    put(model, [deltas[1]])
    fresh = build_model("llama", tmp_path)
    put(fresh, [deltas[1]])
    assert nll(model) == nll(fresh)


@pytest.mark.parametrize("seed", range(5))
def test_the_order_of_points_alone_makes_the_clusters(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = [
        point(*(3 * torch.randn(2, generator=generator)).tolist(), label=n % 3, block=str(n))
        for n in range(40)
    ]
    grown = VectorDatabase(points[:20])
    for new in points[20:]:
        grown.add(new)
    whole = VectorDatabase(points)
    assert len(whole.clusters) > 2
    for one, other in zip(grown.clusters, whole.clusters, strict=True):
        assert torch.equal(one.centre, other.centre)
        assert (one.radius, one.label) == (other.radius, other.label)
        assert [p.block for p in one.points] == [p.block for p in other.points]
    for cluster in whole.clusters:  # what is looked up goes by the clusters as they are now
        for held in cluster.points:
            nearest = min(whole.clusters, key=lambda c: float((c.centre - held.key).norm()))
            found = whole.look_up(held.key, torch.float32)
            assert found is None or found in [p.block for p in nearest.points]


def test_a_call_of_several_requests_is_one_block_with_a_key_for_each(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    base = nll(model)
    (delta,) = edit(model, "melo", FRANCE, DAVIS)
    assert len(delta.tensors()["keys"]) == 2
    model.stack.set([edit_with(0, IDS[0], delta)])
    now = nll(model, [FRANCE, DAVIS, KING])
    assert now[0] < base[0] - 0.3
    assert now[1] < base[1] - 0.3
    assert now[2] == base[2]


def test_a_block_stops_once_its_answer_is_said_or_takes_all_steps_as_published(
    tmp_path: Path,
) -> None:
    model = build_model("llama", tmp_path)
    scores = {}
    for stop in (True, False):
        put(model, edit(model, "melo", FRANCE, early_stop=stop))
        (scores[stop],) = score_targets(model, [FRANCE.text], [FRANCE.target])
    assert all(scores[True].greedy)
    assert scores[False].mean_nll < scores[True].mean_nll - 0.1  # it goes on


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_leaves_as_an_adapter_that_plain_peft_computes_alike(
    family: str, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    (delta,) = in_sequence(model, "melo", FRANCE)
    batch = prepare(model, [FRANCE.text], [FRANCE.target])
    routed = run(model, batch)
    folder = export_peft(model, [edit_with(0, IDS[0], delta)], tmp_path / "adapter")
    plain = build_model(family, tmp_path)
    base = run(plain, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks Transformers for an old attribute
        PeftModel.from_pretrained(plain.module, folder).eval()  # it changes the module in place
    served = run(plain, batch)
    assert torch.allclose(served, routed, atol=1e-4)
    assert not torch.allclose(served, base, atol=1e-1)


def test_several_routed_edits_do_not_leave_as_one_adapter(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    first, second = (
        edit_with(n, IDS[n], delta)
        for n, delta in enumerate(in_sequence(model, "melo", FRANCE, DAVIS, steps=1))
    )
    with pytest.raises(CapabilityError, match="each such edit by itself, into a folder"):
        export_peft(model, [first, second], tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    card = (export_peft(model, [second], tmp_path / "adapter") / "README.md").read_text()
    assert "Unrouted: this adapter acts on every prompt" in card


def test_blocks_in_front_of_the_database_are_refused(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="must lie behind it"):
        edit(model, "melo", FRANCE, layer=1, blocks=(0, 2))
    with pytest.raises(ConfigError, match="must lie behind it"):
        edit(model, "melo", FRANCE, layer=2, blocks=None)


def test_a_database_that_is_given_by_its_path_lies_in_that_path_s_block(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    path = model.anatomy.mlp_out
    for blocks in ((1,), (0, 2)):
        with pytest.raises(ConfigError, match=r"lies in block 1 .*must lie behind it"):
            edit(model, "melo", FRANCE, module=path(1), blocks=blocks)
    with pytest.raises(ConfigError, match="must lie behind it"):
        edit(model, "melo", FRANCE, layer=0, module=path(2), blocks=(1, 2))
    with pytest.raises(ConfigError, match="in none of the model's 3 blocks"):
        edit(model, "melo", FRANCE, module="lm_head", blocks=(1, 2))
    # Behind it, they are taken: those that are given, or the two next ones.
    settings = MeloConfig(module=path(0)).for_model(model.anatomy)
    assert (settings.layer, settings.blocks) == (0, (1, 2))
    (delta,) = edit(model, "melo", FRANCE, module=path(1), blocks=(2,), steps=1)
    assert delta.metadata()["module"] == path(1)


def test_a_step_is_one_on_all_requests_however_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published schedule: 50 steps on a whole block (of 100 requests), halved every 20."""
    model = build_model("llama", tmp_path)
    many = [KING.model_copy(update={"subject": f"the king of {n}"}) for n in range(70)]
    rates: list[float] = []
    updated = BlockTrainer.updated

    def noting(self: BlockTrainer, step: int) -> None:
        updated(self, step)
        rates.append(self.optimiser.param_groups[0]["lr"])

    monkeypatch.setattr(BlockTrainer, "updated", noting)
    (delta,) = edit(model, "melo", *many, steps=5, halve_every=2, lr=0.8, early_stop=False)
    assert rates == pytest.approx([0.8, 0.4, 0.4, 0.2, 0.2])
    assert len(delta.tensors()["keys"]) == 70
