"""KnowledgeEditor: its gate, its constraint, and edits of a classifier."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request
from errata.kit.hypernetworks import Signals, signals_of
from errata.kit.hypernetworks.lessons import Answered
from errata.kit.hypernetworks.predictions import prediction
from errata.model import Model
from errata.model.generation import generate
from errata.model.next_token import class_scores, predicted_classes
from errata_ke import Ke, KeConfig
from errata_ke.condition import Conditions
from errata_ke.editing import cross_attention
from errata_ke.network import KnowledgeEditor, root_mean_square
from tests.families import build, build_model

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
SMALL: dict[str, Any] = {
    "variant": "small", "hidden": 8, "condition": 16, "inner": 8, "steps": 4, "validate_every": 2,
    "validation": 2, "batch_size": 2, "n_locality": 2,
}  # fmt: skip
NAMES = ("France", "Spain", "Italy", "Rome", "Paris", "Madrid", "London", "Berlin")
REQUESTS = [
    Request(
        kind="label", prompt="{} is a city", subject=name, target_new="economic",
        target_true="other", paraphrases=(f"a city: {name}",),
    )
    for name in NAMES
]  # fmt: skip


def editing(model: Model, **config: Any) -> tuple[KnowledgeEditor, list[Signals]]:
    modules = [model.anatomy.mlp_out(1)]
    network = KnowledgeEditor(model, modules, KeConfig(**{**SMALL, **config}))
    return network, signals_of(model, REQUESTS[:2], modules)


def answered(kl: float) -> Answered:
    return Answered(torch.ones(2), torch.ones(2).bool(), torch.tensor(kl), torch.tensor(kl), 1.0)


def test_the_change_is_the_gated_gradient_and_a_row(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)
    network, signals = editing(model)
    (path,) = network.paths
    factors = network(signals[0])[path]
    change = factors.u[0].T @ factors.v[0]
    a_col, a_row, b_col, b_row, s = (
        part[0] for part in network.conditioners[0](network.read(signals[0].requests))
    )
    gradient = signals[0].errors[path][0].T @ signals[0].inputs[path][0]
    gate, beside = torch.outer(a_row.softmax(-1), a_col), torch.outer(b_row.softmax(-1), b_col)
    wanted = s.sigmoid() * (gradient * gate + beside)
    torch.testing.assert_close(change, wanted, rtol=1e-4, atol=1e-6)


def test_the_condition_is_read_not_the_padding_beside_it(tmp_path: Path) -> None:
    network, _ = editing(build_model("bert-classifier", tmp_path))
    long = REQUESTS[0].model_copy(update={"prompt": "{} is a city in France, or it is not"})
    alone = network.read([REQUESTS[1]])
    together = network.read([REQUESTS[1], long])
    torch.testing.assert_close(alone[0], together[0])
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_the_multiplier_rises_while_the_constraint_is_broken(tmp_path: Path) -> None:
    network, _ = editing(build_model("bert-classifier", tmp_path))
    for kl, rises in ((5.0, True), (0.0, False)):
        loss = network.objective(answered(kl))
        (gradient,) = torch.autograd.grad(loss, network.alpha)
        assert bool(gradient < 0) is rises  # an optimiser steps against it
    network.alpha.data.fill_(-1.0)
    network.stepped()
    assert network.alpha.item() == 0.0


def test_the_size_of_the_change_can_be_bounded_instead(tmp_path: Path) -> None:
    network, signals = editing(build_model("bert-classifier", tmp_path), constraint="l2")
    change = network(signals[0])[network.paths[0]]
    size = (change.u[0].T @ change.v[0]).square().mean().sqrt()
    torch.testing.assert_close(root_mean_square(change), size)
    loss = network.objective(answered(5.0))
    torch.testing.assert_close(loss, 1 + size - network.margin)


def test_the_margin_shrinks_after_success_down_to_its_end(tmp_path: Path) -> None:
    network, _ = editing(build_model("bert-classifier", tmp_path), margin=0.1, margin_end=0.05)
    network.validated({"success": 0.5})
    assert float(network.margin) == pytest.approx(0.1)
    for _ in range(5):
        network.validated({"success": 0.95})
    assert float(network.margin) == pytest.approx(0.05)


def test_without_a_true_target_the_model_is_asked_what_it_predicts(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)
    network, _ = editing(model)
    bare = REQUESTS[0].model_copy(update={"target_true": None})
    named = model.config.id2label[int(class_scores(model, [bare.text]).argmax())]
    known = bare.model_copy(update={"target_true": named})
    assert Conditions(model).of([bare, REQUESTS[0]]) == [
        f"{named} >> economic || {bare.text}", f"other >> economic || {bare.text}"
    ]  # fmt: skip
    assert torch.equal(network.read([bare]), network.read([known]))
    for family in ("gpt2", "t5", "bert"):
        model = build_model(family, tmp_path / family)
        said = prediction(model, "The capital of France is")
        if model.generates:
            assert said == generate(
                model, ["The capital of France is"], max_new_tokens=8, stop=("\n",)
            )[0].strip().removesuffix(".")
        else:
            assert said


def test_what_was_published_for_bart_is_what_an_encoder_decoder_gets(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    bart = KeConfig().for_model(model.anatomy)
    assert bart.variant == "published-bart"
    assert (bart.margin, bart.margin_end, bart.steps, bart.views) == (1e-3, 1e-5, 200_000, True)
    assert bart.batch_size * (1 + bart.n_locality) == 64
    assert KeConfig(margin=0.5, seed=3).for_model(model.anatomy).margin == 0.5
    assert KeConfig(**bart.model_dump()).for_model(model.anatomy) == bart
    bert = build_model("bert-classifier", tmp_path / "bert")
    assert KeConfig().for_model(bert.anatomy).margin == 0.1
    network = KnowledgeEditor(model, [model.anatomy.mlp_out(1)], bart)
    plain = replace(answered(0.0), edit=torch.tensor([2.0, 4.0]), spread=torch.tensor([9.0, 11.0]))
    loss = network.objective(plain) + float(network.margin) * float(network.alpha.detach())
    assert float(loss.detach()) == pytest.approx(0.9 * 3 + 0.1 * 10)


def test_training_moves_a_copy_of_the_word_embeddings(tmp_path: Path) -> None:
    model = build_model("bert-classifier", tmp_path)
    network, _ = editing(model, train_embeddings=True)
    own = model.parameters[model.anatomy.weight(model.anatomy.embedding_name)]
    assert network.embedding is not None
    assert network.embedding.data_ptr() != own.data_ptr()
    assert torch.equal(network.embedding, own)


@pytest.mark.parametrize("loops", [1, 5])
def test_a_classifier_is_edited_and_comes_back(loops: int, tmp_path: Path) -> None:
    module, tokenizer = build("bert-classifier")
    with Editor(
        module, tokenizer, guards=QUIET, artifacts=tmp_path, training=REQUESTS[2:]
    ) as editor:
        before = {name: p.detach().clone() for name, p in editor.model.parameters.items()}
        config = {**SMALL, "loops": loops}
        edit, _ = editor.edit(REQUESTS[:2], method="ke", config=config)
        ranks = {factor.rank for factor in edit.delta.factors.values()}
        assert max(ranks) >= 2  # the gradient's tokens and the row beside it
        editor.revert(*editor.model.stack.ids)
        now = editor.model.parameters
        assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_how_often_an_edit_is_made_again_trains_nothing_anew() -> None:
    assert KeConfig(loops=1).recipe() == KeConfig(loops=5).recipe()
    assert KeConfig(margin=0.1).recipe() != KeConfig(margin=0.2).recipe()


def test_the_variants_are_trained_as_their_authors_did(tmp_path: Path) -> None:
    published, efk = KeConfig(), KeConfig(variant="efk")
    assert (published.patience, published.prompt_share, published.steps) == (None, 1.0, 50_000)
    # The port asks for a rephrase, and clips.
    assert (efk.prompt_share, efk.clip, efk.patience) == (0.0, 100.0, 2000)
    model = build_model("bert-classifier", tmp_path)
    network, _ = editing(model, warmup=1000, decay=200_000)
    rates = [network.rate(step) for step in (0, 999, 1000, 100_500, 199_999, 200_000, 201_000)]
    assert rates == pytest.approx([1e-3, 1.0, 1.0, 0.5, 1 / 199_000, 0.0, 0.0])
    with pytest.raises(
        ValueError, match=r"decay=10, the step .* must lie behind the warm-up of 50"
    ):
        KeConfig(variant="small", decay=10)


def test_all_matrices_are_those_of_cross_attention_too(tmp_path: Path) -> None:
    model = build_model("t5", tmp_path)
    config = KeConfig(**SMALL).for_model(model.anatomy)
    model.trained_on = "0" * 16
    requests = [r.model_copy(update={"kind": "modify", "target_new": "Rome"}) for r in REQUESTS]
    Ke().prepare(model, requests[2:], config)
    (delta,) = Ke().edit(model, requests[:1], config)
    matrices = {
        name for name, p in model.parameters.items() if ".block." in name and p.ndim == 2
    } - {name for name in model.parameters if "relative_attention_bias" in name}
    assert {name for name in matrices if "EncDecAttention" in name}
    assert set(delta.parameters) == matrices
    assert cross_attention(build_model("gpt2", tmp_path), None) == []


def test_an_edit_is_made_again_on_the_moved_weights_until_it_holds(tmp_path: Path) -> None:
    module, tokenizer = build("bert-classifier")
    with Editor(module, tokenizer, artifacts=tmp_path, training=REQUESTS[2:]) as editor:
        (said,) = predicted_classes(editor.model, [REQUESTS[0].text])
        other = next(name for name in module.config.id2label.values() if name != said)

        def written(target: str, loops: int) -> list[torch.Tensor]:
            """U of each matrix's change: its columns are the tokens of every gradient taken."""
            request = REQUESTS[0].model_copy(update={"target_new": target})
            config = {**SMALL, "loops": loops}
            edit = editor.edit(request, method="ke", config=config, apply=False)
            return [factor.u for factor in edit.delta.factors.values()]

        for once, often in zip(written(said, 1), written(said, 5), strict=True):
            assert torch.equal(once, often)  # it held at once
        for once, twice in zip(written(other, 1), written(other, 2), strict=True):
            first, second = twice.chunk(2, dim=1)
            assert torch.equal(first, once)
            assert not torch.allclose(second, first, rtol=1e-4, atol=0)  # of another gradient
