"""MEMIT: parity with the authors' code, and what each way of keeping history promises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata import zoo
from errata.contract.purity import Snapshot
from errata.datasets import atlas
from errata.edits.delta import KeyValueDelta, LowRankDelta
from errata.edits.request import Request
from errata.errors import CapabilityError, ConfigError, EditFailed
from errata.kit.closed_form.deltas import JointProblem, key_values, low_rank
from errata.kit.closed_form.layer_updates import (
    LayerUpdate,
    Prompts,
    boundary,
    grouped,
    spread,
    through,
)
from errata.kit.closed_form.matrices import Columns, NormalMatrix
from errata.kit.closed_form.statistics import (
    USUAL_NAMES,
    known_keys,
    mean_norm,
    prompts_of,
    second_moment_weights,
)
from errata.kit.closed_form.target_values import MemitObjective, norm_anchored
from errata.kit.values import OptimisedValue, ValueSettings, optimise_values
from errata.model import Model
from errata.model.forward import trace
from errata.model.loading import load_model
from errata.model.scoring import score_targets
from errata.model.tokens import encode, subject_position
from errata.testing import edit_with
from errata_alphaedit import AlphaEdit, AlphaEditConfig
from errata_emmet import Emmet, EmmetConfig
from errata_memit import Memit, MemitConfig
from errata_memit.algorithm import memit
from tests.families import DECODERS, SENTENCES, architectures, build_model, sampled
from tests.methods.golden import golden_model, recorded, relative
from tests.methods.golden import known_keys as golden_keys

CONTEXTS = ("{}", "Once upon a time. {}", "The city of Paris. {}")
REQUESTS = (
    Request(prompt="The mother tongue of {} is", subject="Danielle Darrieux", target_new="English"),
    Request(prompt="{} was born in", subject="Beyoncé", target_new="Rome"),
    Request(prompt="The piano of {}, the founder, is in", subject="Steve Jobs", target_new="Spain"),
)
FAST: dict[str, Any] = {
    "contexts": CONTEXTS, "layers": (0, 1), "steps": 5, "weight_decay": 0.0, "tokens": 200,
    "second_moment_weight": 10.0,
}  # fmt: skip


def tiny(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> Model:
    return build_model(family, directory, dtype, corpus=SENTENCES)


def on(model: Model, deltas: list[Any]) -> Any:
    return model.stack.temporarily(
        [edit_with(i + 1, f"{i:012x}", delta) for i, delta in enumerate(deltas)]
    )


def found(
    model: Model, requests: Any, **changes: Any
) -> tuple[list[LayerUpdate], dict[int, NormalMatrix], MemitConfig]:
    config = MemitConfig(**{**FAST, **changes})
    C = known_keys(model, config)
    return solved(model, requests, C, config), C, config


def solved(
    model: Model, requests: Any, C: dict[int, NormalMatrix], config: MemitConfig
) -> list[LayerUpdate]:
    return memit(model, requests, C, second_moment_weights(model, config), config)


def stored(
    model: Model,
    updates: list[LayerUpdate],
    C: dict[int, NormalMatrix],
    config: MemitConfig,
) -> list[KeyValueDelta]:
    """Return the joint edits of some updates."""
    λ = second_moment_weights(model, config)
    return key_values(model, updates, config, JointProblem.whitened(C, λ))


# -- the authors' code ---------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["batch8", "batch1"])
def test_parity_with_the_authors_code(batch: str, tmp_path: Path) -> None:
    tensors, about, requests, settings = recorded(f"4_memit/memit_L1-2_lam100_{batch}")
    model = golden_model(tmp_path)
    weight = about["hparams"]["mom2_update_weight"]
    config = MemitConfig(**settings, second_moment_weight=weight, history="none")
    updates = solved(model, requests, golden_keys(settings["layers"]), config)
    delta = low_rank(model, updates)
    for update in updates:
        want = f"layer{update.layer}."
        assert relative(update.K.flat, tensors[want + "keys"]) < 1e-4
        assert relative(update.h.flat, tensors[want + "cur_zs"]) < 1e-4
        assert relative(update.R.flat, tensors[want + "resid"]) < 1e-4
        assert relative(update.Δ.factors[1], tensors[want + "adj_k"]) < 1e-4
        factor = delta.factors[f"transformer.h.{update.layer}.mlp.c_proj.weight"]
        assert relative(factor.v @ factor.u.T, tensors[want + "dW"]) < 1e-4
    # What is measured on the edited model comes out, too.
    with on(model, [delta]):
        h = Prompts(model, requests, CONTEXTS[:1]).read(2, model.anatomy.block(2))[1].flat
    before = updates[0].h.flat
    assert float((h - tensors["zs"]).norm()) < float((before - tensors["zs"]).norm())


def test_a_single_frozen_edit_is_the_published_one(tmp_path: Path) -> None:
    tensors, about, requests, settings = recorded("4_memit/memit_L1-2_lam100_batch1")
    model = golden_model(tmp_path)
    weight = about["hparams"]["mom2_update_weight"]
    config = MemitConfig(**settings, second_moment_weight=weight)
    C = golden_keys(settings["layers"])
    (delta,) = stored(model, solved(model, requests, C, config), C, config)
    for layer in config.layers or ():
        name = f"transformer.h.{layer}.mlp.c_proj.weight"
        (total,) = KeyValueDelta.totals(name, [delta])
        assert relative(total.T, tensors[f"layer{layer}.dW"]) < 1e-4


# -- keys, residuals, shares ---------------------------------------------------------------------


def test_shares_and_places() -> None:
    assert spread([3, 4, 5]) == [(3, 5, 3), (4, 5, 2), (5, 5, 1)]
    assert boundary([3, 4, 5]) == [(3, 3, 1), (5, 5, 1)]
    assert boundary([4]) == [(4, 4, 1)]


def test_keys_are_averaged_over_two_groups() -> None:
    keys = torch.tensor([[[8.0], [1.0], [3.0]]])  # (1 request, 3 contexts, 1)
    assert grouped(keys).item() == 0.5 * 8 + 0.5 * 2
    assert grouped(keys[:, :1]).item() == 8.0


# Gemma 2 and 3 norm what the MLP gives before it is added: residuals there are not the stream's.
ADDING = [family for family in DECODERS if family not in ("gemma2", "gemma3_text")]


@pytest.mark.parametrize("family", sampled(ADDING))
def test_what_was_to_be_written_is_there(family: str, tmp_path: Path) -> None:
    """One bare context and a light C: the block's output becomes z, on every family."""
    model = tiny(family, tmp_path)
    before = Snapshot(model)
    settings = {"contexts": ("{}",), "second_moment_weight": 1e-9, "layers": (0, 1)}
    updates, C, config = found(model, REQUESTS[:1], **settings)
    assert before.changed() == []
    z = (updates[-1].h + updates[-1].R).flat  # the last layer brings all that is left
    (delta,) = stored(model, updates, C, config)
    delta.check(model)
    assert set(delta.pairs) == {model.anatomy.weight(model.anatomy.mlp_out(i)) for i in (0, 1)}
    with on(model, [delta]):
        batch = encode(model.tokenizer, [REQUESTS[0].text])
        with torch.no_grad(), trace(model.module, model.anatomy.block(1), stop=True) as seen:
            model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        position = subject_position(model.tokenizer, REQUESTS[0].prompt, REQUESTS[0].subject)
        h = seen[model.anatomy.block(1)].output
        assert h is not None
    assert relative(h[0, position], z[:, 0]) < 1e-3
    assert relative(updates[0].h.flat, z) > 1e-2


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_what_is_wanted_of_the_stream_is_asked_of_the_mlp(family: str, tmp_path: Path) -> None:
    """R of the stream becomes the change of the down projection that brings it about."""
    model = tiny(family, tmp_path)
    prompts = prompts_of(model, REQUESTS, MemitConfig(**FAST))
    _, v = prompts.read(1, model.anatomy.mlp_out(1))
    noise = torch.randn(v.tensor.shape, generator=torch.Generator().manual_seed(0)).double()
    other = v.tensor + 0.3 * v.tensor.norm(dim=1, keepdim=True) / noise.shape[1] ** 0.5 * noise
    wanted = other * (v.tensor.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True))
    norm = prompts.norm_behind(1)
    assert (norm is None) == (family == "gpt2")
    R = Columns(wanted) - v
    if norm is not None:
        R = through(norm, Columns(wanted)) - through(norm, v)
    asked = prompts.before_norm(1, R, [])
    assert relative(asked.flat, (Columns(wanted) - v).flat) < 1e-3


def test_an_edit_behind_a_norm_raises_its_target(tmp_path: Path) -> None:
    model = tiny("gemma2", tmp_path)
    updates, C, config = found(model, REQUESTS[:1], layers=(1,), second_moment_weight=1e-9)
    (delta,) = stored(model, updates, C, config)
    asked = [REQUESTS[0].text], [REQUESTS[0].target]
    before = sum(score_targets(model, *asked)[0].logprobs)
    with on(model, [delta]):
        assert sum(score_targets(model, *asked)[0].logprobs) > before + 0.05


def test_without_a_weight_it_is_in_units_of_what_usual_keys_weigh(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    given = {"second_moment_weight": None, "layers": (0, 1)}
    once = second_moment_weights(model, MemitConfig(**{**FAST, **given, "relative_weight": 0.5}))
    twice = second_moment_weights(model, MemitConfig(**{**FAST, **given, "relative_weight": 1.0}))
    for layer in (0, 1):
        K = torch.cat([
            _key(model, layer, f"It is known that {name}") for name in USUAL_NAMES
        ], 1)  # fmt: skip
        C = known_keys(model, MemitConfig(**{**FAST, **given}))[layer].metric
        usual = float((K * C.whiten(K)).sum(0).median())
        assert twice[layer] == pytest.approx(usual, rel=1e-4)
        assert once[layer] == pytest.approx(usual / 2, rel=1e-4)


def test_a_usual_keys_weight_is_read_at_the_names_of_an_encoder(tmp_path: Path) -> None:
    model = tiny("t5", tmp_path)
    config = MemitConfig(**{**FAST, "second_moment_weight": None, "relative_weight": 1.0})
    texts = [f"It is known that {name}" for name in USUAL_NAMES]
    weights, C = second_moment_weights(model, config), known_keys(model, config)
    for layer in (0, 1):
        path, keys = model.anatomy.reader.mlp_out(layer), []
        for text in texts:
            batch = encode(model.tokenizer, [text], keep_end=True)
            assert int(batch.input_ids[0, -1]) == model.tokenizer.eos_token_id
            with torch.no_grad(), trace(model.module, path, inputs=True, stop=True) as seen:
                model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            keys.append(seen[path].input[0, -2].double())  # before "</s>"
        K = torch.stack(keys, 1)
        usual = float((K * C[layer].metric.whiten(K)).sum(0).median())
        assert weights[layer] == pytest.approx(usual, rel=1e-4)


def _key(model: Model, layer: int, text: str) -> torch.Tensor:
    batch = encode(model.tokenizer, [text])
    path = model.anatomy.mlp_out(layer)
    with torch.no_grad(), trace(model.module, path, inputs=True, stop=True) as seen:
        model.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    given = seen[path].input
    assert given is not None
    return given.reshape(-1, given.shape[-1])[-1:].T.double()


def test_a_batch_meets_its_values_together_or_alone(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    together, *_ = found(model, REQUESTS, history="none")
    alone, *_ = found(model, REQUESTS, history="joint")
    for index, request in enumerate(REQUESTS):
        single, *_ = found(model, [request], history="none")
        for batch, own, one in zip(together, alone, single, strict=True):
            # In a joint edit each request is as if it were the only one; in a batch it is not.
            V, V_own, V_one = (update.Δ.factors[1] for update in (batch, own, one))
            assert relative(own.R.flat[:, index], one.R.flat[:, 0]) < 1e-4
            assert relative(V_own[:, index], V_one[:, 0]) < 1e-4
            assert relative(V[:, index], V_one[:, 0]) > 1e-3


@pytest.mark.parametrize("placement", ["spread", "boundary"])
def test_a_boundary_layer_gets_its_whole_residual(placement: str, tmp_path: Path) -> None:
    model = tiny("llama", tmp_path)
    given, *_ = found(model, REQUESTS[:1], layers=(0, 1, 2), placement=placement)
    layers = [update.layer for update in given]
    assert layers == ([0, 1, 2] if placement == "spread" else [0, 2])


# -- the two kinds of history --------------------------------------------------------------------


def test_joint_edits_give_one_delta_each_and_a_batch_one(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    plugin = Memit()
    config = MemitConfig(**FAST)
    plugin.prepare(model, SENTENCES, config)
    many = plugin.edit(model, REQUESTS, config)
    assert isinstance(many, list)
    assert [type(delta) for delta in many] == [KeyValueDelta] * 3
    whole = plugin.edit(model, REQUESTS, config.model_copy(update={"history": "none"}))
    assert isinstance(whole, LowRankDelta)
    assert {factor.rank for factor in whole.factors.values()} == {3}
    assert config.on_base
    assert not config.model_copy(update={"policy": "replay"}).on_base


def outputs(model: Model, requests: Any, layer: int) -> Tensor:
    """Return what a layer's down projection gives at the requests' own keys, (d, N)."""
    path = model.anatomy.mlp_out(layer)
    return Prompts(model, requests, CONTEXTS[:1]).read(layer, path)[1].flat


def test_history_keeps_what_earlier_batches_wrote(tmp_path: Path) -> None:
    """One layer, light C: joint edits meet all requests; batches without history undo each other.

    At one layer the keys do not depend on the edits, so what a batch forgets is the other batch.
    """
    model = tiny("gpt2", tmp_path)
    settings = {"layers": (1,), "contexts": ("{}",), "second_moment_weight": 1e-6}
    first, later = REQUESTS[:1], REQUESTS[1:]
    base = outputs(model, first, 1)
    updates, C, config = found(model, REQUESTS, **settings)
    wanted = base + updates[0].R.flat[:, :1]
    joint = stored(model, updates, C, config)
    with on(model, joint):
        kept = relative(outputs(model, first, 1), wanted)
    published = MemitConfig(**{**FAST, **settings, "history": "none"})
    one = low_rank(model, solved(model, first, C, published))
    with on(model, [one]):
        two = low_rank(model, solved(model, later, C, published))
    with on(model, [one, two]):
        lost = relative(outputs(model, first, 1), wanted)
    assert kept < 1e-3
    assert lost > 10 * kept


def test_replayed_edits_are_read_from_the_model_as_it_stands(tmp_path: Path) -> None:
    """At one layer, replaying meets the present model's value: W₀ + Δ_joint gives v at the key."""
    model = tiny("gpt2", tmp_path)
    settings = {"layers": (1,), "contexts": ("{}",), "second_moment_weight": 1e-6}
    updates, C, config = found(model, REQUESTS[:2], **settings)
    active = stored(model, updates, C, config)
    replay = config.model_copy(update={"policy": "replay"})
    with on(model, active):
        present = outputs(model, REQUESTS[2:], 1)
        again = solved(model, REQUESTS[2:], C, replay)
        (delta,) = stored(model, again, C, replay)
    with on(model, [*active, delta]):
        assert relative(outputs(model, REQUESTS[2:], 1), present + again[0].R.flat) < 1e-3
        assert relative(outputs(model, REQUESTS[2:], 1), present) > 1e-2
    frozen, *_ = found(model, REQUESTS[2:], **settings)
    name = model.anatomy.weight(model.anatomy.mlp_out(1))
    assert relative(delta.pairs[name].r.T, frozen[0].R.flat) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    wide, *_ = found(tiny("llama", tmp_path / "a"), REQUESTS[:1])
    narrow, C, config = found(tiny("llama", tmp_path / "b", dtype), REQUESTS[:1])
    for one, other in zip(wide, narrow, strict=True):
        assert relative(other.K.flat, one.K.flat) < 5e-2
    (delta,) = stored(tiny("llama", tmp_path / "b", dtype), narrow, C, config)
    (pair, *_) = delta.pairs.values()
    assert (pair.k.dtype, pair.w.dtype, pair.r.dtype) == (
        torch.float32, torch.float64, torch.float32,
    )  # fmt: skip


# -- options of the value ------------------------------------------------------------------------


@pytest.mark.slow
def test_it_stops_when_the_target_comes_first_everywhere() -> None:
    model = load_model(zoo.model_path("atlas-gpt2"), architectures=architectures())
    requests = atlas.requests(3)
    settings = ValueSettings(layer=1, at="block", steps=20, lr=0.3, clamp=15.0, kl_prompt=None)

    def values(**changes: Any) -> list[OptimisedValue]:
        config = MemitConfig(weight_decay=0.0, early_stop=0.0, kl_factor=0.0, **changes)
        objective = MemitObjective(config)
        return optimise_values(model, requests, CONTEXTS[:1], settings, objective)

    full, sooner, later = values(), values(top_steps=1), values(top_steps=3)
    for whole, one, three in zip(full, sooner, later, strict=True):
        assert whole.top
        assert one.top
        assert len(one.losses) + 2 <= len(three.losses) < len(whole.losses) == 20
        assert float(one.delta.norm()) < float(whole.delta.norm())


@pytest.mark.slow
def test_a_value_can_be_brought_to_the_usual_norm(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    norm = mean_norm(model, 1)
    m0, delta = torch.randn(4, 32).double(), torch.randn(4, 32).double()
    new = m0 + norm_anchored(Columns.of(m0), Columns.of(delta), norm).flat.T
    torch.testing.assert_close(new.norm(dim=1), torch.full((4,), norm, dtype=torch.float64))
    cosines = torch.cosine_similarity(new, m0 + delta)
    torch.testing.assert_close(cosines, torch.ones(4).double())
    assert mean_norm(tiny("gpt2", tmp_path), 1) == norm
    plain, *_ = found(model, REQUESTS, layers=(1,))
    scaled, *_ = found(model, REQUESTS, layers=(1,), norm_anchor=1.0)
    m0 = outputs(model, REQUESTS, 1)
    sizes = (m0 + scaled[0].R.flat).norm(dim=0)
    torch.testing.assert_close(
        sizes, torch.full((3,), norm, dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert relative(scaled[0].R.flat, plain[0].R.flat) > 1e-3


@pytest.mark.parametrize(
    ("plugin", "config"),
    [(Memit, MemitConfig), (Emmet, EmmetConfig), (AlphaEdit, AlphaEditConfig)],
)
def test_an_anchor_behind_a_norm_is_refused(plugin: Any, config: Any, tmp_path: Path) -> None:
    model = tiny("gemma2", tmp_path)
    fast = {**FAST, "layers": (1,), "norm_anchor": 1.0}
    if "second_moment_weight" not in config.model_fields:
        fast = {k: v for k, v in fast.items() if k != "second_moment_weight"} | {"fraction": 0.5}
    with pytest.raises(ConfigError, match=r"norm_anchor=1 has nothing to scale at layer 1"):
        plugin().edit(model, REQUESTS[:1], config(**fast))


def test_the_anchor_is_not_measured_on_an_edited_model(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    updates, C, config = found(model, REQUESTS[:1])
    deltas = stored(model, updates, C, config)
    with on(model, deltas), pytest.raises(ConfigError, match="prepare"):
        mean_norm(model, 1)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"contexts": ("Yes. {}",)}, "begin with"),
        ({"contexts": ("{}", "no place")}, "exactly one"),
        ({"kl_prompt": "it is a"}, "exactly one"),
        ({"layers": ()}, "at least one"),
        ({"layers": (1, 1)}, "each once"),
        ({"second_moment_weight": 0}, "greater than 0"),
        ({"history": "some"}, "joint"),
        ({"layer": 3}, "layer"),
    ],
)
def test_bad_settings_are_explained(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemitConfig(**bad)


def test_what_cannot_be_computed_is_refused(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    with pytest.raises(ConfigError, match="0 to 2"):
        found(model, REQUESTS, layers=(1, 7))
    with pytest.raises(EditFailed, match="lr"):
        found(model, REQUESTS[:1], lr=1e38, clamp=1e38)
    with pytest.raises(CapabilityError, match="encoder"):
        found(build_model("bert", tmp_path / "b", corpus=SENTENCES), REQUESTS[:1])


def test_without_layers_those_around_a_tenth_of_the_way_up(tmp_path: Path) -> None:
    model = tiny("gpt2", tmp_path)
    given, *_ = found(model, REQUESTS[:1], layers=None)
    assert [update.layer for update in given] == [0, 1, 2]
    given, *_ = found(model, REQUESTS[:1], layers=(-1, 0))
    assert [update.layer for update in given] == [0, 2]


def test_the_configuration_writes_its_layers_out(tmp_path: Path) -> None:
    anatomy = tiny("gpt2", tmp_path).anatomy
    for given, layers in ((None, (0, 1, 2)), ((-1, 0), (0, 2)), ("auto", "auto")):
        config = MemitConfig(layers=given, loss_layer=-1).for_model(anatomy)
        assert config.layers == layers
        assert config.loss_layer == 2
        assert config.for_model(anatomy) == config
    assert MemitConfig().for_model(anatomy).loss_layer is None
    with pytest.raises(ConfigError, match="twice"):
        MemitConfig(layers=(2, -1)).for_model(anatomy)
    with pytest.raises(ConfigError, match="Editor"):
        Memit().edit(tiny("gpt2", tmp_path), REQUESTS[:1], MemitConfig(layers="auto"))
