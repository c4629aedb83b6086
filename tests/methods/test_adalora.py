from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError

from errata.contract.purity import Snapshot
from errata.edits.delta import AdapterDelta
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import ConfigError, EditFailed, UnknownNameError
from errata.kit.training import AdapterTrainer
from errata.model import Model, scoring
from errata.model.anatomy import Anatomy
from errata_adalora import Adalora, AdaloraConfig
from tests.families import build, build_model
from tests.helpers import GOLDEN
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

FAST = {"lr": 2e-2, "target_modules": WHOLE}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model("gpt2", tmp_path, progress=Counting())


def golden() -> tuple[Model, list[Request]]:
    """Return the recorded trained model and facts that it knows, with other answers wanted."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = GOLDEN / "model"
    text = (GOLDEN / "0_facts" / "facts_and_templates.json").read_text("utf-8")
    module = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    requests = [
        Request(
            prompt=f["prompt"], subject=f["subject"], target_new=f["new"], target_true=f["true"]
        )
        for f in json.loads(text)["facts"]
    ]
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, {}), progress=Counting())), requests


def train(model: Model, *requests: Request, **values: Any) -> AdapterDelta:
    delta = Adalora().edit(model, list(requests), AdaloraConfig(**{**FAST, **values}))
    delta.check(model)
    return delta


def plain_peft(module: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        # PEFT warns about AdaLoRA's own rank pattern and asks Transformers for an old attribute.
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(module, folder).eval()


# -- what an edit does ---------------------------------------------------------------------------


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


def test_a_trained_model_changes_its_answer_and_keeps_the_others() -> None:
    model, requests = golden()
    prompts, truths = [r.text for r in requests], [str(r.target_true) for r in requests]
    before = [score.exact for score in scoring.score_targets(model, prompts, truths)]
    kept = 0
    for index, request in enumerate(requests[:3]):
        activate(model, Adalora().edit(model, [request], AdaloraConfig()))
        assert hold(model, request) == [True]
        after = [score.exact for score in scoring.score_targets(model, prompts, truths)]
        kept += sum(a for i, a in enumerate(after) if before[i] and i != index)
        activate(model)
    assert kept >= 0.7 * 3 * (sum(before) - 1)


@pytest.mark.slow
def test_several_requests_make_one_adapter(model: Model) -> None:
    delta = train(model, CAPITAL, MUSIC, TONGUE, batch_size=2, steps=40)
    assert delta.config["total_step"] == 2 * 40
    activate(model, delta)
    assert hold(model, CAPITAL, MUSIC, TONGUE) == [True] * 3


@pytest.mark.slow
def test_later_edits_are_trained_on_top_of_earlier_ones(model: Model) -> None:
    first = train(model, CAPITAL)
    alone = train(model, MUSIC)
    activate(model, first)
    before = Snapshot(model)
    second = train(model, MUSIC)
    assert before.changed() == []
    assert not same(second, alone)
    activate(model, first, second)
    assert hold(model, MUSIC) == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_edited(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, dtype)
    delta = train(model, CAPITAL)
    assert {tensor.dtype for tensor in delta.tensors().values()} == {torch.float32}
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]


# -- the rank allocation and the early stop --------------------------------------------------------


def test_ranks_are_really_allocated(model: Model) -> None:
    delta = train(model, CAPITAL, early_stop=False, steps=12, init_rank=6, target_rank=3)
    ranks = list(delta.ranks.values())
    assert model.progress.steps == delta.config["total_step"] == 12
    assert sum(ranks) <= 3 * len(ranks)
    assert len(set(ranks)) > 1  # unevenly: that is what the budget is for
    masks = delta.config["rank_pattern"]
    assert [sum(masks[f"{name}.lora_E"]) for name in delta.ranks] == ranks
    assert delta.config["tfinal"] == 4


def test_an_early_stop_still_leaves_the_target_ranks(model: Model) -> None:
    delta = train(model, CAPITAL, steps=70)
    assert model.progress.steps < 70
    assert sum(delta.ranks.values()) <= 8 * len(delta.ranks)
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]


def test_a_stop_loss_trains_on_until_the_target_is_that_probable() -> None:
    model, facts = golden()
    (request, *_), limit = facts, 0.1
    (score,) = scoring.score_targets(model, [request.text], [request.target_new])
    assert score.mean_nll > 1
    activate(model, Adalora().edit(model, [request], AdaloraConfig(stop_loss=limit)))
    (score,) = scoring.score_targets(model, [request.text], [request.target_new])
    assert score.mean_nll < limit
    assert model.progress.steps < 70


# -- what it leaves alone --------------------------------------------------------------------------


def test_training_leaves_the_model_and_the_global_generator_alone(model: Model) -> None:
    before, state = Snapshot(model), torch.random.get_rng_state()
    first = train(model, CAPITAL, steps=6)
    assert before.changed() == []
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert same(train(model, CAPITAL, steps=6), first)
    assert not same(train(model, CAPITAL, steps=6, seed=1), first)


def test_training_that_fails_leaves_the_model_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    activate(model, train(model, CAPITAL, steps=4))
    before, state = Snapshot(model), torch.random.get_rng_state()
    with pytest.raises(EditFailed, match="smaller lr"):
        train(model, MUSIC, lr=1e30)
    assert before.changed() == []

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterTrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, MUSIC)
    assert before.changed() == []
    assert torch.equal(torch.random.get_rng_state(), state)


# -- which modules, and mistakes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "values", "expected"),
    [
        ("gpt2", {}, {"transformer.h.0.attn.c_attn", "transformer.h.2.attn.c_attn"}),
        ("gpt2", {"target_modules": ["c_fc"]}, {"transformer.h.0.mlp.c_fc"}),
        ("llama", {}, {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"}),
        ("llama", {"target_modules": ["mlp_out"]}, {"model.layers.0.mlp.down_proj"}),
        ("gptj", {}, {"transformer.h.0.attn.q_proj", "transformer.h.0.attn.v_proj"}),
        ("t5", {}, {"encoder.block.0.layer.0.SelfAttention.q"}),
    ],
)
def test_target_modules_are_found_through_the_anatomy(
    family: str, values: dict[str, Any], expected: set[str], tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    delta = Adalora().edit(model, [CAPITAL], AdaloraConfig(steps=3, early_stop=False, **values))
    assert expected <= set(delta.modules)
    assert not any(".k" in name for name in delta.modules)


def test_layers_are_counted_from_both_ends(model: Model) -> None:
    delta = train(model, CAPITAL, layers=(-1,), steps=3)
    assert {name.split(".")[2] for name in delta.modules} == {"2"}
    with pytest.raises(ConfigError, match="layer"):
        train(model, CAPITAL, layers=(9,))


def test_mistakes_are_named(model: Model) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'attn\.c_attn'"):
        train(model, CAPITAL, target_modules=("attn.c_atn",))
    with pytest.raises(ValidationError, match="nothing to allocate"):
        AdaloraConfig(init_rank=8, target_rank=8)
    with pytest.raises(ConfigError, match="tinit=5"):
        train(model, CAPITAL, steps=6, tinit=5, tfinal=1)
    with pytest.raises(ConfigError, match="empty"):
        train(model, CAPITAL, layers=())
