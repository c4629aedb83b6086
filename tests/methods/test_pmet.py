"""PMET: two values together, one written, shared out by the square root.

There is no recorded run of the authors' code: what is checked here is what the paper says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errata import zoo
from errata.datasets import atlas
from errata.edits.request import Request
from errata.kit.closed_form.layer_updates import LayerUpdate, Prompts
from errata.kit.closed_form.statistics import known_keys, second_moment_weights
from errata.kit.closed_form.target_values import MemitObjective, value_settings
from errata.kit.values import OptimisedValue, ValueSettings, optimise_values
from errata.model.loading import load_model
from errata.model.model import Model
from errata.testing import edit_with
from errata_pmet import Pmet, PmetConfig
from errata_pmet.algorithm import PmetObjective, pmet
from tests.families import SENTENCES, architectures, build_model
from tests.methods.golden import relative
from tests.methods.test_memit import CONTEXTS, REQUESTS

TINY = {
    "contexts": CONTEXTS, "layers": (0, 1), "steps": 5, "weight_decay": 0.0, "tokens": 200,
    "second_moment_weight": 1e-9, "clamp": 5.0,
}  # fmt: skip


def solved(model: Model, requests: Sequence[Request], config: PmetConfig) -> list[LayerUpdate]:
    C, λ = known_keys(model, config), second_moment_weights(model, config)
    return pmet(model, requests, C, λ, config)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "falcon", "opt"])
def test_both_values_take_part_and_the_mlps_is_written(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path, corpus=SENTENCES)
    config = PmetConfig(**{**TINY, "layers": (1,), "contexts": ("{}",)})
    (update,) = solved(model, REQUESTS[:1], config)
    base = update.h.flat[:, 0]
    settings = replace(value_settings(1, config), at="attention+mlp")
    (value,) = optimise_values(model, REQUESTS[:1], ("{}",), settings, PmetObjective(config))
    # ‖δ‖ in the losses is that of both; the MLP's is less.
    assert value.losses[-1][4] > float(value.delta.norm()) * 1.01
    assert value.losses[-1][1] < value.losses[0][1]
    assert relative(base, value.v0) < 1e-4
    assert relative(base + update.R.flat[:, 0], value.v_star) < 1e-4
    made = Pmet().edit(model, REQUESTS[:1], config)
    assert isinstance(made, list)
    with model.stack.temporarily([edit_with(1, "0123456789ab", made[0])]):
        path = model.anatomy.mlp_out(1)
        now = Prompts(model, REQUESTS[:1], ("{}",)).read(1, path)[1].flat[:, 0]
    assert relative(now, value.v_star) < 1e-3


def test_the_residual_is_shared_out_by_the_root(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = PmetConfig(**TINY)
    first, last = solved(model, REQUESTS, config)
    whole = first.R.flat * math.sqrt(2)
    # The last layer brings all that is left at its own output.
    assert relative((last.h + last.R).flat, first.h.flat + whole) < 1e-4


def test_a_value_at_two_places_is_no_worse_than_at_one(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    config = PmetConfig(weight_decay=0.0, kl_factor=0.0, top_kl=None)
    settings = ValueSettings(layer=1, steps=8, lr=0.1, kl_prompt=None)
    one = optimise_values(model, REQUESTS, CONTEXTS, settings, MemitObjective(config))
    both = replace(settings, at="attention+mlp")
    two = optimise_values(model, REQUESTS, CONTEXTS, both, PmetObjective(config))
    for single, double in zip(one, two, strict=True):
        assert relative(double.v0, single.v0) < 1e-5
        assert double.losses[-1][1] < single.losses[-1][1]


@pytest.mark.slow
def test_it_relaxes_and_stops_once_the_target_comes_first() -> None:
    model = load_model(zoo.model_path("atlas-gpt2"), architectures=architectures())
    settings = ValueSettings(layer=1, at="attention+mlp", steps=25, lr=0.2, clamp=15.0)

    def value(top_factor: float, top_kl: float | None) -> OptimisedValue:
        config = PmetConfig(
            weight_decay=0.0, early_stop=0.0, kl_factor=1.0, top_factor=top_factor, top_kl=top_kl
        )
        objective = PmetObjective(config)
        return optimise_values(model, atlas.requests(1), ("{}",), settings, objective)[0]

    full, relaxed, short = value(1.0, None), value(0.1, None), value(1.0, 1e9)
    assert full.top
    assert short.top
    assert len(short.losses) < len(full.losses)
    first = len(short.losses)
    torch.testing.assert_close(
        torch.tensor(relaxed.losses[:first]), torch.tensor(full.losses[:first])
    )
    # One evaluation after the target came first, at the very same δ, the NLL counts a tenth.
    assert relaxed.losses[first][1] == pytest.approx(0.1 * full.losses[first][1], rel=1e-3)
