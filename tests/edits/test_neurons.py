"""The delta kind `neurons`: what it adds, in every family, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN

from errata.edits.delta import NeuronsDelta
from errata.edits.delta.neurons import Neurons, Site
from errata.errors import IntegrityError
from errata.kit.feed_forward import is_gated, site_of
from errata.model import Model
from errata.model.forward import trace
from errata.model.running import prepare, run
from errata.model.structure import Structure
from errata.testing import edit_with
from tests.families import DECODERS, build_model, sampled

PROMPTS = ["The capital of France is", "Miles Davis plays the"]


def neurons_for(model: Model, site: Site, n: int, seed: int = 0) -> NeuronsDelta:
    generator = torch.Generator().manual_seed(seed)
    d_in = model.anatomy.shape(model.module, site.reads)[1]
    d_out = model.anatomy.shape(model.module, site.writes)[0]

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates = drawn(n, d_in) if site.gated else None
    return NeuronsDelta(site, Neurons(drawn(n, d_in), drawn(n), drawn(n, d_out), gates))


@pytest.mark.parametrize("family", sampled(DECODERS))
def test_two_edits_add_what_the_formula_says(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path)
    layer = model.anatomy.layers_with("mlp")[-1]
    site = site_of(model, layer, gated=is_gated(model, layer))
    deltas = [neurons_for(model, site, 2, seed=1), neurons_for(model, site, 3, seed=2)]
    batch, built = prepare(model, PROMPTS), Structure(model.module)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        with (
            torch.no_grad(),
            trace(model.module, [site.reads, site.writes], inputs=True) as seen,
        ):
            run(model, batch)
        h, out = seen[site.reads].input, seen[site.writes].output
        assert h is not None
        assert out is not None
        return h, out

    h, before = outputs()
    model.stack.set([edit_with(n, f"{n:012x}", delta) for n, delta in enumerate(deltas)])
    _, after = outputs()
    expected, act = before.clone(), ACT2FN[site.activation]
    for delta in deltas:
        delta.check(model)
        part = delta.neurons
        for j in range(len(part)):
            fired = act(h @ part.keys[j] + part.biases[j])
            if part.gates is not None:
                fired = fired * (h @ part.gates[j])
            expected = expected + fired[..., None] * part.values[j]
    assert torch.allclose(after, expected, rtol=1e-4, atol=1e-4)
    model.stack.set([])
    assert torch.equal(outputs()[1], before)
    assert built.changed() == []


def test_what_is_no_set_of_neurons_is_refused(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    site = site_of(model, 1)
    good = neurons_for(model, site, 2)
    tensors, metadata = good.tensors(), good.metadata()
    wrong: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({**tensors, "keys": torch.zeros(2)}, metadata),
        ({**tensors, "biases": torch.zeros(3)}, metadata),
        ({**tensors, "values": torch.zeros(2, 3, dtype=torch.int64)}, metadata),
        ({**tensors, "gates": tensors["keys"]}, metadata),
        ({**tensors, "more": tensors["keys"]}, metadata),
        (tensors, {**metadata, "activation": "os.system"}),
        (tensors, {**metadata, "gated": 1}),
        (tensors, {"reads": site.reads}),
    ]
    for bad_tensors, bad_metadata in wrong:
        with pytest.raises(IntegrityError):
            NeuronsDelta.from_parts(bad_tensors, bad_metadata)
    narrow = Neurons(torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 3))
    with pytest.raises(IntegrityError, match="do not fit"):
        NeuronsDelta(site, narrow).check(model)
    with pytest.raises(IntegrityError, match="does not have"):
        NeuronsDelta(site._replace(reads="nowhere"), good.neurons).check(model)


def test_neurons_of_half_precision_models_compute_in_fp32(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, torch.bfloat16)
    site = site_of(model, 1)
    model.stack.set([edit_with(0, "0" * 12, neurons_for(model, site, 2))])
    with torch.no_grad(), trace(model.module, site.writes) as seen:
        run(model, prepare(model, PROMPTS))
    output = seen[site.writes].output
    assert output is not None
    assert output.dtype == torch.bfloat16
