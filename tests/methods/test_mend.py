"""MEND: the network as the paper has it, and edits of a network that was trained on the atlas."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request
from errata.datasets import atlas
from errata.model.scoring import score_targets
from errata_mend import MendConfig
from errata_mend.network import MendNetwork, Residual, Shape
from tests.families import build_model

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
CONFIG: dict[str, Any] = {
    "variant": "small", "layers": [3, 4], "rank": 8, "steps": 16, "validate_every": 8,
    "validation": 8,
}  # fmt: skip


def test_variants_are_named_sets_of_values() -> None:
    published = MendConfig()
    assert (published.rank, published.lr, published.c_edit, published.clip) == (
        1920,
        1e-6,
        0.1,
        100,
    )
    assert not published.descent
    assert published.locality == "others"
    descent = MendConfig(variant="descent")
    assert descent.descent
    assert descent.model_copy(update={"variant": "published", "descent": False}) == published
    small = MendConfig(variant="small", rank=7)
    assert small.rank == 7
    assert small.locality == "neighbours"


def test_the_network_starts_as_the_identity_and_its_rectifier_passes_gradient_at_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = Residual(6, 3, 2, generator)
    c = torch.randn(5, 6, generator=generator)
    assert torch.equal(layer(c, 1), c)
    (gradient,) = torch.autograd.grad(layer(c, 1).sum(), layer.u)
    assert bool(gradient.any())  # U and b would stay at zero for ever otherwise


def test_an_untrained_network_ascends_by_standardised_factors_as_published(tmp_path: Path) -> None:
    from errata.kit.hypernetworks import Signals, signals_of

    model = build_model("llama", tmp_path)
    modules = [model.anatomy.mlp_out(1), model.anatomy.mlp_out(2)]
    requests = [
        Request(prompt="The capital of {} is", subject=name, target_new="Rome")
        for name in ("France", "Spain", "Italy")
    ]
    signals = signals_of(model, requests, modules)
    changes = {}
    for descent in (False, True):
        network = MendNetwork(model, modules, MendConfig(descent=descent, rank=4))
        network.begin(signals, lambda: 0.0)
        changes[descent] = network(Signals.join(signals))[modules[0]]
    x = torch.cat([s.inputs[p][0] for s in signals for p in modules])
    d = torch.cat([s.errors[p][0] for s in signals for p in modules])
    first = changes[False]
    n = signals[0].inputs[modules[0]].shape[1]
    u = (signals[0].inputs[modules[0]][0] - x.mean(0)) / (x.std(0) + 1e-7)
    v = (signals[0].errors[modules[0]][0] - d.mean(0)) / (d.std(0) + 1e-7)
    wanted = 1e-4 * v.T @ u
    torch.testing.assert_close(first.u[0, :n].T @ first.v[0, :n], wanted, rtol=1e-3, atol=1e-6)
    assert torch.equal(changes[True].u, -first.u)
    assert not bool(first.u[0, n:].any())  # padding adds nothing


def test_matrices_of_one_shape_share_a_network(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    modules = [*model.anatomy.mlp_in(0), model.anatomy.mlp_out(0)]
    network = MendNetwork(model, modules, MendConfig(rank=4))
    assert len(network.shapes) == 2  # gate and up; down
    sizes = [len(layer.s) for shape in network.shapes.values() for layer in shape.layers]
    assert sizes == [2, 2, 1, 1]
    assert all(isinstance(shape, Shape) for shape in network.shapes.values())


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    """An editor whose MEND was trained on cases about other subjects than those of `held_out`."""
    subjects = {request.subject for request in held_out()}
    training = [r for r in atlas.requests() if r.subject not in subjects][:60]
    folder = tmp_path_factory.mktemp("mend")
    with Editor("atlas-gpt2", guards=QUIET, artifacts=folder, training=training) as editor:
        yield editor


def held_out() -> list[Request]:
    found: dict[str, Request] = {}
    for request in atlas.requests():
        found.setdefault(request.subject, request)
    return list(found.values())[:5]


@pytest.mark.slow
def test_unseen_subjects_are_edited_also_in_other_words(editor: Editor) -> None:
    hits, asked = 0, 0
    for request in held_out():
        edit = editor.edit(request, method="mend", config=CONFIG)
        prompts = [request.text, *request.paraphrases]
        scores = score_targets(editor.model, prompts, [request.target] * len(prompts))
        hits += sum(score.exact for score in scores)
        asked += len(prompts)
        editor.revert(edit)
    assert hits / asked >= 0.6


@pytest.mark.slow
def test_edits_do_not_depend_on_their_order_or_on_each_other(editor: Editor) -> None:
    one, other = held_out()[:2]
    first = editor.edit([one, other], method="mend", config=CONFIG)
    second = editor.edit(one, method="mend", config=CONFIG, apply=False)  # with both active
    for name, tensor in first[0].delta.tensors().items():
        difference = (second.delta.tensors()[name] - tensor).norm()
        assert difference <= 1e-3 * tensor.norm()
    assert first[0].on_top_of is None
    editor.revert(*first)
    assert editor.verify() == []
