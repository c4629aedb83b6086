"""Adapters in PEFT: swapped in place, taken off exactly; what servers of one adapter read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from errata.edits.factors import changes
from errata.ship.hugging_face import export_peft
from errata.testing import edit_with
from tests.families import build_model
from tests.ship.test_shipping import edit_of, logits, low_rank

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def test_adapters_are_swapped_in_place_there_and_back(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    modules = [model.anatomy.mlp_out(0), model.anatomy.mlp_out(1)]
    wanted = {}
    for name, seed in (("first", 1), ("second", 2)):
        edit = edit_of(model, 1, low_rank(model, seed, *modules))
        export_peft(model, [edit], tmp_path / name)
        model.stack.set([edit_with(1, edit.id, edit.delta)])
        wanted[name] = logits(model)
        model.stack.set([])
    before = {name: p.clone() for name, p in model.module.named_parameters()}
    served = PeftModel.from_pretrained(model.module, tmp_path / "first").eval()
    for name in ("second", "first"):
        hotswap_adapter(served, str(tmp_path / name), adapter_name="default")
        torch.testing.assert_close(logits(model), wanted[name], rtol=1e-5, atol=1e-5)
    bare = served.unload()
    assert all(torch.equal(p, before[name]) for name, p in bare.named_parameters())


def test_pefts_unmerging_leaves_a_remainder_and_reverting_none(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    edit = edit_of(model, 1, low_rank(model, 1, model.anatomy.mlp_out(0)))
    export_peft(model, [edit], tmp_path / "adapter")
    name = f"{model.anatomy.mlp_out(0)}.weight"
    base = model.parameter(name).detach().clone()
    model.stack.set([edit_with(1, edit.id, edit.delta)])
    assert not torch.equal(model.parameter(name), base)
    model.stack.set([])
    assert torch.equal(model.parameter(name), base)
    served = PeftModel.from_pretrained(model.module, tmp_path / "adapter")
    served.merge_adapter()
    served.unmerge_adapter()
    assert not torch.equal(model.parameter(name), base)  # why errata never subtracts


def test_many_edits_fit_the_rank_that_a_server_takes(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    first, second = model.anatomy.mlp_out(0), model.anatomy.mlp_out(1)
    edits = [edit_of(model, n, low_rank(model, n, first, rank=1)) for n in range(1, 11)]
    edits.append(edit_of(model, 11, low_rank(model, 11, second, rank=2)))
    notes: list[str] = []
    model.progress = type(model.progress).of(notes.append)
    export_peft(model, edits, tmp_path / "adapter", rank=6)
    lost = max(change.error for change in changes(model, edits, rank=6))
    assert 0.05 < lost < 1
    assert f"rank 6 at most, and the change of a weight differs by at most {lost:.2g}" in notes[-1]
    # What vLLM reads: it holds r against its limit, scales by alpha / r, and takes no more.
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {key: t.shape[0] for key, t in tensors.items() if ".lora_A." in key}
    assert config["peft_type"] == "LORA"
    assert config["r"] == config["lora_alpha"] == max(ranks.values()) == 6
    assert config["rank_pattern"] == config["alpha_pattern"] == {second: 2}
    assert config["bias"] == "none"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("use_rslora")
    for key, tensor in tensors.items():
        other = key.replace("lora_A", "lora_B") if ".lora_A." in key else ""
        assert tensor.ndim == 2
        assert not other or tensors[other].shape[1] == tensor.shape[0]
