"""ROME: parity with the authors' code, and what the paper promises."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from errata import Editor
from errata.contract.purity import Snapshot
from errata.edits.delta import LowRankDelta
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import CapabilityError, ConfigError, EditFailed, ErrataError
from errata.kit.aims import aims_of
from errata.kit.contexts import prefix_contexts
from errata.kit.second_moments import SecondMoment
from errata.kit.values import ValueSettings, optimise_values
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.artifacts import Artifacts
from errata.model.forward import trace
from errata.model.scoring import own_scores
from errata.model.tokens import encode, subject_position
from errata.testing import edit_with, state_of
from errata.testing.contract import assert_same
from errata_rome import Rome, RomeConfig
from errata_rome.algorithm import RankOne, RomeObjective, contexts_of, rome, statistic_of
from tests.families import DECODERS, SENTENCES, architectures, build, build_model, sampled
from tests.helpers import GOLDEN

CONTEXTS = ("{}", "Once upon a time. {}", "The city of Paris. {}")
REQUESTS = (
    Request(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Request(prompt="{} was born in", subject="Beyoncé", target_new="Rome"),
    Request(prompt="The piano of {}, the founder, is in", subject="Steve Jobs", target_new="Spain"),
)
FAST = {"contexts": CONTEXTS, "second_moment": False, "layer": 1, "steps": 6}


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given.double() - expected.double()).norm() / expected.double().norm())


@contextmanager
def applied(model: Model, delta: LowRankDelta) -> Iterator[None]:
    with model.stack.temporarily([edit_with(1, "0123456789ab", delta)]):
        yield


# -- the authors' code ---------------------------------------------------------------------------

RECORDED = {
    "2_rome/rome_L2_mom2_true": "rome",
    "2_rome/rome_L0_wd1e-3_mom2_true": "rome",
    "3_r_rome/r_rome_L0_wd1e-3_mom2_true": "r-rome",
    "3_r_rome/p_rome_L0_wd1e-3_mom2_true": "p-rome",
}
FEW = [
    name if name.endswith("rome_L2_mom2_true") else pytest.param(name, marks=pytest.mark.slow)
    for name in RECORDED
]
"""One of them in the default run."""


@pytest.fixture(scope="module")
def golden() -> Model:
    folder = GOLDEN / "model"
    module = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return Stack.on(Model(module, tokenizer, Anatomy.of(module, architectures())))


def recorded(golden: Model, name: str) -> tuple[list[RankOne], dict[str, Tensor], dict[str, Any]]:
    """Return our edits of the recorded facts, and what was recorded."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    about = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    layer = about["hparams"]["layers"][0]
    moments = load_file(GOLDEN / "1_second_moment" / "second_moment.safetensors")
    C = SecondMoment(matrix=moments[f"C.{layer}"].double(), count=69700, layer=layer)
    config = RomeConfig(
        layer=layer,
        weight_decay=about["hparams"]["v_weight_decay"],
        variant=RECORDED[name],
        contexts=tuple(about["context_templates"]),
    )
    requests = [
        Request(prompt=fact["prompt"], subject=fact["subject"], target_new=fact["new"])
        for fact in about["facts"]
    ]
    return rome(golden, requests, contexts_of(golden, config), C, config), tensors, about


@pytest.mark.parametrize("name", FEW)
def test_parity_with_the_authors_code(golden: Model, name: str) -> None:
    edits, tensors, about = recorded(golden, name)
    for index, (edit, fact) in enumerate(zip(edits, about["facts"], strict=True)):
        want = {key.partition(".")[2]: t for key, t in tensors.items() if key[:2] == f"f{index}"}
        for key, ours in {
            "k_star": edit.k_star,
            "u": edit.u,
            "target_init": edit.value.v0,
            "delta": edit.value.delta,
            "v_star": edit.v_star,
            "cur_input": edit.k,
            "cur_output": edit.Wk,
            "right": edit.Λ,
        }.items():
            assert relative(ours, want[key]) < 1e-4, (index, key)
        stored = edit.delta(golden, about["hparams"]["layers"][0])
        (factor,) = stored.factors.values()
        assert factor.transposed
        dW = torch.outer(want["u"], want["right"])
        assert relative(factor.v @ factor.u.T, want.get("dW", dW)) < 1e-4
        losses = torch.tensor(edit.value.losses)
        assert losses.shape == (fact["n_steps"], 5)
        torch.testing.assert_close(losses, want["losses"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_recorded_effect_comes_out(golden: Model) -> None:
    edits, _, about = recorded(golden, "2_rome/rome_L0_wd1e-3_mom2_true")
    for edit, fact in zip(edits[:3], about["facts"], strict=False):
        prompt = fact["prompt"].replace("{}", fact["subject"])
        with applied(golden, edit.delta(golden, 0)):
            given = log_probs(golden, prompt, fact["new"])
        assert given == pytest.approx(fact["after"]["target_new"]["token_logprobs"], abs=2e-3)


def log_probs(model: Model, prompt: str, target: str) -> list[float]:
    """Return the log-probability of each target token after the prompt."""
    return list(own_scores(model, [prompt], [target], share=False)[0].logprobs)


# -- what an edit must be, on every family -------------------------------------------------------


def output_at_subject(model: Model, request: Request, layer: int) -> Tensor:
    """Return what the edited layer gives at the subject's last token of the bare prompt."""
    batch = encode(model.tokenizer, [request.text])
    name = model.anatomy.mlp_out(layer)
    with torch.no_grad(), trace(model.module, name, stop=True) as seen:
        model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    output = seen[name].output
    assert output is not None
    return output.view(-1, output.shape[-1])[
        subject_position(model.tokenizer, request.prompt, request.subject)
    ].float()


@pytest.mark.parametrize("family", sampled(DECODERS))
def test_the_value_is_written_and_the_model_left_alone(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    config = RomeConfig(**FAST, weight_decay=0.0)
    before = Snapshot(model)
    edits = rome(model, REQUESTS, CONTEXTS, None, config)
    assert before.changed() == []
    for edit, request in zip(edits, REQUESTS, strict=True):
        delta = edit.delta(model, 1)
        delta.check(model)
        assert relative(output_at_subject(model, request, 1), edit.Wk) < 1e-4
        with applied(model, delta):
            assert relative(output_at_subject(model, request, 1), edit.v_star) < 1e-4
        assert edit.value.losses[-1][1] < edit.value.losses[0][1]
        assert float(edit.value.delta.norm()) <= 4.0 * float(edit.value.v0.norm()) * 1.0001
    assert model.stack.differing() == []


@pytest.mark.parametrize(("family", "kept"), [("gemma2", True), ("gpt2", False)])
def test_a_value_behind_a_norm_keeps_its_length(family: str, kept: bool, tmp_path: Path) -> None:
    """Where a norm follows, only the direction counts, and nothing else bounds the length."""
    config = RomeConfig(**FAST, weight_decay=0.0)
    for edit in rome(build_model(family, tmp_path), REQUESTS, CONTEXTS, None, config):
        assert float(edit.value.delta.norm()) > 0.01 * float(edit.value.v0.norm())
        same = abs(float(edit.value.v_star.norm() / edit.value.v0.norm()) - 1) < 1e-4
        assert same == kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_other_dtypes(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config = RomeConfig(**FAST, weight_decay=0.0)
    wide = rome(build_model(family, tmp_path), REQUESTS[:1], CONTEXTS, None, config)[0]
    model = build_model(family, tmp_path, dtype)
    edit = rome(model, REQUESTS[:1], CONTEXTS, None, config)[0]
    (factor,) = edit.delta(model, 1).factors.values()
    assert factor.u.dtype == factor.v.dtype == torch.float32
    assert relative(edit.u, wide.u) < 3e-2
    assert edit.value.losses[-1][0] == pytest.approx(wide.value.losses[-1][0], rel=5e-2)


@pytest.mark.parametrize("variant", ["rome", "r-rome", "p-rome"])
def test_variants_meet_their_constraint(variant: str, tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    config = RomeConfig(**FAST, variant=variant)
    edit = rome(model, REQUESTS[:1], CONTEXTS, None, config)[0]
    keys, outputs = edit.value.keys.double(), edit.value.outputs.double()
    torch.testing.assert_close(edit.Wk + edit.Λ * torch.dot(edit.u, edit.k), edit.v_star)
    averaged = variant == "r-rome"
    torch.testing.assert_close(edit.k, keys.mean(0) if averaged else keys[0])
    torch.testing.assert_close(edit.Wk, outputs.mean(0) if averaged else outputs[0])
    torch.testing.assert_close(edit.k_star, keys[0] if variant == "p-rome" else keys.mean(0))
    torch.testing.assert_close(edit.u, edit.k_star / edit.k_star.norm())


# -- many requests -------------------------------------------------------------------------------


def test_requests_do_not_see_each_other(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    # The loss that the second reaches half way: some requests are done early and leave the batch.
    config = RomeConfig(**{**FAST, "steps": 12}, early_stop=0.0, weight_decay=0.0)
    (probe,) = rome(model, REQUESTS[1:2], CONTEXTS, None, config)
    config = config.model_copy(update={"early_stop": probe.value.losses[6][0] * 1.001})
    together = rome(model, REQUESTS, CONTEXTS, None, config)
    lengths = set()
    for edit, request in zip(together, REQUESTS, strict=True):
        (alone,) = rome(model, [request], CONTEXTS, None, config)
        assert len(edit.value.losses) == len(alone.value.losses)
        assert float((edit.Λ - alone.Λ).norm()) <= 1e-4 * float(alone.Λ.norm())
        assert relative(edit.u, alone.u) < 1e-4
        lengths.add(len(edit.value.losses))
    assert len(lengths) > 1, "the requests should finish at different steps"


def test_the_batch_may_be_cut_anywhere(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    objective = RomeObjective(RomeConfig(weight_decay=0.0))
    whole, cut = (
        optimise_values(
            model, REQUESTS, CONTEXTS, ValueSettings(layer=1, steps=4, rows=rows), objective
        )
        for rows in (None, 5)
    )
    for one, other in zip(whole, cut, strict=True):
        assert relative(other.delta, one.delta) < 1e-4


def test_a_finished_request_keeps_its_value(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    edit = rome(model, REQUESTS[:1], CONTEXTS, None, RomeConfig(**FAST, early_stop=1e3))[0]
    assert len(edit.value.losses) == 1
    assert not edit.value.delta.any()


# -- the plugin ----------------------------------------------------------------------------------


def test_edits_of_the_plugin_and_their_statistics(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    plugin = Rome()
    config = RomeConfig(layer=1, steps=4, tokens=150, context_lengths=((3, 2),))
    plugin.prepare(model, SENTENCES, config)
    kept = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.safetensors")}
    assert kept == {"contexts", "second_moment"}
    deltas = plugin.edit(model, REQUESTS, config)
    assert [type(delta) for delta in deltas] == [LowRankDelta] * 3
    name = model.anatomy.weight(model.anatomy.mlp_out(1))
    assert all(delta.factors[name].rank == 1 for delta in deltas)
    # What was prepared on the base serves a model that is edited by now.
    C = statistic_of(model, config)
    assert C is not None
    with applied(model, deltas[0]):
        again = plugin.edit(model, REQUESTS[1:], config)
        torch.testing.assert_close(statistic_of(model, config).matrix, C.matrix)  # type: ignore[union-attr]
    assert len(again) == 2
    # C whitens: u is along C⁻¹ k*.
    (edit,) = rome(model, REQUESTS[:1], contexts_of(model, config), C, config)
    along = C.matrix @ edit.u
    assert float(torch.dot(along, edit.k_star) / along.norm() / edit.k_star.norm()) > 1 - 1e-6


def test_facts_of_one_subject_in_one_batch_are_made_one_after_the_other(tmp_path: Path) -> None:
    one = REQUESTS[0]
    born = Request(prompt="{} was born in", subject=one.subject, target_new="Rome")
    same = one.model_copy(update={"case_id": "7"})
    states = []
    with Editor(*build("gpt2"), artifacts=tmp_path) as editor:
        for size in (1, 3):
            asked = [one, born, same]
            edits = editor.edit(asked, method="rome", config=FAST, batch_size=size)
            states.append({n: tensor.clone() for n, tensor in state_of(editor.model).items()})
            editor.revert(*edits)
        assert_same(states[1], states[0])
        # Those of different subjects are fitted together: they do not know each other.
        edits = editor.edit([*REQUESTS, born], method="rome", config=FAST, batch_size=4)
        first = {edit.id for edit in edits[:3]}
        below = [first & {edit.on_top_of, *edit.parents} for edit in edits]
        assert list(map(len, below)) == [0, 0, 0, 3]


def test_no_statistic_without_whitening(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    config = RomeConfig(**FAST)
    Rome().prepare(model, (), config)
    assert list(tmp_path.rglob("*.safetensors")) == []
    assert len(Rome().edit(model, REQUESTS[:1], config)) == 1


def test_an_erased_fact_is_less_said_and_no_word_is_put_in_its_place(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    request = Request(prompt="{} was born in", subject="Beyoncé", kind="erase")
    (old,) = aims_of(model, request)  # what this model says
    (delta,) = Rome().edit(model, [request], RomeConfig(**FAST, weight_decay=0.0))
    before = sum(log_probs(model, request.text, old.answer.strip()))
    with applied(model, delta):
        assert sum(log_probs(model, request.text, old.answer.strip())) <= before


# -- contexts ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_contexts_are_reproducible_and_belong_to_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_model("gpt2", tmp_path / "a")
    made = prefix_contexts(first, ((5, 4), (10, 3)), seed=3)
    state = torch.random.get_rng_state()
    torch.manual_seed(99)
    again = prefix_contexts(build_model("gpt2", tmp_path / "b"), ((5, 4), (10, 3)), seed=3)
    torch.random.set_rng_state(state)
    assert made == again
    assert made[0] == "{}"
    assert len(made) == 8
    assert all(text.endswith(". {}") and text.count("{") == 1 for text in made[1:])
    assert prefix_contexts(first, ((5, 4), (10, 3)), seed=4) != made
    other = build_model("gpt2", tmp_path / "a", seed=1)
    assert prefix_contexts(other, ((5, 4), (10, 3)), seed=3) != made
    cache = Artifacts(tmp_path / "a")
    kept = Stack.on(Model(first.module, first.tokenizer, first.anatomy, artifacts=cache))
    monkeypatch.setattr(type(first.module), "forward", None)
    assert prefix_contexts(kept, ((5, 4), (10, 3)), seed=3) == made, "read, not sampled"


def test_contexts_may_begin_with_given_words(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    texts = prefix_contexts(model, ((4, 4),), starts=("The", "Once"))
    for text, start in zip(texts[1:], ("The", "Once") * 2, strict=True):
        assert text.startswith(start)


def test_contexts_are_not_generated_from_an_edited_model(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    (edit,) = rome(model, REQUESTS[:1], CONTEXTS, None, RomeConfig(**FAST))
    with applied(model, edit.delta(model, 1)), pytest.raises(ConfigError, match="prepare"):
        prefix_contexts(model, ((5, 1),))


# -- settings and refusals -----------------------------------------------------------------------


def test_a_vanishing_division_factor_is_refused(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    config = RomeConfig(**FAST, min_division=2.0)  # no cosine is that large
    with pytest.raises(EditFailed, match=r"division factor.*r-rome") as caught:
        rome(model, REQUESTS[:1], CONTEXTS, None, config)
    assert isinstance(caught.value, ErrataError)


def test_a_loss_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    before = Snapshot(model)
    with pytest.raises(EditFailed, match="lr"):
        rome(model, REQUESTS[:1], CONTEXTS, None, RomeConfig(**FAST, lr=1e38, clamp=1e38))
    assert before.changed() == []


def test_only_causal_decoders(tmp_path: Path) -> None:
    with pytest.raises(CapabilityError, match="encoder"):
        rome(build_model("bert", tmp_path), REQUESTS[:1], CONTEXTS, None, RomeConfig(**FAST))


def test_a_layer_that_is_not_there(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="0 to 2"):
        Rome().edit(model, REQUESTS[:1], RomeConfig(**{**FAST, "layer": 7}))
    last = Rome().edit(model, REQUESTS[:1], RomeConfig(**{**FAST, "layer": -1}))[0]
    assert last.parameters == (model.anatomy.weight(model.anatomy.mlp_out(2)),)


def test_without_a_layer_a_third_of_the_way_up(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    (delta,) = Rome().edit(model, REQUESTS[:1], RomeConfig(**{**FAST, "layer": None}))
    assert delta.parameters == (model.anatomy.weight(model.anatomy.mlp_out(1)),)


def test_the_configuration_writes_its_layer_out(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    for given, layer in ((None, 1), (-1, 2), (0, 0), ("auto", "auto")):
        config = RomeConfig(layer=given, loss_layer=-1).for_model(model.anatomy)
        assert (config.layer, config.loss_layer) == (layer, 2)
        assert config.for_model(model.anatomy) == config
    with pytest.raises(ConfigError, match="Editor"):
        Rome().edit(model, REQUESTS[:1], RomeConfig(**{**FAST, "layer": "auto"}))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"contexts": ("Yes. {}",)}, "begin with"),
        ({"contexts": ("{}", "no place")}, "exactly one"),
        ({"kl_prompt": "it is a"}, "exactly one"),
        ({"layers": 3}, "layers"),
        ({"lr": 0}, "greater than 0"),
    ],
)
def test_bad_settings_are_explained(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RomeConfig(**bad)


@pytest.mark.parametrize("token", ["subject_first", "subject_first_after_last", "last"])
def test_other_tokens_can_be_edited(token: str, tmp_path: Path) -> None:
    model = build_model("qwen2", tmp_path)
    default, other = (
        rome(model, REQUESTS[:1], CONTEXTS, None, RomeConfig(**FAST, fact_token=which))[0]
        for which in ("subject_last", token)
    )
    assert relative(other.k, default.k) > 1e-2


def test_a_lower_loss_layer_and_no_kl(tmp_path: Path) -> None:
    model = build_model("gptj", tmp_path)
    config = RomeConfig(**{**FAST, "layer": 0}, loss_layer=1, kl_factor=0.0, weight_decay=0.0)
    (early,) = rome(model, REQUESTS[:1], CONTEXTS, None, config)
    (full,) = rome(model, REQUESTS[:1], CONTEXTS, None, RomeConfig(**{**FAST, "layer": 0}))
    assert early.value.losses[0][0] != pytest.approx(full.value.losses[0][0], rel=1e-4)
    assert all(row[2] == 0.0 for row in early.value.losses)
    assert early.value.losses[-1][0] < early.value.losses[0][0]


def test_values_at_block_outputs(tmp_path: Path) -> None:
    """The MEMIT family's place for δ, also at the last block."""
    model = build_model("llama", tmp_path)
    for layer in (1, 2):
        settings = ValueSettings(layer=layer, at="block", steps=4)
        objective = RomeObjective(RomeConfig(weight_decay=0.0))
        (value,) = optimise_values(model, REQUESTS[:1], CONTEXTS, settings, objective)
        batch = encode(model.tokenizer, [REQUESTS[0].text])
        with torch.no_grad(), trace(model.module, model.anatomy.block(layer)) as seen:
            model.module(input_ids=batch.input_ids)
        output = seen[model.anatomy.block(layer)].output
        assert output is not None
        position = subject_position(model.tokenizer, REQUESTS[0].prompt, REQUESTS[0].subject)
        torch.testing.assert_close(value.v0, output[0, position], rtol=1e-4, atol=1e-5)
        if layer < 2:  # after the last block the subject is seen by nobody
            assert value.losses[-1][0] < value.losses[0][0]
