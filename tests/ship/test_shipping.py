"""Edits as LoRA adapters and merged checkpoints, loaded by people who do not have errata."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata import Editor
from errata.datasets import atlas
from errata.edits.delta import AdapterDelta, Delta
from errata.edits.delta.dense import DenseDelta
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.factors import compressed
from errata.edits.formats import EXPORTS, MERGES, names, writer
from errata.errors import CapabilityError, ConfigError, PluginError, StorageError, UnknownNameError
from errata.model import Model
from errata.ship.hugging_face import export_peft, merge_checkpoint
from errata.testing import edit_with
from tests.edits.test_adapter import adalora, lora
from tests.families import build_model

TOKENS = torch.tensor([[5, 9, 3, 12, 7]])
STRANGER = """
import sys, torch
sys.modules["errata"] = None  # importing it fails: nothing here may need it
import warnings; warnings.simplefilter("ignore")
from transformers import AutoModelForCausalLM
kind, base, path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path if kind == "merged" else base)
if kind == "peft":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, path)
with torch.no_grad():
    torch.save(model.eval()(input_ids=torch.tensor({tokens})).logits, out)
""".replace("{tokens}", str(TOKENS.tolist()))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def edit_of(model: Model, sequence: int, delta: Delta) -> Edit:
    return Edit(
        sequence=sequence, method="none", delta_kind=delta.kind,
        requests=({"prompt": "{} is in", "subject": "Rome", "target_new": "Spain"},), config={},
        fingerprint=model.fingerprint_of(delta.parameters), parents=(), versions={}, seconds=0.0,
    ).bind(delta)  # fmt: skip


def low_rank(model: Model, seed: int, *modules: str, rank: int = 2) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path in modules:
        d_out, d_in = model.anatomy.shape(model.module, path)
        u = torch.randn(d_out, rank, generator=generator) * 0.4
        v = torch.randn(d_in, rank, generator=generator) * 0.4
        factors[f"{path}.weight"] = Factor(u, v, model.anatomy.transposed(path))
    return LowRankDelta(factors)


def mixed(model: Model) -> list[Edit]:
    """Edits of every kind that a LoRA adapter can hold, on overlapping modules."""
    first, second = model.anatomy.mlp_out(0), model.anatomy.mlp_out(1)
    name = f"{second}.weight"
    generator = torch.Generator().manual_seed(9)
    dense = torch.randn(model.parameter(name).shape, generator=generator) * 0.1
    deltas: list[Delta] = [
        low_rank(model, 1, first, second),
        DenseDelta({name: dense}),
        low_rank(model, 2, second, rank=3),
        lora(model, 4),
        adalora(model, 5),
    ]
    return [edit_of(model, i + 1, delta) for i, delta in enumerate(deltas)]


@torch.no_grad()
def logits(model: Model) -> torch.Tensor:
    return model.module(input_ids=TOKENS).logits


def strangers_logits(kind: str, base: Path, path: Path, scratch: Path) -> torch.Tensor:
    out = scratch / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, kind, str(base), str(path), str(out)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: torch.Tensor = torch.load(out)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_whole_stack_leaves_as_one_lora_adapter(family: str, cache: Path, tmp_path: Path) -> None:
    model = build_model(family, cache)
    base_logits = logits(model)
    model.module.save_pretrained(tmp_path / "base")
    edits = mixed(model)
    model.stack.set([edit_with(e.sequence, e.id, e.delta) for e in edits])
    wanted = logits(model)
    assert (wanted - base_logits).abs().max() > 0.1
    export_peft(model, edits, tmp_path / "adapter")
    merge_checkpoint(model, tmp_path / "merged", overwrite=False)
    assert torch.equal(logits(model), wanted)  # exporting changed nothing
    for kind, path in (("peft", "adapter"), ("merged", "merged")):
        got = strangers_logits(kind, tmp_path / "base", tmp_path / path, tmp_path)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_some_edits_leave_without_the_others(cache: Path, tmp_path: Path) -> None:
    model = build_model("llama", cache)
    edits = mixed(model)
    model.stack.set([edit_with(e.sequence, e.id, e.delta) for e in edits])
    some = [edits[2], edits[0]]  # in any order, and whatever else is on the model
    export_peft(model, some, tmp_path / "adapter")
    again = build_model("llama", cache)
    again.stack.set([edit_with(e.sequence, e.id, e.delta) for e in some])
    wanted = logits(again)
    again.stack.set(
        [edit_with(1, "a" * 12, AdapterDelta.from_directory(tmp_path / "adapter", again))]
    )
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-5)


def test_a_single_adapter_leaves_as_it_is(cache: Path, tmp_path: Path) -> None:
    model = build_model("llama", cache)
    delta = adalora(model, 3)
    export_peft(model, [edit_of(model, 1, delta)], tmp_path / "adapter")
    stored = AdapterDelta.from_directory(tmp_path / "adapter", model)
    assert stored.config["peft_type"] == "ADALORA"
    wanted = delta.tensors()
    assert all(torch.equal(tensor, wanted[n]) for n, tensor in stored.tensors().items())


def test_a_full_disk_names_the_folder_that_was_asked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model("llama", cache)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError) as caught:
        export_peft(model, [edit_of(model, 1, lora(model, 3))], tmp_path / "adapter")
    assert "No space left" in str(caught.value)
    assert f"{tmp_path / 'adapter'}" in str(caught.value)
    assert f"{Path('new')}/" not in str(caught.value)
    assert not list(tmp_path.glob("*adapter*"))


def test_the_rank_is_compressed_to_the_error_that_was_asked_for(
    cache: Path, tmp_path: Path
) -> None:
    model = build_model("gpt2", cache)
    edits = mixed(model)
    whole = merged_difference(model, edits)
    ranks = {}
    for error in (0.3, 0.05, 0.0):
        path = export_peft(model, edits, tmp_path / str(error), error=error)
        found = AdapterDelta.from_directory(path, model)
        ranks[error] = sum(found.ranks.values())
        for name, difference in found.differences(model).items():
            lost = (difference.double() - whole[name]).norm() / whole[name].norm()
            assert lost <= error + 1e-5
    assert ranks[0.3] < ranks[0.05] < ranks[0.0]
    path = export_peft(model, edits, tmp_path / "rank", rank=1)
    assert set(AdapterDelta.from_directory(path, model).ranks.values()) == {1}


def merged_difference(model: Model, edits: list[Edit]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for edit in edits:
        delta = edit.delta
        for name in delta.parameters:
            zero = torch.zeros(model.parameter(name).shape, dtype=torch.float64)
            if isinstance(delta, AdapterDelta):
                zero += delta.differences(model)[name]
            else:
                type(delta).fold(name, zero, [delta])
            total[name] = total.get(name, torch.zeros_like(zero)) + zero
    return total


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 12), columns=st.integers(1, 12), rank=st.integers(1, 20),
    true_rank=st.integers(1, 12), error=st.floats(0, 0.9), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_compressing_keeps_the_error_it_promises(
    rows: int, columns: int, rank: int, true_rank: int, error: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    inner = torch.randn(rank, true_rank, generator=generator)
    u = torch.randn(rows, true_rank, generator=generator) @ inner.T
    v = torch.randn(columns, rank, generator=generator)
    new_u, new_v, lost = compressed(u, v, error=error)
    exact = u.double() @ v.double().T
    measured = (new_u.double() @ new_v.double().T - exact).norm() / exact.norm()
    assert float(measured) == pytest.approx(lost, abs=1e-5)
    assert lost <= max(error, 1e-5)
    assert new_u.shape[1] <= min(rows, columns, true_rank, rank)
    if new_u.shape[1] > 1:  # one direction fewer would have lost too much
        _, _, more = compressed(u, v, rank=new_u.shape[1] - 1)
        assert more > error


def test_what_cannot_be_a_lora_adapter_is_said(cache: Path, tmp_path: Path) -> None:
    model = build_model("gpt2", cache)
    name = "transformer.wte.weight"
    embedding = DenseDelta({name: torch.ones_like(model.parameter(name))})
    with pytest.raises(CapabilityError, match=r"wte.*not the weight of a linear module"):
        export_peft(model, [edit_of(model, 1, embedding)], tmp_path / "a")
    good = edit_of(model, 1, low_rank(model, 1, model.anatomy.mlp_out(0)))
    with pytest.raises(ConfigError, match="rank is 0"):
        export_peft(model, [good], tmp_path / "b", rank=0)
    with pytest.raises(ConfigError, match="error is 1"):
        export_peft(model, [good], tmp_path / "c", error=1.0)
    assert not any((tmp_path / n).exists() for n in "abc")
    (tmp_path / "d").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        export_peft(model, [good], tmp_path / "d")


def test_a_strangers_format_comes_in_as_ours_do(toys: None, tmp_path: Path) -> None:
    assert {"errata", "gguf", "peft", "toy_list"} <= set(names(EXPORTS))
    write = writer(EXPORTS, "toy_list", {"mark": "*"})
    model = build_model("gpt2", tmp_path)
    edit = edit_of(model, 1, low_rank(model, 1, model.anatomy.mlp_out(0)))
    path = write(model, [edit], tmp_path / "list", mark="*")
    assert path.read_text() == "* Rome is in"
    with pytest.raises(UnknownNameError, match="option of format 'toy_list' 'makr'"):
        writer(EXPORTS, "toy_list", {"makr": "*"})
    with pytest.raises(PluginError, match=r"toy_broken.*errata_toys\.formats:missing"):
        writer(EXPORTS, "toy_broken", {})
    with pytest.raises(UnknownNameError, match="merge format 'peft'"):
        writer(MERGES, "peft", {})


@pytest.mark.slow
def test_an_editor_exports_what_is_on_the_model(tmp_path: Path) -> None:
    requests = atlas.requests(3)
    with Editor("atlas-gpt2", artifacts=tmp_path) as editor:
        editor.edit(requests[:2], method="rome")
        path = editor.export(tmp_path / "adapter", format="peft")
        with pytest.raises(UnknownNameError, match="export format 'pfet'"):
            editor.export(tmp_path / "x", format="pfet")
        with pytest.raises(UnknownNameError, match="'rnak'"):
            editor.export(tmp_path / "x", format="peft", rnak=3)
        with pytest.raises(UnknownNameError, match="'rank'"):
            editor.export(tmp_path / "x", rank=3)
        memory = editor.edit(requests[2], method="grace")
        with pytest.raises(CapabilityError, match="acts while the model runs"):
            editor.export(tmp_path / "x", format="peft")
        editor.revert(memory)
        wanted = logits(editor.model)
        from errata import zoo

        base = zoo.model_path("atlas-gpt2")
        got = strangers_logits("peft", base, path, tmp_path)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
