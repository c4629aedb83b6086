from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from errata.contract.purity import Snapshot
from errata.edits.delta import AdapterDelta
from errata.edits.request import Request
from errata.errors import ConfigError, EditFailed, UnknownNameError
from errata.model import Model, scoring
from errata_lora import Lora, LoraConfig
from tests.families import build, build_model
from tests.methods.adapters import (
    CAPITAL,
    MUSIC,
    TONGUE,
    WHOLE,
    Counting,
    activate,
    hold,
    logits,
    same,
)

FAST = {"lr": 5e-3, "target_modules": WHOLE}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model("gpt2", tmp_path, progress=Counting())


def train(model: Model, *requests: Request, **values: Any) -> AdapterDelta:
    delta = Lora().edit(model, list(requests), LoraConfig(**{**FAST, **values}))
    delta.check(model)
    return delta


def plain_peft(module: Any, *folders: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks Transformers for an old attribute
        loaded = PeftModel.from_pretrained(module, folders[0], adapter_name="a0")
        for index, folder in enumerate(folders[1:], 1):
            loaded.load_adapter(folder, adapter_name=f"a{index}")
        loaded.base_model.set_adapter([f"a{i}" for i in range(len(folders))], True)
    return loaded.eval()


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "bert", pytest.param("t5", marks=pytest.mark.slow)]
)
def test_an_edit_takes_effect_and_plain_peft_computes_the_same(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    assert hold(model, CAPITAL) == [False]
    delta = train(model, CAPITAL)
    delta.write_directory(tmp_path / "adapter")
    base = logits(model, model.module)
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]
    edited = logits(model, model.module)
    fresh, _ = build(family)
    loaded = logits(model, plain_peft(fresh, tmp_path / "adapter"))
    torch.testing.assert_close(loaded, edited, rtol=0, atol=1e-5)
    activate(model)
    assert torch.equal(logits(model, model.module), base)


@pytest.mark.slow
def test_several_adapters_are_active_at_once_and_plain_peft_adds_them_up(
    model: Model, tmp_path: Path
) -> None:
    first = train(model, CAPITAL)
    activate(model, first)
    second = train(model, MUSIC)
    activate(model, first, second)
    assert hold(model, MUSIC) == [True]
    both = logits(model, model.module)
    for index, delta in enumerate((first, second)):
        delta.write_directory(tmp_path / str(index))
    fresh, _ = build("gpt2")
    loaded = logits(model, plain_peft(fresh, tmp_path / "0", tmp_path / "1"))
    torch.testing.assert_close(loaded, both, rtol=0, atol=1e-4)
    activate(model, second)
    assert not torch.equal(logits(model, model.module), both)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / math.sqrt(3))])
def test_the_change_of_a_weight_is_the_scaled_product(
    rslora: bool, scale: float, model: Model
) -> None:
    name = "transformer.h.1.mlp.c_proj"
    values = {"rank": 3, "alpha": 6, "rslora": rslora, "layers": (1,), "steps": 2}
    delta = train(model, CAPITAL, target_modules=("mlp_out",), **values)
    assert delta.ranks == {name: 3}
    parts = delta.tensors()
    a, b = (parts[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    difference = delta.differences(model)[f"{name}.weight"]
    torch.testing.assert_close(difference, scale * (b @ a).T, rtol=1e-5, atol=1e-6)
    assert difference.norm() > 0


def test_several_requests_make_one_adapter(model: Model) -> None:
    activate(model, train(model, CAPITAL, MUSIC, TONGUE, batch_size=2, steps=40))
    assert hold(model, CAPITAL, MUSIC, TONGUE) == [True] * 3


@pytest.mark.slow
def test_depth_first_trains_one_request_after_another(model: Model) -> None:
    deep = train(model, CAPITAL, MUSIC, order="depth-first", steps=40)
    assert not same(deep, train(model, CAPITAL, MUSIC, steps=40))
    activate(model, deep)
    assert hold(model, MUSIC) == [True]  # the last one; the first may be forgotten by then


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_stops_when_the_target_is_the_answer(dropout: float, model: Model) -> None:
    delta = train(model, CAPITAL, dropout=dropout)
    assert model.progress.steps < 70
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]
    activate(model)
    model.progress.steps = 0
    train(model, CAPITAL, dropout=dropout, early_stop=False, steps=9)
    assert model.progress.steps == 9


def test_a_stop_loss_trains_on_until_the_target_is_that_probable(model: Model) -> None:
    activate(model, train(model, CAPITAL, stop_loss=3.7, dropout=0.0))
    (score,) = scoring.score_targets(model, [CAPITAL.text], [CAPITAL.target_new])
    assert score.mean_nll < 3.7


def test_training_leaves_the_model_and_the_global_generator_alone(model: Model) -> None:
    before, state = Snapshot(model), torch.random.get_rng_state()
    first = train(model, CAPITAL, steps=4)
    assert before.changed() == []
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert same(train(model, CAPITAL, steps=4), first)
    assert not same(train(model, CAPITAL, steps=4, seed=1), first)
    with pytest.raises(EditFailed, match="smaller lr"):
        train(model, MUSIC, lr=1e30)
    assert before.changed() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_edited(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, dtype)
    delta = train(model, CAPITAL)
    assert {tensor.dtype for tensor in delta.tensors().values()} == {torch.float32}
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]


def test_mistakes_are_named(model: Model) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'attn\.c_attn'"):
        train(model, CAPITAL, target_modules=("attn.c_atn",))
    with pytest.raises(ConfigError, match="layer"):
        train(model, CAPITAL, layers=(9,))
