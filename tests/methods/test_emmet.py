"""EMMET: parity with the authors' code, and constraints that are met."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata.edits.delta import KeyValueDelta
from errata.edits.request import Request
from errata.kit.closed_form.deltas import low_rank
from errata.kit.closed_form.layer_updates import Prompts
from errata.kit.closed_form.statistics import known_keys, second_moment_weights
from errata.testing import edit_with
from errata_alphaedit import AlphaEdit, AlphaEditConfig
from errata_emmet import Emmet, EmmetConfig
from errata_emmet.algorithm import emmet
from errata_memit import MemitConfig
from errata_memit.algorithm import memit
from errata_pmet import Pmet, PmetConfig
from tests.families import SENTENCES, build_model
from tests.methods.golden import golden_model, recorded, relative
from tests.methods.golden import known_keys as golden_keys
from tests.methods.test_memit import REQUESTS

BARE = {"contexts": ("{}",), "layers": (1,), "steps": 4, "weight_decay": 0.0, "tokens": 200}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["emmet_L1_lam100_batch8", "emmet_L0-1_lam100_batch8"])
def test_parity_with_the_authors_code(name: str, tmp_path: Path) -> None:
    tensors, about, requests, settings = recorded(f"5_emmet_alphaedit/{name}")
    config = EmmetConfig(
        **settings,
        second_moment_weight=about["hparams"]["mom2_update_weight"],
        ridge=about["hparams"]["emmet_lambda"],
        history="none",
    )
    model = golden_model(tmp_path)
    updates = emmet(model, requests, golden_keys(settings["layers"]), config)
    delta = low_rank(model, updates)
    for update in updates:
        want = f"layer{update.layer}."
        assert relative(update.K.flat, tensors[want + "keys"]) < 1e-4
        assert relative(update.h.flat, tensors[want + "cur_zs"]) < 1e-4
        factor = delta.factors[f"transformer.h.{update.layer}.mlp.c_proj.weight"]
        assert relative(factor.v @ factor.u.T, tensors[want + "dW"]) < 1e-4


def test_without_a_ridge_every_constraint_is_met(tmp_path: Path) -> None:
    """All requests at once, in one batch and as joint edits: W k is what was wanted."""
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    plugin = Emmet()
    path = model.anatomy.mlp_out(1)

    def outputs() -> torch.Tensor:
        return Prompts(model, REQUESTS, ("{}",)).read(1, path)[1].flat

    base = outputs()
    for history in ("none", "joint"):
        config = EmmetConfig(**BARE, ridge=0.0, history=history)
        (update,) = emmet(model, REQUESTS, known_keys(model, config), config)
        wanted = base + update.R.flat
        made = plugin.edit(model, REQUESTS, config)
        deltas = made if isinstance(made, list) else [made]
        entries = [edit_with(i + 1, f"{i:012x}", delta) for i, delta in enumerate(deltas)]
        with model.stack.temporarily(entries):
            assert relative(outputs(), wanted) < 1e-4
        assert len(deltas) == (3 if history == "joint" else 1)


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_nothing_is_written_where_nothing_has_to_change(family: str, tmp_path: Path) -> None:
    """Without a ridge a rounding error would be written a million times over."""
    model = build_model(family, tmp_path, corpus=SENTENCES)
    gone = Request(
        prompt="{} plays the", subject="Miles Davis", kind="erase",
        target_true="piano in Paris, the mother tongue of France",
    )  # fmt: skip
    config = EmmetConfig(**{**BARE, "layers": (0, 1)}, ridge=0.0, history="none")
    C = known_keys(model, config)
    for update, alone in zip(
        emmet(model, [*REQUESTS, gone], C, config), emmet(model, REQUESTS, C, config), strict=True
    ):
        assert not update.R.flat[:, 3].any()
        assert update.R.flat[:, :3].any(0).all()
        (u, v), (left, right) = update.Δ.factors, alone.Δ.factors
        assert float((u @ v.T).norm()) < 10 * float((left @ right.T).norm())
    for made in (
        Emmet().edit(model, [gone], EmmetConfig(**BARE, ridge=0.0)),
        AlphaEdit().edit(model, [gone], AlphaEditConfig(**BARE, fraction=0.5, l2=0.0)),
        Pmet().edit(model, [gone], PmetConfig(**BARE, second_moment_weight=1e-9)),
    ):
        (pair,) = made[0].pairs.values()
        assert not pair.r.any()


def test_a_single_request_gets_no_ridge_in_a_batch(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = EmmetConfig(**BARE, ridge=50.0, history="none")
    C = known_keys(model, config)

    def written(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Δ K and R."""
        (update,) = emmet(model, REQUESTS[:count], C, config)
        u, v = update.Δ.factors
        return u @ v.T @ update.K.flat, update.R.flat

    assert relative(*written(1)) < 1e-6
    assert relative(*written(3)) > 0.1


def test_with_a_ridge_it_is_memit(tmp_path: Path) -> None:
    """Kᵀ(λC)⁻¹K + εI: what is stored has the slack λε."""
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = EmmetConfig(**BARE, second_moment_weight=200.0, ridge=0.1)
    deltas = Emmet().edit(model, REQUESTS, config)
    assert isinstance(deltas, list)
    for delta in deltas:
        assert isinstance(delta, KeyValueDelta)
        (pair,) = delta.pairs.values()
        assert pair.s.tolist() == [pytest.approx(20.0)]
    C = known_keys(model, config)
    published = config.model_copy(update={"history": "none"})
    memits = MemitConfig(**BARE, second_moment_weight=20.0, history="none")
    (ours,) = emmet(model, REQUESTS, C, published)
    (theirs,) = memit(model, REQUESTS, C, second_moment_weights(model, memits), memits)
    (u, v), (left, right) = ours.Δ.factors, theirs.Δ.factors
    assert relative(u @ v.T, left @ right.T) < 1e-6


def test_by_default_one_layer(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = EmmetConfig(**{**BARE, "layers": None})
    (delta, *_) = Emmet().edit(model, REQUESTS, config)
    assert delta.parameters == (model.anatomy.weight(model.anatomy.mlp_out(1)),)
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        EmmetConfig(ridge=-1)
