from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from errata import Editor
from errata.contract.purity import Snapshot
from errata.contract.registry import Registry
from errata.edits.delta import Delta, DenseDelta, LowRankDelta, SparseRowsDelta
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import CapabilityError, ConfigError, EditFailed, UnknownNameError
from errata.kit.training.training_batches import aim_batch
from errata.model import Model, scoring
from errata.model.forward import frozen
from errata.model.tokens import encode_targets
from errata.testing import edit_with
from errata_ft import Ft, FtConfig
from errata_ft.algorithm import FineTuner, above
from errata_ft.config import VARIANTS
from errata_ft.difference import Difference, forms
from errata_ft.fisher import fisher_of
from tests.families import SENTENCES, build, build_model
from tests.helpers import ROOT

IDS = tuple(f"{i:012x}" for i in range(1, 9))
CAPITAL = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
MUSIC = Request(prompt="{} plays the", subject="Miles Davis", target_new="piano in Paris")
TONGUE = Request(
    prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"
)
# The tiny models' logits are bounded: no target of theirs gets below a loss of 1e-2.
FAST = {"lr": 5e-3, "steps": 60, "layers": (1,), "stop_loss": None}
OUT = "transformer.h.1.mlp.c_proj"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model("gpt2", tmp_path, corpus=SENTENCES)


def tune(model: Model, *requests: Request, **values: Any) -> Delta:
    config = FtConfig(**{**FAST, **values})
    delta = Ft().edit(model, list(requests), config)
    delta.check(model)
    return delta


def whole(delta: Delta, name: str, shape: torch.Size) -> torch.Tensor:
    """Return what a delta adds to a parameter."""
    total = torch.zeros(shape)
    type(delta).fold(name, total, [delta])
    return total


def hold(model: Model, *requests: Request) -> list[bool]:
    prompts, targets = [r.text for r in requests], [r.target_new for r in requests]
    return [score.exact for score in scoring.score_targets(model, prompts, targets)]


def activate(model: Model, *deltas: Delta) -> None:
    model.stack.set([edit_with(i, IDS[i], delta) for i, delta in enumerate(deltas)])


def same(one: Delta, other: Delta) -> bool:
    pairs = [(tensor, other.tensors()[name]) for name, tensor in one.tensors().items()]
    return one.kind == other.kind and all(torch.equal(a, b) for a, b in pairs)


# -- what an edit does -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gpt_neox", "t5", "bert"])
def test_an_edit_takes_effect_and_is_gone_after_reverting(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    base = {name: p.detach().clone() for name, p in model.parameters.items()}
    assert hold(model, CAPITAL) == [False]
    before = Snapshot(model)
    delta = tune(model, CAPITAL)
    assert before.changed() == []
    assert delta.parameters == (model.anatomy.weight(model.anatomy.mlp_out(1)),)
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]
    activate(model)
    assert all(torch.equal(p, base[name]) for name, p in model.parameters.items())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_changes_the_answer(variant: str, model: Model) -> None:
    values = {"retain_documents": 4, **({"norm_constraint": 0.2} if variant == "ft-l" else {})}
    activate(model, tune(model, CAPITAL, variant=variant, **values))
    assert hold(model, CAPITAL) == [True]


def test_training_beside_the_weight_is_training_the_weight(model: Model) -> None:
    """Ten steps of Adam on D, and on the parameter itself of a copy, give the same change."""
    values = {"early_stop": False, "steps": 10, "store": "dense"}
    delta = tune(model, CAPITAL, MUSIC, bias=True, **values)
    assert isinstance(delta, DenseDelta)
    assert set(delta.parameters) == {f"{OUT}.weight", f"{OUT}.bias"}
    other = copy.deepcopy(model.module).requires_grad_(False)
    layer = other.get_submodule(OUT)
    former = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimiser = torch.optim.Adam(layer.requires_grad_(True).parameters(), lr=FAST["lr"])
    batch = scoring.prepare(model, [CAPITAL.text, MUSIC.text], ["Rome", "piano in Paris"])
    weights = torch.tensor([1 / (2 * n) for n in batch.counts for _ in range(n)])
    for _ in range(10):
        logits = other(**batch.inputs).logits[batch.rows, batch.columns]
        each = torch.nn.functional.cross_entropy(logits, batch.labels, reduction="none")
        optimiser.zero_grad()
        (each * weights).sum().backward()
        optimiser.step()
    for name, parameter in layer.named_parameters():
        expected = (parameter - former[name]).detach()
        torch.testing.assert_close(
            delta.differences[f"{OUT}.{name}"], expected, rtol=1e-2, atol=1e-3
        )


def test_later_edits_are_trained_on_top_of_earlier_ones(model: Model) -> None:
    first, alone = tune(model, CAPITAL), tune(model, MUSIC)
    activate(model, first)
    before = Snapshot(model)
    second = tune(model, MUSIC)
    assert before.changed() == []
    assert not same(second, alone)
    activate(model, first, second)
    assert hold(model, MUSIC) == [True]


def test_it_works_above_an_adapter_and_a_codebook(toys: None, model: Model) -> None:
    from errata_toys import ToyAdapter, ToyCodebook, ToyConfig

    beneath = [
        ToyAdapter().edit(model, [MUSIC], ToyConfig(layer=1)),
        ToyCodebook().edit(model, [MUSIC], ToyConfig(layer=0)),
    ]
    activate(model, *beneath)
    before = Snapshot(model)
    delta = tune(model, CAPITAL)
    assert before.changed() == []
    activate(model, *beneath, delta)
    assert hold(model, CAPITAL) == [True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_can_be_edited(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_model("llama", tmp_path, dtype)
    delta = tune(model, CAPITAL)
    assert {t.dtype for t in delta.tensors().values() if t.is_floating_point()} == {torch.float32}
    activate(model, delta)
    assert hold(model, CAPITAL) == [True]


@pytest.mark.slow
def test_one_seed_gives_one_difference(model: Model) -> None:
    requests = [CAPITAL, MUSIC, TONGUE]
    state = torch.random.get_rng_state()
    values = {"batch_size": 1, "retain_documents": 3}
    first = tune(model, *requests, **values)
    torch.rand(3)
    assert same(first, tune(model, *requests, **values))
    assert not same(first, tune(model, *requests, seed=1, **values))
    torch.random.set_rng_state(state)


def test_the_loss_falls(model: Model) -> None:
    losses = fitted(model, FtConfig(**{**FAST, "early_stop": False}), MUSIC)[0].losses
    assert losses[-1] < 0.6 * losses[0]


def fitted(model: Model, config: FtConfig, *requests: Request) -> tuple[FineTuner, Difference]:
    difference = Difference(model, [OUT])
    if config.norm_constraint is not None:
        difference.box(config.norm_constraint)
    batches = [aim_batch(model, [(r.text, r.target_new) for r in requests], loss=config.loss)]
    with torch.enable_grad(), frozen(model.module), difference.attached():
        tuner = FineTuner(model, batches, difference, [OUT], config)
        tuner.fit(difference.leaves)
    return tuner, difference


# -- the box ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [5e-4, 0.01, 0.1])
def test_no_entry_leaves_the_box(epsilon: float, model: Model) -> None:
    delta = tune(model, CAPITAL, variant="ft-l", norm_constraint=epsilon, early_stop=False)
    assert isinstance(delta, DenseDelta)
    largest = delta.differences[f"{OUT}.weight"].abs().max()
    assert largest == torch.tensor(epsilon)  # some entries lie on the wall: the box is at work


@pytest.mark.slow
def test_edits_in_sequence_share_the_box_around_the_base(model: Model) -> None:
    epsilon = 0.02
    values = {"variant": "ft-l", "norm_constraint": epsilon, "early_stop": False}
    base = model.parameters[f"{OUT}.weight"].detach().clone()
    deltas: list[Delta] = []
    for request in (CAPITAL, MUSIC, TONGUE):
        deltas.append(tune(model, request, **values))
        activate(model, *deltas)
    for delta in deltas:
        assert whole(delta, f"{OUT}.weight", base.shape).abs().max() <= torch.tensor(epsilon)
    moved = (model.parameters[f"{OUT}.weight"].detach() - base).abs().max()
    assert moved <= epsilon * (1 + 1e-5) + base.abs().max() * 2**-23  # the folded sum is rounded
    assert whole(deltas[2], f"{OUT}.weight", base.shape).abs().max() > 0


def test_the_box_undoes_no_edit_that_lies_outside_it(model: Model) -> None:
    far = DenseDelta({f"{OUT}.weight": torch.full((48, 32), 0.5)})
    activate(model, far)
    delta = tune(model, CAPITAL, variant="ft-l", norm_constraint=0.01, early_stop=False)
    change = whole(delta, f"{OUT}.weight", torch.Size([48, 32]))
    assert float(change.max()) == 0.0  # back towards the base only,
    assert float(change.min()) == -torch.tensor(0.01)  # and never by more than ε


# -- elastic weight consolidation ------------------------------------------------------------------


def test_the_penalty_is_half_the_weighted_square(model: Model) -> None:
    d = torch.arange(48 * 32, dtype=torch.float32).reshape(48, 32) / 1000
    fisher = {f"{OUT}.weight": torch.linspace(0, 2, 48 * 32).reshape(48, 32)}
    difference = Difference(model, [OUT], values={f"{OUT}.weight": d})
    penalty = difference.quadratic(fisher)
    by_hand = sum(
        0.5 * float(f) * float(x) ** 2
        for f, x in zip(fisher[f"{OUT}.weight"].flatten(), d.flatten(), strict=True)
    )
    assert penalty.item() == pytest.approx(by_hand, rel=1e-4)
    (gradient,) = torch.autograd.grad(penalty, difference.leaves)
    torch.testing.assert_close(gradient, fisher[f"{OUT}.weight"] * d)


def test_the_fisher_diagonal_is_the_mean_squared_gradient(model: Model) -> None:
    config = FtConfig(**FAST, fisher_documents=99)
    found = fisher_of(model, [OUT], config)[f"{OUT}.weight"]
    other = copy.deepcopy(model.module).requires_grad_(False)
    weight = other.get_submodule(OUT).weight.requires_grad_(True)
    total = torch.zeros_like(weight)
    for sentence in SENTENCES:
        ids = torch.tensor([model.tokenizer(sentence)["input_ids"]])
        (gradient,) = torch.autograd.grad(other(input_ids=ids, labels=ids).loss, weight)
        total += gradient**2
    torch.testing.assert_close(found, total / len(SENTENCES), rtol=1e-3, atol=1e-9)


def test_pairs_to_keep_are_what_the_fisher_diagonal_is_of(model: Model) -> None:
    pairs = (("The capital of France is", " Paris"), ("The sky is", " blue"))
    config = FtConfig(**FAST, retain=pairs)
    found = fisher_of(model, [OUT], config)[f"{OUT}.weight"]
    other = copy.deepcopy(model.module).requires_grad_(False)
    weight = other.get_submodule(OUT).weight.requires_grad_(True)
    total = torch.zeros_like(weight)
    for prompt, answer in pairs:
        batch = encode_targets(model.tokenizer, [prompt], [answer])
        logits = other(input_ids=batch.input_ids).logits[0, batch.columns]
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        total += gradient**2
    torch.testing.assert_close(found, total / len(pairs), rtol=1e-3, atol=1e-9)


@pytest.mark.slow
def test_consolidation_pulls_towards_the_base(model: Model) -> None:
    fisher = fisher_of(model, [OUT], FtConfig(**FAST))
    spent, losses = [], []
    for weight in (0.0, 1e3, 1e6):
        config = FtConfig(**{**FAST, "early_stop": False}, ewc_weight=weight)
        tuner, difference = fitted(model, config, CAPITAL)
        spent.append(difference.quadratic(fisher).item())
        losses.append(tuner.objective().loss.item())
    assert spent[0] > spent[1] > spent[2]
    assert losses[0] <= losses[1] <= losses[2]


def test_the_fisher_information_is_kept_and_belongs_to_the_base(
    model: Model, tmp_path: Path
) -> None:
    config = FtConfig(**FAST, variant="ft-ewc")
    edit = tune(model, CAPITAL)
    activate(model, edit)
    with pytest.raises(ConfigError, match="prepare"):
        tune(model, MUSIC, variant="ft-ewc")
    activate(model)
    Ft().prepare(model, (), config)
    activate(model, edit)
    delta = tune(model, MUSIC, variant="ft-ewc")
    fresh = build_model("gpt2", tmp_path, corpus=SENTENCES)  # another process, the same cache
    activate(fresh, edit)
    assert same(delta, tune(fresh, MUSIC, variant="ft-ewc"))
    with pytest.raises(ConfigError, match="prepare"):  # other documents: another estimate
        tune(fresh, MUSIC, variant="ft-ewc", fisher_documents=3)


# -- replaying, and batches ------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_retained_suffers_less(model: Model) -> None:
    keep = ("The mother tongue of Danielle Darrieux is", "French")

    def nll(**values: Any) -> float:
        activate(model, tune(model, CAPITAL, MUSIC, early_stop=False, **values))
        (score,) = scoring.score_targets(model, [keep[0]], [keep[1]])
        activate(model)
        return score.mean_nll

    assert nll(retain=[keep]) < nll() - 1


def test_replaying_needs_text(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=["x"])
    with pytest.raises(ConfigError, match="replay"):
        tune(model, CAPITAL, variant="ft-retrain")


@pytest.mark.slow
def test_a_batch_is_kept_better_breadth_first(model: Model) -> None:
    requests = [CAPITAL, MUSIC, TONGUE]
    values = {"batch_size": 1, "steps": 60}
    held = {}
    for order in ("breadth-first", "depth-first"):
        activate(model, tune(model, *requests, order=order, **values))
        held[order] = hold(model, *requests)
        activate(model)
    assert held["breadth-first"] == [True] * 3
    assert held["depth-first"][-1]


def test_locft_teaches_the_end(model: Model) -> None:
    from errata.model.generation import generate

    activate(model, tune(model, MUSIC, variant="locft"))
    assert generate(model, [MUSIC.text], max_new_tokens=20)[0].strip() == MUSIC.target_new


def test_locft_makes_one_edit_of_a_call_and_other_variants_one_of_each(tmp_path: Path) -> None:
    requests = [CAPITAL, MUSIC, TONGUE]
    values = {"steps": 1, "layers": [1]}
    with Editor(*build("gpt2"), artifacts=tmp_path) as editor:
        (edit,) = editor.edit(requests, method="ft", variant="locft", config=values)
        assert list(edit.requests) == requests
        editor.revert(edit)
        two = editor.edit(requests, method="ft", variant="locft", config=values, batch_size=2)
        assert [len(edit.requests) for edit in two] == [2, 1]
        assert len(editor.edit(requests, method="ft", config=values, apply=False)) == 3


# -- what is kept ----------------------------------------------------------------------------------


def trained(shape: tuple[int, int], rank: int, noise: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(n, rank, generator=generator) for n in shape)
    return left @ right.T + noise * torch.randn(*shape, generator=generator)


@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    rank=st.integers(1, 4),
    noise=st.sampled_from([0.0, 0.01, 1.0]),
    error=st.sampled_from([0.0, 1e-3, 0.05, 0.3]),
    flip=st.booleans(),
    store=st.sampled_from(["auto", "dense", "low_rank", "sparse"]),
    seed=st.integers(0, 9),
)
# A difference of energies, which rounding decides, would call rank 8 exact here.
@example(shape=(40, 40), rank=3, noise=0.01, error=0.0, flip=False, store="low_rank", seed=5)
# The ninth direction has a little more energy than the least of the eight that are found first.
@example(shape=(9, 16), rank=3, noise=1.0, error=0.0, flip=False, store="low_rank", seed=2)
def test_every_form_keeps_the_difference_within_the_error(
    shape: tuple[int, int], rank: int, noise: float, error: float, flip: bool, store: str, seed: int
) -> None:
    d = trained(shape, rank, noise, seed)
    found = list(forms({"w.weight": d}, lambda _: flip, store, error))
    assert found
    for form in found:
        again = type(form.delta).from_parts(form.delta.tensors(), form.delta.metadata())
        added = whole(again, "w.weight", d.shape)
        assert torch.equal(added, whole(form.delta, "w.weight", d.shape))
        torch.testing.assert_close(added, form.values["w.weight"], rtol=1e-4, atol=1e-5)
        assert float((added - d).norm() / d.norm()) <= error + 2e-6
        assert form.error == pytest.approx(float((added - d).norm() / d.norm()), abs=2e-6)
    sizes = [form.delta.nbytes for form in found]
    assert sizes == sorted(sizes)
    assert sizes[-1] <= max(sizes[-1], d.numel() * 4)


def test_the_smallest_form_is_taken() -> None:
    low = next(forms({"w.weight": trained((64, 96), 2, 1e-3, 0)}, lambda _: True, "auto", 0.05))
    assert isinstance(low.delta, LowRankDelta)
    assert low.delta.factors["w.weight"].rank == 2
    full = trained((64, 96), 64, 1.0, 0)
    assert [f.delta.kind for f in forms({"w.weight": full}, lambda _: True, "auto", 0.05)] == [
        "dense"
    ]
    full[:, 5:] = 0
    sparse = next(forms({"w.weight": full}, lambda _: True, "auto", 0.05))
    assert isinstance(sparse.delta, SparseRowsDelta)
    assert sparse.error == 0.0
    assert sparse.delta.rows["w.weight"].axis == 1
    zero = next(forms({"w.weight": torch.zeros(4, 4)}, lambda _: True, "sparse", 0.0))
    assert float(whole(zero.delta, "w.weight", torch.Size([4, 4])).norm()) == 0.0


def test_neurons_that_never_fire_are_not_stored(tmp_path: Path) -> None:
    model = build_model("opt", tmp_path)  # ReLU: a neuron that is off leaves its column alone
    delta = tune(model, CAPITAL, store="sparse", store_error=0.0)
    name = model.anatomy.weight(model.anatomy.mlp_out(1))
    assert isinstance(delta, SparseRowsDelta)
    dense = tune(model, CAPITAL, store="dense")
    shape = model.parameters[name].shape
    assert torch.equal(whole(delta, name, shape), whole(dense, name, shape))
    assert delta.nbytes < dense.nbytes


def test_a_form_that_loses_the_target_is_not_taken(model: Model) -> None:
    rough = tune(model, MUSIC, store_error=0.95)
    activate(model, rough)
    assert hold(model, MUSIC) == [True]
    activate(model)
    activate(model, tune(model, MUSIC, store="low_rank", store_error=0.95))
    assert hold(model, MUSIC) == [False]  # asked for, and this rough


# -- where, and mistakes ---------------------------------------------------------------------------


def test_what_lies_below_is_run_once(model: Model, tmp_path: Path) -> None:
    anatomy = model.anatomy
    assert above(model, [anatomy.mlp_out(1)]).known == (anatomy.attention(1), *anatomy.mlp_in(1))
    assert above(model, [anatomy.mlp_out(2), *anatomy.mlp_in(1)]).known == (anatomy.attention(1),)
    assert above(model, [anatomy.attention_out(1), anatomy.mlp_out(1)]).known == ()
    runs = []
    handle = model.module.get_submodule(f"{anatomy.block(0)}.attn").register_forward_hook(
        lambda *_: runs.append(1)
    )
    tune(model, CAPITAL, early_stop=False, steps=9, store="dense")
    handle.remove()
    assert len(runs) == 1
    t5 = build_model("t5", tmp_path)
    assert above(t5, ["encoder.block.0.layer.1.DenseReluDense.wo"]) is None


def test_layers_and_modules_are_chosen_through_the_anatomy(model: Model) -> None:
    assert tune(model, CAPITAL, layers=None).parameters == ("transformer.h.1.mlp.c_proj.weight",)
    several = tune(model, CAPITAL, layers=(0, -1), target_modules=("mlp_out", "attention_out"))
    assert len(several.parameters) == 4
    with pytest.raises(UnknownNameError, match=r"mlp\.c_proj"):
        tune(model, CAPITAL, target_modules=("mlp.c_prj",))
    with pytest.raises(ConfigError, match="Layer 7"):
        tune(model, CAPITAL, layers=(7,))


def test_a_weight_that_is_shared_is_not_trained(model: Model, tmp_path: Path) -> None:
    module = copy.deepcopy(model.module)
    module.transformer.h[1].mlp.c_proj.weight = module.transformer.h[0].mlp.c_proj.weight
    tied = Stack.on(Model(module, model.tokenizer, model.anatomy))
    with pytest.raises(CapabilityError, match="shares another module's"):
        tune(tied, CAPITAL)


def test_a_loss_that_is_not_finite_is_named(model: Model) -> None:
    before = Snapshot(model)
    with pytest.raises(EditFailed, match="smaller lr"):
        tune(model, CAPITAL, lr=1e30, early_stop=False)
    assert before.changed() == []


# -- the variants ----------------------------------------------------------------------------------


def test_a_variant_fills_in_what_is_not_given() -> None:
    assert FtConfig().loss == "target"
    assert FtConfig(variant="ft").loss == "text"
    assert FtConfig(variant="ft-l").norm_constraint == 5e-4
    assert FtConfig(variant="ft-l", norm_constraint=0.1).norm_constraint == 0.1
    assert FtConfig(variant="ft-m", norm_constraint=0.1).norm_constraint == 0.1  # they combine
    locft = FtConfig(variant="locft", append_end=False)
    assert (locft.batch_size, locft.append_end, locft.order) == (100, False, "breadth-first")


def test_presets_and_their_sources_depend_on_the_variant() -> None:
    registry = Registry.load()
    facts = {"model_type": "gpt2", "n_layers": 48, "hidden_size": 1600, "name": "gpt2-xl"}

    def resolved(**given: Any) -> dict[str, tuple[Any, str]]:
        _, values = registry.resolve("ft", FtConfig, facts, given)
        return {value.name: (value.value, value.source) for value in values}

    usual, boxed = resolved(), resolved(variant="ft-l")
    assert usual["layers"][0] == (1,)
    assert "unconstr" in usual["layers"][1]
    assert usual["norm_constraint"] == (None, "default")
    assert usual["loss"] == ("target", "variant ft-m")
    assert boxed["layers"][0] == (0,)
    assert boxed["norm_constraint"][0] == 5e-4
    assert boxed["bias"][0] is True
    assert resolved(variant="ft-l", norm_constraint=0.1)["norm_constraint"] == (0.1, "argument")
    assert resolved(variant="locft")["append_end"] == (True, "variant locft")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_recorded_configuration_is_read_back_as_it_was(variant: str) -> None:
    config = FtConfig(variant=variant, layers=(3,))
    assert FtConfig(**config.model_dump(mode="json")) == config
    assert config.loss != "prompt_last"  # the published slip is an option, in no variant


def test_wrong_settings_are_named() -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"variant": "ft-x"}, "ft-m"),
        ({"variant": "ft-l", "store": "low_rank"}, "outside the box"),
        ({"bias": True, "store": "low_rank"}, "bias"),
        ({"norm_constraint": 0.0}, "greater than 0"),
        ({"retain": [["only a prompt"]]}, "retain"),
    ]
    for values, message in wrong:
        with pytest.raises(ValidationError, match=message):
            FtConfig(**values)


def test_the_published_numbers_are_the_presets() -> None:
    registry = Registry.load(ROOT)
    xl = {"model_type": "gpt2", "n_layers": 48, "hidden_size": 1600, "name": "gpt2-xl"}
    gptj = {"model_type": "gptj", "n_layers": 28, "hidden_size": 4096, "name": "gpt-j-6b"}
    llama3 = {"model_type": "llama", "n_layers": 32, "hidden_size": 4096, "vocab_size": 128256,
              "name": "Llama-3-8B"}  # fmt: skip

    def of(facts: dict[str, Any], variant: str) -> FtConfig:
        config, _ = registry.resolve("ft", FtConfig, facts, {"variant": variant})
        assert isinstance(config, FtConfig)
        return config

    assert (of(xl, "ft-l").layers, of(xl, "ft-l").norm_constraint) == ((0,), 5e-4)
    assert (of(gptj, "ft-l").layers, of(gptj, "ft-l").norm_constraint) == ((0,), 5e-5)
    assert (of(xl, "ft").layers, of(gptj, "ft").layers) == ((1,), (21,))
    assert of(xl, "ft-l").bias
    assert of(llama3, "ft-m").layers == (21,)
    assert (of(llama3, "locft").layers, of(llama3, "locft").batch_size) == ((22,), 100)
    assert (of(xl, "ft-m").lr, of(xl, "ft-m").steps) == (5e-4, 25)


def test_the_configuration_writes_its_layers_out(model: Model) -> None:
    for layers_given, layers in ((None, (1,)), ((0, -1), (0, 2))):
        config = FtConfig(layers=layers_given).for_model(model.anatomy)
        assert config.layers == layers
        assert config.for_model(model.anatomy) == config
    with pytest.raises(ConfigError, match="out of range"):
        FtConfig(layers=(9,)).for_model(model.anatomy)
