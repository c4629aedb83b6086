from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from errata.common.storage import from_bytes, to_bytes
from errata.contract.purity import Snapshot
from errata.edits.delta import AdapterDelta, Factor, LowRankDelta
from errata.edits.stack import Stack
from errata.errors import IntegrityError
from errata.model import Model
from errata.testing import edit_with
from tests.families import put_on, take_off

FAMILIES = ("gpt2", "llama")
IDS = tuple(f"{i:012x}" for i in range(1, 9))
TOKENS = torch.tensor([[5, 9, 2, 17, 30, 4], [8, 8, 1, 22, 3, 11]])


def model_of(family: str, dtype: torch.dtype = torch.float32) -> Model:
    torch.manual_seed(0)
    if family == "gpt2":
        module: Any = GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=40, n_positions=32,
                       bos_token_id=0, eos_token_id=0, pad_token_id=0)
        )  # fmt: skip
    else:
        module = LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=48, vocab_size=40,
                        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
                        bos_token_id=0, eos_token_id=0, pad_token_id=0)
        )  # fmt: skip
    return Stack.on(Model(module.to(dtype), SimpleNamespace(), None))  # type: ignore[arg-type]


def targets(model: Model) -> list[str]:
    """Return attention's and the MLP's modules: square, wide and tall, Conv1D or Linear."""
    parts = (
        ("transformer.h", ("attn.c_attn", "mlp.c_proj"))
        if isinstance(model.module, GPT2LMHeadModel)
        else ("model.layers", ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
    )
    return [f"{parts[0]}.{layer}.{name}" for layer in range(2) for name in parts[1]]


def shape(model: Model, name: str) -> tuple[int, int]:
    weight = model.parameters[f"{name}.weight"]
    out, into = weight.shape[::-1] if "c_" in name else weight.shape
    return out, into


def adalora(model: Model, seed: int, names: list[str] | None = None) -> AdapterDelta:
    """Return an AdaLoRA adapter with uneven ranks; one module is left with none."""
    generator = torch.Generator().manual_seed(seed)
    tensors, pattern = {}, {}
    for index, name in enumerate(names or targets(model)):
        out, into = shape(model, name)
        mask = [bool((seed + index + bit) % 3) for bit in range(4)] if index else [False] * 4
        rank = sum(mask)
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A"] = torch.randn(rank, into, generator=generator) / 4
        tensors[f"{key}.lora_B"] = torch.randn(out, rank, generator=generator) / 4
        tensors[f"{key}.lora_E"] = torch.randn(rank, 1, generator=generator) / 4
        pattern[f"{name}.lora_E"] = mask
    config = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "lora_alpha": 16,
              "lora_dropout": 0.1, "total_step": 9, "task_type": "CAUSAL_LM",
              "rank_pattern": pattern, "fan_in_fan_out": "c_" in next(iter(pattern))}  # fmt: skip
    return AdapterDelta(config, tensors)


def lora(model: Model, seed: int, **settings: Any) -> AdapterDelta:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for index, name in enumerate(targets(model)):
        out, into = shape(model, name)
        key, rank = f"base_model.model.{name}", 2 + index % 2
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / 8
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 8
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM",
              "fan_in_fan_out": "c_" in key, **settings}  # fmt: skip
    return AdapterDelta(config, tensors)


def low_rank(model: Model, seed: int) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    name = targets(model)[-1]
    out, into = shape(model, name)
    u, v = torch.randn(out, 1, generator=generator), torch.randn(into, 1, generator=generator)
    return LowRankDelta({f"{name}.weight": Factor(u / 8, v / 8, "c_" in name)})


def stacked(model: Model, deltas: list[Any], keep: tuple[int, ...] | None = None) -> Model:
    chosen = range(len(deltas)) if keep is None else keep
    model.stack.set([edit_with(i + 1, IDS[i], deltas[i]) for i in chosen])
    return model


@torch.no_grad()
def logits(module: Any) -> torch.Tensor:
    return module(input_ids=TOKENS).logits


def plain_peft(family: str, *folders: Path) -> Any:
    """Load adapters as someone without errata does."""
    module = model_of(family).module
    with warnings.catch_warnings():
        # PEFT warns about AdaLoRA's own rank pattern and asks Transformers for an old attribute.
        warnings.simplefilter("ignore")
        peft_model = PeftModel.from_pretrained(module, folders[0], adapter_name="a0")
        for index, folder in enumerate(folders[1:], 1):
            peft_model.load_adapter(folder, adapter_name=f"a{index}")
        peft_model.base_model.set_adapter([f"a{i}" for i in range(len(folders))], True)
    return peft_model.eval()


# -- effect ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_active_adapters_add_up_to_the_sum_of_their_matrices(family: str) -> None:
    model = model_of(family)
    deltas = [adalora(model, 1), lora(model, 2), adalora(model, 3), lora(model, 4)]
    base = logits(model.module)
    attached = logits(stacked(model, deltas).module)
    merged = model_of(family)
    with torch.no_grad():
        for delta in deltas:
            for name, difference in delta.differences(merged).items():
                merged.parameters[name].add_(difference)
    assert (attached - base).abs().max() > 1e-2
    torch.testing.assert_close(attached, logits(merged.module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("make", [adalora, lora])
def test_plain_peft_loads_a_written_directory_and_computes_the_same(
    family: str, make: Any, tmp_path: Path
) -> None:
    model = model_of(family)
    deltas = [make(model, 1), make(model, 2)]
    for index, delta in enumerate(deltas):
        delta.write_directory(tmp_path / str(index))
    one = logits(stacked(model, deltas[:1]).module)
    two = logits(stacked(model, deltas).module)
    assert torch.equal(logits(plain_peft(family, tmp_path / "0")), one)
    both = logits(plain_peft(family, tmp_path / "0", tmp_path / "1"))
    torch.testing.assert_close(both, two, rtol=0, atol=1e-5)
    assert (two - one).abs().max() > 1e-3


def test_a_lora_trained_elsewhere_with_patterns_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        alpha_pattern={"^model.layers.0.mlp.down_proj": 7},
    )  # fmt: skip
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trained = get_peft_model(model_of("llama").module, config)
    with torch.no_grad():
        for name, tensor in trained.named_parameters():
            if "lora_B" in name:
                tensor.normal_(std=0.2)
    trained.eval().save_pretrained(tmp_path)
    model = model_of("llama")
    delta = AdapterDelta.from_directory(tmp_path, model)
    assert delta.ranks["model.layers.1.self_attn.q_proj"] == 3
    assert torch.equal(logits(stacked(model, [delta]).module), logits(trained))
    delta.write_directory(tmp_path / "again")
    assert torch.equal(logits(plain_peft("llama", tmp_path / "again")), logits(trained))


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_and_without_a_cache_agrees(family: str) -> None:
    model = model_of(family)
    stacked(model, [adalora(model, 1), lora(model, 2)])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(TOKENS)
    cached = model.module.generate(TOKENS, attention_mask=mask, use_cache=True, **options)
    plain = model.module.generate(TOKENS, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)


# -- coming off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_taking_adapters_off_leaves_the_module_as_it_was(family: str) -> None:
    model = model_of(family)
    first = next(iter(model.parameters.values()))
    first.requires_grad_(False)  # flags that are not all alike must come back as they were
    before = Snapshot(model)
    attributes = {name: set(vars(module)) for name, module in model.module.named_modules()}
    state, objects = model.module.state_dict(), dict(model.module.named_parameters())
    base, generator = logits(model.module), torch.random.get_rng_state()
    stacked(model, [adalora(model, 1), lora(model, 2), adalora(model, 3)])
    assert before.changed() != []
    assert [p.requires_grad for p in model.parameters.values()].count(False) == 1
    extra = set(model.module.parameters()) - set(model.parameters.values())
    assert extra
    assert not any(parameter.requires_grad for parameter in extra)
    assert not any(module.training for module in model.module.modules())
    stacked(model, [])
    assert before.changed() == []
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert list(model.module.state_dict()) == list(state)
    assert dict(model.module.named_parameters()) == objects
    for name, module in model.module.named_modules():
        assert set(vars(module)) == attributes[name]
    assert torch.equal(logits(model.module), base)


ORDERS = [*itertools.permutations(range(4))]


@pytest.mark.parametrize("orders", [ORDERS[5::8], pytest.param(ORDERS, marks=pytest.mark.slow)])
def test_adapters_removed_in_any_order_leave_what_a_fresh_model_has(
    orders: list[tuple[int, ...]],
) -> None:
    model = model_of("gpt2")
    deltas = [adalora(model, 1), low_rank(model, 2), lora(model, 3), adalora(model, 4)]
    met = {tuple(sorted(order[n:])) for order in orders for n in range(5)}
    expected = {keep: logits(stacked(model_of("gpt2"), deltas, keep).module) for keep in met}
    for order in orders:
        stacked(model, deltas)
        left = [0, 1, 2, 3]
        for index in order:
            left.remove(index)
            take_off(model.stack, IDS[index])
            assert torch.equal(logits(model.module), expected[tuple(left)])
            assert model.stack.differing() == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_with_merged_edits_beneath(dtype: torch.dtype) -> None:
    model = model_of("llama", dtype)
    base = logits(model.module)
    deltas = [adalora(model, 1), low_rank(model, 2), lora(model, 3)]
    whole = logits(stacked(model, deltas).module)
    assert whole.dtype is dtype
    assert torch.equal(whole, logits(stacked(model_of("llama", dtype), deltas).module))
    take_off(model.stack, IDS[0])
    fresh = stacked(model_of("llama", dtype), deltas, (1, 2))
    assert torch.equal(logits(model.module), logits(fresh.module))
    stacked(model, [])
    assert torch.equal(logits(model.module), base)


def test_weights_fold_underneath_an_attached_adapter() -> None:
    model = model_of("gpt2")
    deltas = [adalora(model, 1), low_rank(model, 2)]
    (name,) = deltas[1].parameters
    parameter = model.parameters[name]
    only_adapter = logits(stacked(model, deltas, (0,)).module)
    wrapper = model.module.get_submodule(name.removesuffix(".weight"))
    put_on(model.stack, edit_with(2, IDS[1], deltas[1]))
    assert model.module.get_submodule(name.removesuffix(".weight")) is wrapper
    assert model.parameters[name] is parameter
    assert not torch.equal(parameter, model.pristine[name])
    assert not torch.equal(logits(model.module), only_adapter)
    assert torch.equal(logits(model.module), logits(stacked(model_of("gpt2"), deltas).module))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_embeddings_stay_tied_and_untouched(family: str) -> None:
    model = model_of(family)
    embedding = model.module.get_input_embeddings().weight
    before = embedding.detach().clone()
    stacked(model, [adalora(model, 1), lora(model, 2)])
    assert model.module.get_output_embeddings().weight is embedding
    stacked(model, [])
    assert model.module.get_output_embeddings().weight is embedding
    assert torch.equal(embedding, before)


def test_an_adapter_for_a_module_that_is_not_there_leaves_the_model_alone() -> None:
    model, other = model_of("gpt2"), model_of("llama")
    before = Snapshot(model)
    with pytest.raises(IntegrityError, match="does not have"):
        adalora(other, 1).check(model)
    with pytest.raises(AttributeError):
        stacked(model, [adalora(model, 1), lora(other, 2)])
    assert before.changed() == []


# -- storage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adalora, lora])
def test_an_adapter_survives_every_way_of_storing_it(make: Any, tmp_path: Path) -> None:
    model = model_of("llama")
    delta = make(model, 1)
    delta.check(model)
    stored = AdapterDelta.from_parts(*from_bytes(to_bytes(delta.tensors(), delta.metadata())))
    delta.write_directory(tmp_path)
    read = AdapterDelta.from_directory(tmp_path, model)
    for other in (stored, read):
        assert other.metadata() == delta.metadata()
        assert other.tensors().keys() == delta.tensors().keys()
        assert all(torch.equal(t, other.tensors()[n]) for n, t in delta.tensors().items())
    assert set(delta.parameters) == {f"{name}.weight" for name in targets(model)}


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "XLORA"}, "XLORA"),
    ({"peft_type": ["ADALORA"]}, "peft_type|PEFT type"),
    ({"peft_type": "LORA"}, "names a tensor"),
    ({"base_model_name_or_path": "someone/model"}, "base_model_name_or_path"),
    ({"revision": "main"}, "revision"),
    ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"layer_replication": [[0, 900]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias"),
    ({"trainable_token_indices": [0]}, "trainable_token_indices"),
    ({"surprise": "../../etc/passwd"}, "surprise"),
    ({"lora_alpha": float("nan")}, "lora_alpha"),
    ({"lora_alpha": 0}, "lora_alpha"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
    ({"init_r": 10**12}, "init_r"),
    ({"init_r": 5}, "rank_pattern"),
    ({"total_step": None}, "total_step"),
    ({"tinit": 9}, "schedule"),
    ({"rank_pattern": None}, "rank"),
    ({"rank_pattern": {"../x": [True] * 4}}, "rank_pattern"),
    ({"rank_pattern": [1]}, "rank_pattern"),
    ({"use_rslora": True}, "use_rslora"),
    ({"task_type": "os.system"}, "task_type"),
]


@pytest.mark.parametrize(("change", "says"), CONFIGS)
def test_a_hostile_configuration_is_refused(change: dict[str, Any], says: str) -> None:
    delta = adalora(model_of("gpt2"), 1)
    with pytest.raises(IntegrityError, match=says):
        AdapterDelta({**delta.config, **change}, delta.tensors())


def test_a_pattern_that_would_run_for_ever_is_refused() -> None:
    delta = lora(model_of("gpt2"), 1)
    with pytest.raises(IntegrityError, match="alpha_pattern"):
        AdapterDelta({**delta.config, "alpha_pattern": {"(a+)+x": 3}}, delta.tensors())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda k, t: {k.replace("transformer", "../transformer"): t}, "not the name of a tensor"),
        (lambda k, t: {k.replace("base_model.model.", ""): t}, "not the name of a tensor"),
        (lambda k, t: {k + ".bias": t}, "not the name of a tensor"),
        (lambda k, t: {}, "lora_A"),
        (lambda k, t: {k: t[:1]}, "agree on their rank"),
        (lambda k, t: {k: t[0]}, "matrix"),
        (lambda k, t: {k: t.long()}, "floating point"),
    ],
)
def test_tensors_that_make_no_adapter_are_refused(change: Any, says: str) -> None:
    delta = adalora(model_of("gpt2"), 1)
    tensors = delta.tensors()
    key = next(k for k, t in tensors.items() if k.endswith("lora_A") and len(t) > 1)
    tensors |= change(key, tensors.pop(key))
    with pytest.raises(IntegrityError, match=says):
        AdapterDelta(delta.config, tensors)


def test_what_does_not_fit_the_model_is_refused() -> None:
    model = model_of("gpt2")
    delta = adalora(model, 1)
    key = next(k for k, t in delta.tensors().items() if k.endswith("lora_B") and t.numel())
    for value in (float("nan"), float("inf")):
        tensor = delta.tensors()[key].clone()
        tensor[0, 0] = value
        assert AdapterDelta(delta.config, {**delta.tensors(), key: tensor}).not_finite() == key
    smaller = {key: delta.tensors()[key][1:]}
    with pytest.raises(IntegrityError, match="shape"):
        AdapterDelta(delta.config, delta.tensors() | smaller).check(model)
    for name, says in (("transformer.wte", "Embedding"), ("transformer.h.0", "does not have")):
        tensors = {f"base_model.model.{name}.lora_{p}.weight": torch.ones(2, 2) for p in "AB"}
        with pytest.raises(IntegrityError, match=says):
            AdapterDelta({"peft_type": "LORA"}, tensors).check(model)


def test_a_directory_that_is_no_sound_adapter_is_refused(tmp_path: Path) -> None:
    model = model_of("gpt2")
    folder = tmp_path / "adapter"
    with pytest.raises(IntegrityError, match="missing"):
        AdapterDelta.from_directory(folder, model)
    adalora(model, 1).write_directory(folder)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    good, data = config.read_text(), weights.read_bytes()
    for text in ("{", "[]", '{"a": NaN', "[" * 100_000):
        config.write_text(text)
        with pytest.raises(IntegrityError, match="JSON"):
            AdapterDelta.from_directory(folder, model)
    # Where it was trained is dropped, so that nothing is looked up under that name.
    config.write_text(json.dumps({**json.loads(good), "base_model_name_or_path": "some/one"}))
    assert AdapterDelta.from_directory(folder, model).config["base_model_name_or_path"] is None
    config.write_text(good)
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="safetensors"):
        AdapterDelta.from_directory(folder, model)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(IntegrityError, match="pickle"):
        AdapterDelta.from_directory(folder, model)
