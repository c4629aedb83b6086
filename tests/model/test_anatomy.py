"""Every family's parts are where the registry says, and do what their names say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from errata.errors import AnatomyError, ConfigError
from errata.model.anatomy import Anatomy
from errata.model.architecture import parse_architectures
from errata.model.loading import load_model
from tests.families import (
    CLASSIFIERS,
    CONTEXT,
    FAMILIES,
    HIDDEN,
    LAYERS,
    MLP,
    architectures,
    build,
    sampled,
)

# Norms between sublayer and residual stream: the contribution is not the MLP's bare output.
POST_NORM = ("gemma2", "gemma3_text", "bert", "roberta")


def _inputs(anatomy, batch=2, length=7):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (batch, length), generator=generator)
    inputs = {"input_ids": ids}
    if anatomy.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = ids
    return inputs


class _Tap:
    """What modules were given and returned in one forward pass."""

    def __init__(self, module, inputs, names):
        self.given, self.returned = {}, {}
        self.shape = inputs["input_ids"].shape
        handles = [
            module.get_submodule(name).register_forward_hook(self._hook(name), with_kwargs=True)
            for name in names
        ]
        with torch.no_grad():
            self.output = module(**inputs)
        for handle in handles:
            handle.remove()

    def _hook(self, name):
        def hook(module, args, kwargs, output):
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            returned = output if isinstance(output, torch.Tensor) else output[0]
            # OPT's MLP sees all tokens in one row; Falcon adds to the MLP's output in place.
            self.given[name] = tensors[0].reshape(*self.shape, -1)
            self.returned[name] = returned.clone().reshape(*self.shape, -1)

        return hook


def test_the_registry_and_the_tiny_models_cover_the_same_families():
    assert set(architectures()) == set(FAMILIES)


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_parts_have_the_shapes_of_their_role(family):
    module, _ = build(family)
    anatomy = Anatomy.of(module, architectures())
    assert (anatomy.model_type, anatomy.n_layers, anatomy.hidden_size) == (family, LAYERS, HIDDEN)
    width = 4 * HIDDEN if family == "bloom" else MLP
    assert anatomy.key_size == width
    assert anatomy.context in (None, CONTEXT)
    parameters = dict(module.named_parameters())
    for layer in range(LAYERS):
        out = anatomy.mlp_out(layer)
        assert anatomy.shape(module, out) == (HIDDEN, width)
        for name in anatomy.mlp_in(layer):
            assert anatomy.shape(module, name) in ((width, HIDDEN), (2 * width, HIDDEN))
        assert anatomy.shape(module, anatomy.attention_out(layer))[0] == HIDDEN
        projections = [
            out, anatomy.attention_out(layer), *anatomy.mlp_in(layer),
            *anatomy.attention_in(layer),
        ]  # fmt: skip
        assert len(set(projections)) == len(projections)
        for name in projections:
            weight = parameters[anatomy.weight(name)]
            shape = anatomy.shape(module, name)
            transposed = anatomy.transposed(name)
            assert transposed == isinstance(module.get_submodule(name), Conv1D)
            assert tuple(weight.shape) == (shape[::-1] if transposed else shape)
            bias = anatomy.bias(module, name)
            assert (bias in parameters) if bias else (f"{name}.bias" not in parameters)
    assert anatomy.embedding(module) is module.get_input_embeddings()
    positions = anatomy.position_embedding(module)
    assert positions is None or positions.weight.shape[1] == HIDDEN


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_parts_run_in_their_role(family):
    module, _ = build(family)
    anatomy = Anatomy.of(module, architectures())
    last = LAYERS - 1
    block, mlp, attention = anatomy.block(last), anatomy.mlp(last), anatomy.attention(last)
    names = [block, mlp, attention, anatomy.mlp_out(last), anatomy.mlp_in(last)[0]]
    tap = _Tap(module, _inputs(anatomy), [*names, anatomy.head_name])
    key = tap.given[anatomy.mlp_out(last)]
    assert key.shape == (2, 7, anatomy.key_size)
    if family not in (*POST_NORM, "t5"):  # T5's decoder adds cross-attention as well
        change = tap.returned[block] - tap.given[block]
        parts = tap.returned[attention] + tap.returned[mlp]
        torch.testing.assert_close(change, parts, rtol=1e-4, atol=1e-5)
    if anatomy.kind == "encoder-decoder":
        return  # the head's input is scaled
    normed = anatomy.final_norm(module)(tap.returned[block])
    torch.testing.assert_close(tap.given[anatomy.head_name], normed)
    logits = anatomy.head(module)(normed)
    if family == "gemma2":  # caps its logits after the head
        cap = module.config.final_logit_softcapping
        logits = cap * torch.tanh(logits / cap)
    torch.testing.assert_close(tap.output.logits, logits)


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_position_ids_are_as_declared(family):
    module, _ = build(family)
    anatomy = Anatomy.of(module, architectures())
    if not anatomy.spec.position_ids:
        return
    inputs = _inputs(anatomy)
    positions = torch.arange(7).expand(2, 7)
    with torch.no_grad():
        plain = module(**inputs).logits
        given = module(**inputs, position_ids=positions).logits
        moved = module(**inputs, position_ids=positions.flip(1)).logits
    torch.testing.assert_close(plain, given)
    assert not torch.allclose(plain, moved)


@pytest.mark.parametrize("family", sampled(FAMILIES))
def test_probing_finds_what_the_registry_says(family):
    module, _ = build(family)
    declared = Anatomy.of(module, architectures())
    probed = Anatomy.of(module, {})
    for field, value in declared.spec:
        if field not in ("variants", "head"):
            assert getattr(probed.spec, field) == value, field
    assert probed.head_name == declared.head_name
    assert probed.encoder == declared.encoder or declared.encoder.spec.head == "lm_head"


@pytest.mark.parametrize("gated", [False, True])
def test_an_encoder_decoder_has_both_stacks(gated):
    module, _ = build("t5", feed_forward_proj="gated-gelu" if gated else "relu")
    anatomy = Anatomy.of(module, architectures())
    encoder = anatomy.encoder
    assert encoder is not None
    assert encoder.n_layers == LAYERS
    assert anatomy.spec.encoder is not None
    assert anatomy.spec.encoder.blocks == "encoder.block"
    assert encoder.mlp_out(1) == "encoder.block.1.layer.1.DenseReluDense.wo"
    assert anatomy.mlp_out(1) == "decoder.block.1.layer.2.DenseReluDense.wo"
    assert len(anatomy.mlp_in(0)) == len(encoder.mlp_in(0)) == (2 if gated else 1)
    probed = Anatomy.of(module, {})
    assert probed.mlp_in(0) == anatomy.mlp_in(0)
    assert probed.encoder is not None
    assert probed.encoder.spec == encoder.spec.model_copy(
        update={"variants": (), "head": "lm_head"}
    )


def test_a_variant_follows_the_configuration():
    module, _ = build("opt", do_layer_norm_before=False)
    anatomy = Anatomy.of(module, architectures())
    assert anatomy.spec.final_norm is None
    assert isinstance(anatomy.final_norm(module), nn.Identity)


def test_the_layout_is_not_guessed_from_a_square_shape():
    gpt2, neo = build("gpt2")[0], build("gpt_neo")[0]
    for module, transposed in ((gpt2, True), (neo, False)):
        for stanzas in (architectures(), {}):
            anatomy = Anatomy.of(module, stanzas)
            square = anatomy.attention_out(0)
            assert anatomy.shape(module, square) == (HIDDEN, HIDDEN)
            assert anatomy.transposed(square) is transposed
            assert not anatomy.transposed(anatomy.embedding_name)


def test_layers_count_from_either_end():
    anatomy = Anatomy.of(build("gpt2")[0], architectures())
    assert anatomy.mlp_out(-1) == anatomy.mlp_out(LAYERS - 1) == "transformer.h.2.mlp.c_proj"
    for bad in (LAYERS, -LAYERS - 1):
        with pytest.raises(ConfigError, match=r"0 to 2 \(or -3 to -1"):
            anatomy.block(bad)
    with pytest.raises(ConfigError, match="not an integer"):
        anatomy.block(True)


def test_other_families_are_probed():
    bart = transformers.BartForConditionalGeneration(
        transformers.BartConfig(
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=60,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
        )
    )
    anatomy = Anatomy.of(bart, {})
    assert anatomy.kind == "encoder-decoder"
    assert anatomy.mlp_out(0) == "model.decoder.layers.0.fc2"
    assert "encoder_attn" not in "".join(anatomy.attention_in(0))
    granite = transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            vocab_size=60,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    assert Anatomy.of(granite, {}).spec == architectures()["llama"]


@pytest.mark.parametrize(
    ("family", "changes", "out"),
    [
        ("llama", {"intermediate_size": HIDDEN}, "mlp.down_proj"),
        ("gpt2", {"n_inner": HIDDEN}, "mlp.c_proj"),
        ("opt", {"ffn_dim": HIDDEN}, "fc2"),
        (
            "qwen2_moe", {"shared_expert_intermediate_size": HIDDEN},
            "mlp.shared_expert.down_proj",
        ),
    ],
)  # fmt: skip
def test_an_mlp_as_wide_as_the_hidden_states_is_told_by_its_names(family, changes, out):
    anatomy = Anatomy.of(build(family, **changes)[0], {})
    assert anatomy.mlp_out(1) == f"{anatomy.block(1)}.{out}"
    assert anatomy.mlp_out(1) not in anatomy.mlp_in(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_out": "mlp.down_proj"}, r"gpt2\.mlp_out.*it has: .*mlp\.c_proj"),
        ({"blocks": "h"}, r"gpt2\.blocks is 'h', but GPT2LMHeadModel has no such module"),
        ({"layout": "out_in"}, r"gpt2\.layout is 'out_in'.*is a Conv1D.*'in_out'"),
    ],
)
def test_a_wrong_stanza_is_named(changes, message):
    spec = architectures()["gpt2"].model_copy(update=changes)
    with pytest.raises(AnatomyError, match=message):
        Anatomy.of(build("gpt2")[0], {"gpt2": spec})


def test_a_stanza_with_an_unknown_field_is_a_configuration_error():
    stanza = {**architectures()["gpt2"].model_dump(), "mlp_outt": "x"}
    with pytest.raises(ConfigError, match=r"architectures\.gpt2 .*mlp_outt"):
        parse_architectures({"gpt2": stanza})


def test_a_stanza_may_come_straight_from_yaml():
    module, _ = build("gpt2")
    raw = architectures()["gpt2"].model_dump(mode="json")
    assert Anatomy.of(module, {"gpt2": raw}) == Anatomy.of(module, architectures())


def test_a_model_without_configuration_or_head_is_refused():
    with pytest.raises(AnatomyError, match="no Hugging Face configuration"):
        Anatomy.of(nn.Linear(2, 2), {})
    module, _ = build("gpt2")
    headless = architectures()["gpt2"].model_copy(update={"head": ("score", "classifier")})
    anatomy = Anatomy.of(module, {"gpt2": headless})
    assert anatomy.head_name is None
    with pytest.raises(AnatomyError, match="has no head"):
        anatomy.head(module)
    with pytest.raises(AnatomyError, match=r"no module 'transformer\.h\.9'"):
        anatomy.shape(module, "transformer.h.9")


def test_half_precision_models_build_and_are_reproducible():
    one, two = build("llama", torch.bfloat16)[0], build("llama", torch.bfloat16)[0]
    assert next(one.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# -- what a model was made to do -------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSIFIERS)
@pytest.mark.parametrize("probed", [False, True])
def test_a_classifier_s_parts_are_where_its_language_model_s_are(family: str, probed: bool) -> None:
    module, _ = build(family)
    whole, _ = build(family.partition("-")[0])
    found = Anatomy.of(module, {} if probed else architectures())
    language_model = Anatomy.of(whole, architectures())
    assert found.kind == language_model.kind
    head = found.head(module)
    assert head is module.get_submodule(found.head_name)
    assert found.head_name in ("score", "classifier", "classification_head")
    for layer in range(found.n_layers):
        for part in ("block", "mlp_in", "mlp_out", "attention", "attention_in", "attention_out"):
            path, wanted = getattr(found, part)(layer), getattr(language_model, part)(layer)
            pairs = [(path, wanted)] if isinstance(path, str) else zip(path, wanted, strict=True)
            assert all(one.endswith(end) for one, end in pairs)
    assert (found.encoder is None) == (language_model.encoder is None)


@pytest.mark.parametrize(
    ("family", "task"),
    [("gpt2", "causal"), ("llama", "causal"), ("t5", "seq2seq"), ("bert", "masked"),
     *[(family, "classify") for family in CLASSIFIERS]],
)  # fmt: skip
def test_a_checkpoint_opens_as_what_it_is(family: str, task: str, tmp_path: Path) -> None:
    module, tokenizer = build(family)
    folder = tmp_path / family
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = load_model(folder, architectures=architectures())
    assert model.task == task
    assert type(model.module) is type(module)
    saved = module.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in model.module.state_dict().items())
    assert load_model(module, tokenizer, architectures=architectures()).task == task


def test_a_task_is_never_guessed(tmp_path: Path) -> None:
    module, tokenizer = build("bert")
    module.bert.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"is BertModel: .*ForSequenceClassification"):
        load_model(tmp_path, architectures=architectures())
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    del config["architectures"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ConfigError, match="of no class"):
        load_model(tmp_path, architectures=architectures())


def test_what_is_made_for_translation_opens_and_what_does_not_say_is_refused(
    tmp_path: Path,
) -> None:
    words = {"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    shape = {"d_model": HIDDEN, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": MLP,
             "decoder_ffn_dim": MLP, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
             "forced_eos_token_id": None}  # fmt: skip
    _, tokenizer = build("gpt2")
    marian = transformers.MarianMTModel(
        transformers.MarianConfig(**shape, **{**words, "vocab_size": len(tokenizer)})
    )
    model = load_model(marian, tokenizer, architectures=architectures())
    assert (model.task, model.device.type) == ("seq2seq", "cpu")
    assert model.anatomy.weight(model.anatomy.embedding_name) in model.parameters
    with pytest.raises(ConfigError, match=r"^The model given is GPT2Model: what it is made for"):
        load_model(build("gpt2")[0].transformer, tokenizer, architectures=architectures())


def test_a_model_of_several_residual_streams_is_refused() -> None:
    config = transformers.Gemma3nTextConfig(
        hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, vocab_size=60, vocab_size_per_layer_input=60,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, activation_sparsity_pattern=None,
        layer_types=["full_attention"] * 2, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(AnatomyError, match="several residual streams"):
        Anatomy.of(transformers.Gemma3nForCausalLM(config), architectures())
