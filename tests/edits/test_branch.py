"""Weight edits beside the weights: same model, untouched weights, other edits for other rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor
from errata.datasets import atlas
from errata.edits.delta.dense import DenseDelta
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.errors import CapabilityError, ConfigError, UnknownNameError
from errata.model import Model
from errata.testing import edit_with
from tests.families import build_model, take_off

TOKENS = torch.tensor([[5, 9, 3, 12, 7], [8, 2, 14, 6, 4], [11, 3, 9, 1, 2]])
FAMILIES = ["gpt2", "llama", "gptj", "opt"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def edits(model: Model) -> list[Edit]:
    """Two low-rank edits of different layers, one of both, and a dense one."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for number, layers in enumerate([(0,), (1,), (0, 1)]):
        factors = {}
        for layer in layers:
            path = model.anatomy.mlp_out(layer)
            d_out, d_in = model.anatomy.shape(model.module, path)
            u = torch.randn(d_out, 2, generator=generator) * 0.5
            v = torch.randn(d_in, 2, generator=generator) * 0.5
            factors[f"{path}.weight"] = Factor(u, v, model.anatomy.transposed(path))
        found.append(edit_with(number + 1, f"{number + 1:012x}", LowRankDelta(factors)))
    name = f"{model.anatomy.mlp_out(1)}.weight"
    dense = torch.randn(model.parameter(name).shape, generator=generator) * 0.1
    found.append(edit_with(4, f"{4:012x}", DenseDelta({name: dense})))
    return found


def beside(family: str, cache: Path) -> Model:
    model = build_model(family, cache)
    model.branch = True
    return model


@torch.no_grad()
def logits(model: Model, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return model.module(input_ids=tokens).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_branch_computes_what_the_merged_model_computes(family: str, cache: Path) -> None:
    merged, model = build_model(family, cache), beside(family, cache)
    base = logits(model)
    entries = edits(model)
    merged.stack.set(entries)
    model.stack.set(entries)
    torch.testing.assert_close(logits(model), logits(merged), rtol=1e-4, atol=1e-4)
    assert (logits(model) - base).abs().max() > 0.1
    assert model.stack.differing() == []
    for name, live in model.parameters.items():
        assert torch.equal(live, model.pristine[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_edits_off_a_branch_leaves_no_trace(family: str, cache: Path) -> None:
    model = beside(family, cache)
    base, entries = logits(model), edits(model)
    model.stack.set([entries[1], entries[3]])
    wanted = logits(model)
    model.stack.set(entries)
    for entry in (entries[0], entries[2]):
        take_off(model.stack, entry.id)
    assert torch.equal(logits(model), wanted)
    model.stack.set([])
    assert torch.equal(logits(model), base)
    assert not any(m._forward_hooks for m in model.module.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_takes_its_own_edits(family: str, cache: Path) -> None:
    model = beside(family, cache)
    entries = edits(model)
    one, two, both, _ = (entry.id for entry in entries)
    rows = [{one, both}, set(), {two}]
    model.stack.set(entries)
    with model.rows(rows):
        mixed = logits(model)
    for index, ids in enumerate(rows):
        model.stack.set([entry for entry in entries if entry.id in ids])
        alone = logits(model, TOKENS[index : index + 1])
        torch.testing.assert_close(mixed[index : index + 1], alone, rtol=1e-4, atol=1e-4)


def test_rows_say_what_they_cannot_do(cache: Path) -> None:
    model = beside("gpt2", cache)
    entries = edits(model)
    model.stack.set(entries)
    one = entries[0].id
    with pytest.raises(UnknownNameError, match="active edit"), model.rows([{"nobody"}]):
        pass
    with model.rows([{one}, set()]), pytest.raises(ConfigError, match="2 rows, but a batch has 3"):
        logits(model)
    assert model.row_edits is None
    merged = build_model("gpt2", cache)
    merged.stack.set(entries)
    with pytest.raises(CapabilityError, match="branch=True"), merged.rows([{one}]):
        pass


def test_a_change_of_an_embedding_has_no_branch(cache: Path) -> None:
    model = beside("gpt2", cache)
    name = "transformer.wte.weight"
    entry = edit_with(1, "1" * 12, DenseDelta({name: torch.ones_like(model.parameter(name))}))
    with pytest.raises(CapabilityError, match="not the weight of a linear module"):
        model.stack.set([entry])
    assert model.stack.ids == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_branch_rounds_once(dtype: torch.dtype, cache: Path) -> None:
    model = build_model("llama", cache, dtype=dtype)
    model.branch = True
    entries = edits(model)[:1]
    (name,) = entries[0].delta.parameters
    module = model.module.get_submodule(name.removesuffix(".weight"))
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        base = module(x)
        model.stack.set(entries)
        factor = entries[0].delta.factors[name]
        exact = base.double() + x.double() @ factor.v.double() @ factor.u.double().T
        worst = (module(x).double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert worst.max() <= torch.finfo(dtype).eps


def test_an_editor_edits_and_reverts_beside_the_weights(tmp_path: Path) -> None:
    fact = atlas.requests(1)[0]
    with Editor("atlas-gpt2", ledger=tmp_path / "l", branch=True) as editor:
        before = editor.generate(fact.text)
        edit = editor.edit(fact, method="rome")
        after = editor.generate(fact.text)
        assert fact.target_new in after
        live = editor.model.parameters
        assert all(torch.equal(t, editor.model.pristine[n]) for n, t in live.items())
        with editor.only():
            assert editor.generate(fact.text) == before
        editor.merge(tmp_path / "merged")
        editor.revert(edit)
        assert editor.generate(fact.text) == before
        editor.apply(edit)
    with Editor("atlas-gpt2", ledger=tmp_path / "l", branch=True) as editor:
        assert editor.generate(fact.text) == after
    with Editor(tmp_path / "merged") as plain:
        assert fact.target_new in plain.generate(fact.text)


def quantised(bits: int) -> tuple[Any, Any]:
    """The embedded model, quantised by bitsandbytes."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from errata import zoo

    folder = zoo.model_path("atlas-gpt2")
    settings: dict[str, Any] = {f"load_in_{bits}bit": True}
    module = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**settings)
    )
    return module, AutoTokenizer.from_pretrained(folder)


# bitsandbytes warns of casts on the CPU
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_model_is_edited_beside_its_weights(tmp_path: Path) -> None:
    fact = atlas.requests(1)[0]
    with Editor(*quantised(8), artifacts=tmp_path) as editor:
        assert editor.model.branch  # by itself: nothing can be folded into packed weights
        before = editor.generate(fact.text)
        edit = editor.edit(fact, method="rome")
        assert fact.target_new in editor.generate(fact.text)
        editor.revert(edit)
        assert editor.generate(fact.text) == before
        assert editor.verify() == []
        editor.model.branch = False
        with pytest.raises(CapabilityError, match="branch=True"):
            editor.apply(edit)
        assert editor.model.stack.ids == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_have_the_shape_of_what_they_stand_for(bits: int, tmp_path: Path) -> None:
    # On a CPU bitsandbytes has no gradients in 4 bits, so the edit is made by hand.
    with Editor(*quantised(bits), artifacts=tmp_path) as editor:
        model = editor.model
        entry = edits(model)[2]
        entry.delta.check(model)
        (name, factor), *_ = entry.delta.factors.items()
        module = model.module.get_submodule(name.removesuffix(".weight"))
        x = torch.randn(3, factor.v.shape[0], generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            before = module(x)
            model.stack.set([entry])
            added = module(x) - before
        torch.testing.assert_close(added, x @ factor.v @ factor.u.T, rtol=1e-2, atol=2e-2)
        plain = build_plain_norm(name)
        assert model.weight_norm(name) == pytest.approx(plain, rel=0.15 if bits == 4 else 0.02)
        model.stack.set([])


def build_plain_norm(name: str) -> float:
    from safetensors.torch import load_file

    from errata import zoo

    weights = load_file(zoo.model_path("atlas-gpt2") / "model.safetensors")
    return float(weights[name].norm())


def test_the_norm_of_a_large_weight_does_not_overflow(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    name = model.anatomy.weight(model.anatomy.mlp_out(0))
    with torch.no_grad():
        model.module.get_parameter(name).fill_(1e30)
    large = Model(model.module, model.tokenizer, model.anatomy)
    wanted = 1e30 * math.sqrt(large.parameters[name].numel())
    assert large.weight_norm(name) == pytest.approx(wanted)
