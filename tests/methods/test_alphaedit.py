"""AlphaEdit: parity with the authors' code over two batches, and what the projector promises."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata import Editor
from errata.edits.delta import Delta, KeyValueDelta, LowRankDelta
from errata.edits.request import Request
from errata.errors import ConfigError
from errata.kit.closed_form.deltas import JointProblem, key_values, low_rank
from errata.kit.metric import Metric, Projection
from errata.kit.null_space import null_space
from errata.testing import edit_with
from errata_alphaedit import AlphaEdit, AlphaEditConfig
from errata_alphaedit.algorithm import alphaedit, earlier_requests, keys_of, null_spaces
from tests.families import SENTENCES, build, build_model, put_on
from tests.methods.golden import golden_model, recorded, relative, second_moment
from tests.methods.test_memit import CONTEXTS, REQUESTS

TINY = {
    "contexts": CONTEXTS, "layers": (0, 1), "steps": 4, "weight_decay": 0.0, "tokens": 200,
    "fraction": 0.5, "l2": 0.1,
}  # fmt: skip


@pytest.mark.slow
def test_parity_with_the_authors_code_over_two_batches(tmp_path: Path) -> None:
    tensors, about, requests, settings = recorded("5_emmet_alphaedit/alphaedit_L0-1_l2_0.1")
    given = about["hparams"]
    model = golden_model(tmp_path)
    config = AlphaEditConfig(
        **settings, threshold=given["nullspace_threshold"], l2=given["L2"], history="none"
    )
    P: dict[int, Metric] = {}
    for layer in config.layers or ():
        space = null_space(model, second_moment(layer), threshold=config.threshold)
        assert space.rank == about["null_space"][str(layer)]["kept_directions"]
        assert relative(space.basis @ space.basis.T, tensors[f"layer{layer}.P"]) < 1e-4
        P[layer] = Projection(space)
    earlier: list[Request] = []
    for number, batch in enumerate(about["batches"]):
        chosen = [requests[index] for index in batch["batch"]]
        updates = alphaedit(model, chosen, P, config, dict.fromkeys(P, earlier))
        delta = low_rank(model, updates)
        for update in updates:
            want = f"b{number}.layer{update.layer}."
            assert relative(update.K.flat, tensors[want + "keys"]) < 1e-4
            assert relative(update.h.flat, tensors[want + "cur_zs"]) < 1e-4
            factor = delta.factors[f"transformer.h.{update.layer}.mlp.c_proj.weight"]
            assert relative(factor.v @ factor.u.T, tensors[want + "dW"]) < 1e-4
        put_on(model.stack, edit_with(number + 1, f"{number:012x}", delta))
        # The keys of the batch count from now on, read again from the edited model.
        for layer in P:
            K = keys_of(model, chosen, layer, config)
            assert relative(K.flat, tensors[f"b{number}.layer{layer}.keys_for_cache"]) < 1e-4
        earlier = earlier + chosen


def test_nothing_is_written_outside_the_null_space(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = AlphaEditConfig(**TINY)
    P = null_spaces(model, config)
    updates = alphaedit(model, REQUESTS, P, config, {})
    deltas = key_values(model, updates, config, JointProblem(P, dict.fromkeys(P, config.l2)))
    outside = torch.randn(48, 200, generator=torch.Generator().manual_seed(0)).double()
    for layer in (0, 1):
        name = model.anatomy.weight(model.anatomy.mlp_out(layer))
        (total,) = KeyValueDelta.totals(name, deltas)
        kept = outside - P[layer].whiten(outside)
        assert float((total @ kept).norm()) < 1e-9 * float((total @ outside).norm())


def test_joint_edits_are_one_batch(tmp_path: Path) -> None:
    """At one layer, a joint solution and the published batch agree: the keys are the same."""
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    config = AlphaEditConfig(**{**TINY, "layers": (1,)})
    P = null_spaces(model, config)
    published = config.model_copy(update={"history": "none"})
    (batch,) = alphaedit(model, REQUESTS, P, published, {})
    name = model.anatomy.weight(model.anatomy.mlp_out(1))
    updates = alphaedit(model, REQUESTS, P, config, {})
    deltas = key_values(model, updates, config, JointProblem(P, dict.fromkeys(P, config.l2)))
    (total,) = KeyValueDelta.totals(name, deltas)
    u, v = batch.Δ.factors
    assert relative(total, u @ v.T) < 1e-5


def test_the_projector_is_told_and_kept_under_the_models_fingerprint(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    plugin = AlphaEdit()
    config = AlphaEditConfig(**TINY)
    plugin.prepare(model, SENTENCES, config)
    kept = {path.relative_to(tmp_path).parts[:2] for path in tmp_path.rglob("*.safetensors")}
    assert ("spectrum", model.fingerprint) in kept
    made = plugin.edit(model, REQUESTS[:1], config)
    assert isinstance(made, list)
    for metric in made[0].metadata()["metric"].values():
        assert metric["directions"] == [24, 48]
        assert metric["threshold"] > 0
        assert 0 < metric["energy"] < 0.5
    # Another model of the same shape has a null space, and a file, of its own.
    other = build_model("gpt2", tmp_path, seed=1, corpus=SENTENCES)
    plugin.prepare(other, SENTENCES, config)
    theirs = plugin.edit(other, REQUESTS[:1], config)
    assert isinstance(theirs, list)
    mine = [metric["digest"] for metric in made[0].metadata()["metric"].values()]
    assert not {m["digest"] for m in theirs[0].metadata()["metric"].values()} & set(mine)


def test_a_fraction_wins_over_the_threshold_and_one_is_needed(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=SENTENCES)
    small = null_spaces(model, AlphaEditConfig(**{**TINY, "fraction": 0.25}))
    assert {metric.rank for metric in small.values()} == {12}
    with pytest.raises(ConfigError, match="keeps 0 of 48"):
        null_spaces(model, AlphaEditConfig(**{**TINY, "fraction": None, "threshold": 1e-12}))
    with pytest.raises(ValueError, match="both null"):
        AlphaEditConfig(fraction=None)


def test_a_threshold_that_is_given_sets_aside_a_fraction_that_is_not() -> None:
    with Editor("atlas-gpt2", guards={"norm": "off", "perplexity": "off"}) as editor:
        preset, _ = editor.configure("alphaedit")
        assert preset.fraction == 0.8
        given, _ = editor.configure("alphaedit", {"threshold": 1e-3})
        assert (given.threshold, given.fraction) == (1e-3, None)
        both, _ = editor.configure("alphaedit", {"threshold": 1e-3, "fraction": 0.5})
        assert both.fraction == 0.5
        fast = {"contexts": ("{}",), "steps": 2, "tokens": 2000}
        edit = editor.edit(REQUESTS[0], method="alphaedit", config=fast)
        (again,) = editor.resolve(threshold=1e-3)
        assert (again.config["threshold"], again.config["fraction"]) == (1e-3, None)
        (one,), (two,) = (e.delta.metadata()["metric"].values() for e in (edit, again))
        assert one["digest"] != two["digest"]
        assert two["threshold"] == 1e-3


# -- batches as published, one after the other ---------------------------------------------------


def test_a_published_batch_leaves_the_keys_of_earlier_ones_alone(tmp_path: Path) -> None:
    """K_p is what the published edits that are active wrote, whoever opens the ledger again."""
    settings = {**TINY, "layers": (1,), "history": "none", "l2": 1e-3}
    config = AlphaEditConfig(**settings)

    def opened() -> Editor:
        module, tokenizer = build("gpt2")
        folder = tmp_path / "ledger"
        quiet = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
        return Editor(
            module, tokenizer, ledger=folder, artifacts=tmp_path, guards=quiet, corpus=SENTENCES
        )

    def change(delta: Delta) -> torch.Tensor:
        assert isinstance(delta, LowRankDelta)
        (factor,) = delta.factors.values()
        return (factor.u @ factor.v.T).double()

    with opened() as editor:
        (first,) = editor.edit(REQUESTS[:2], method="alphaedit", config=settings)
    with opened() as editor:
        model = editor.model
        assert earlier_requests(model, "alphaedit") == {1: [*first.requests]}
        P = null_spaces(model, config)
        K_p = keys_of(model, first.requests, 1, config).flat
        unaware = low_rank(model, alphaedit(model, REQUESTS[2:], P, config, {}))
        (second,) = editor.edit(REQUESTS[2:], method="alphaedit", config=settings)
        assert relative(change(second.delta), change(unaware)) > 1e-2
        assert float((change(second.delta) @ K_p).norm()) < 1e-2 * float(
            (change(unaware) @ K_p).norm()
        )
        # What was taken off asks for nothing.
        editor.revert(first, second)
        assert earlier_requests(model, "alphaedit") == {}


def test_batches_of_one_call_know_each_other(tmp_path: Path) -> None:
    """`batch_size` cuts a call into batches as published: each finds the former on the model."""
    module, tokenizer = build("gpt2")
    quiet = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
    settings = {**TINY, "layers": (1,), "history": "none"}
    with Editor(module, tokenizer, artifacts=tmp_path, guards=quiet, corpus=SENTENCES) as editor:
        first, second = editor.edit(REQUESTS[:2], method="alphaedit", config=settings, batch_size=1)
        assert second.on_top_of == first.id
        one_by_one = [edit.delta.tensors() for edit in (first, second)]
        editor.revert(first, second)
        again = [
            editor.edit(request, method="alphaedit", config=settings) for request in REQUESTS[:2]
        ]
        for tensors, edit in zip(one_by_one, again, strict=True):
            for name, tensor in edit.delta.tensors().items():
                assert torch.equal(tensors[name], tensor)
