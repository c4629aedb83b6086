"""Knowledge neurons as an editor: which slots change, by how much, on models of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from errata.contract.purity import Snapshot
from errata.edits.delta import SparseRowsDelta
from errata.edits.request import Request
from errata.errors import ConfigError
from errata.locate import LOCATORS, knowledge_neurons
from errata.model import Model
from errata.model.scoring import score_targets
from errata.testing import edit_with
from errata_kn import Kn, KnConfig
from errata_kn.algorithm import NoNeurons
from tests.families import build_model

PLUGIN = Kn()
REQUEST = Request(
    prompt="The mother tongue of {} is", subject="Miles Davis", target_new="Rome",
    target_true="France", paraphrases=("Miles Davis speaks",),
)  # fmt: skip


def test_its_search_has_the_defaults_and_limits_of_the_core_locator() -> None:
    own, core = KnConfig.model_fields, LOCATORS["neurons"].config.model_fields
    for name in own.keys() & core.keys():
        assert own[name].default == core[name].default
        assert own[name].metadata == core[name].metadata
        assert own[name].annotation == core[name].annotation


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def edit(model: Model, request: Request = REQUEST, **options: Any) -> SparseRowsDelta:
    before = Snapshot(model)
    (delta,) = PLUGIN.edit(model, [request], KnConfig(**{"steps": 3, **options}))
    assert before.changed() == []
    return delta


def slots(model: Model, name: str) -> torch.Tensor:
    """Return a down projection as (neurons, d), however it is stored."""
    weight = model.parameters[name].detach()
    return weight if model.anatomy.transposed(name.removesuffix(".weight")) else weight.T


def embedding(model: Model, answer: str) -> torch.Tensor:
    token = score_targets(model, [REQUEST.text], [answer])[0].token_ids[0]
    table = model.module.get_output_embeddings().weight
    return table[token].detach().float()


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert", "t5"])
def test_an_update_adds_the_papers_vector_to_the_slots_of_the_neurons(
    family: str, cache: Path
) -> None:
    model = build_model(family, cache)
    found = knowledge_neurons(model, REQUEST, steps=3)
    chosen = {(n.layer, n.index) for n in found.neurons}
    delta = edit(model, erase_factor=1.0, write_factor=8.0)
    names = {
        model.anatomy.weight(model.anatomy.mlp_out(layer)): layer
        for layer in range(model.anatomy.n_layers)
    }
    before = {name: slots(model, name).clone() for name in delta.parameters}
    model.stack.set([edit_with(0, "one", delta)])
    wanted = 8 * embedding(model, "Rome") - embedding(model, "France")
    changed = set()
    for name, old in before.items():
        difference = slots(model, name) - old
        for index in difference.abs().sum(dim=1).nonzero().flatten().tolist():
            changed.add((names[name], index))
            torch.testing.assert_close(difference[index], wanted, atol=1e-5, rtol=1e-4)
    assert changed == chosen
    model.stack.set([])
    for name, old in before.items():
        assert torch.equal(slots(model, name), old)


def test_more_of_the_new_answer_makes_it_more_probable(cache: Path) -> None:
    model = build_model("gpt2", cache)

    def probability(delta: SparseRowsDelta | None) -> float:
        model.stack.set([] if delta is None else [edit_with(0, "one", delta)])
        value = score_targets(model, [REQUEST.text], ["Rome"])[0].logprobs[0]
        model.stack.set([])
        return value

    plain = probability(None)
    some = probability(edit(model, write_factor=2.0))
    more = probability(edit(model, write_factor=8.0))
    assert plain < some < more


def test_the_plugin_locates(cache: Path) -> None:
    model = build_model("llama", cache)
    found = PLUGIN.locate(model, REQUEST, KnConfig(steps=3))
    neurons = found.evidence["neurons"]
    assert found.module == model.anatomy.mlp_out(found.layer)
    best = max(sum(n["score"] for n in neurons if n["layer"] == layer)
               for layer in range(model.anatomy.n_layers))  # fmt: skip
    assert found.score == pytest.approx(best)
    assert "integrated gradients" in found.protocol


def test_layers_can_be_limited_and_a_fact_without_neurons_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("gpt2", cache)
    delta = edit(model, layers=(1,))
    assert delta.parameters == (model.anatomy.weight(model.anatomy.mlp_out(1)),)
    with pytest.raises(ConfigError, match="out of range"):
        edit(model, layers=(7,))
    # A layer that writes nothing is attributed nothing.
    weight = model.parameters[model.anatomy.weight(model.anatomy.mlp_out(1))]
    kept = weight.detach().clone()
    weight.data.zero_()
    try:
        with pytest.raises(NoNeurons, match="no slot to edit"):
            PLUGIN.edit(model, [REQUEST], KnConfig(steps=2, layers=(1,)))
    finally:
        weight.data.copy_(kept)


def test_the_subjects_token_of_an_encoder_decoder_is_refused(cache: Path) -> None:
    model = build_model("t5", cache)
    with pytest.raises(ConfigError, match="not for an encoder-decoder"):
        edit(model, token="subject_last")
    with pytest.raises(ConfigError, match="not for an encoder-decoder"):
        PLUGIN.locate(model, REQUEST, KnConfig(steps=2, token="subject_last"))
    assert edit(build_model("gpt2", cache), token="subject_last").parameters


def test_bad_hyper_parameters_are_named() -> None:
    with pytest.raises(ValueError, match="at_least 6 is above at_most 5"):
        KnConfig(at_least=6)
