"""Families without a stanza: experts, hybrids, and language models inside larger ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from errata.contract import plugins
from errata.editor import Editor
from errata.edits.request import Request
from errata.errors import AnatomyError, CapabilityError
from errata.locate import average, sweep
from errata.model import tokens
from errata.model.anatomy import Anatomy
from errata.model.loading import load_model
from errata.model.scoring import score_targets
from errata.testing.contract import answers, assert_same
from errata.testing.models import state_of
from tests.families import (
    HIDDEN,
    PROBED,
    SENTENCES,
    architectures,
    build,
    build_tokenizer,
    sampled,
)

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
CASES = Path(__file__).parent.parent / "data" / "registries"
FACT = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
PROMPTS = ["The capital of France is", "Rome is in Italy. Paris is in", "Paris"]
SHORT: dict[str, dict[str, Any]] = {
    "grace": {"steps": 15},
    "ft": {"steps": 5, "lr": 0.01},
    "lora": {"steps": 4},
    "adalora": {"steps": 4},
    "kn": {"steps": 3},
}
CLOSED = {"steps": 3, "tokens": 300, "contexts": ("{}",)}


def _opened(family: str, cache: Path, **options: Any) -> Editor:
    module, tokenizer = build(family, **options)
    return Editor(module, tokenizer, guards=QUIET, artifacts=cache, corpus=SENTENCES)


@pytest.fixture(params=sampled(PROBED), scope="module")
def editor(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Editor]:
    with _opened(request.param, tmp_path_factory.mktemp("cache")) as opened:
        yield opened


@pytest.fixture(scope="module")
def experts(tmp_path_factory: Any) -> Iterator[Editor]:
    with _opened("mixtral", tmp_path_factory.mktemp("cache")) as opened:
        yield opened


def _probability(editor: Editor) -> float:
    return sum(score_targets(editor.model, PROMPTS[:1], ["Rome"])[0].logprobs)


# -- where the parts are ---------------------------------------------------------------------------


def test_parts_do_what_their_names_say(editor: Editor) -> None:
    module, anatomy = editor.model.module, editor.model.anatomy
    assert anatomy.embedding(module) is module.get_input_embeddings()  # type: ignore[operator]
    assert anatomy.position_embedding(module) is None
    assert anatomy.hidden_size == HIDDEN
    for layer in anatomy.layers_with("mlp"):
        d, width = anatomy.shape(module, anatomy.mlp_out(layer))
        assert d == HIDDEN
        assert {anatomy.shape(module, name) for name in anatomy.mlp_in(layer)} == {(width, HIDDEN)}
    for layer in anatomy.layers_with("attention"):
        assert anatomy.shape(module, anatomy.attention_out(layer))[0] == HIDDEN
    layers = range(anatomy.n_layers)
    names = [path(i) for i in layers for path in (anatomy.block, anatomy.mlp, anatomy.attention)]
    given: dict[str, torch.Tensor] = {}
    returned: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)]
            given[name] = tensors[0].clone()
            first = output if isinstance(output, torch.Tensor) else output[0]
            returned[name] = first.reshape(*ids.shape, -1).clone()

        return keep

    assert anatomy.head_name is not None
    ids = tokens.encode(editor.model.tokenizer, PROMPTS[:1]).input_ids
    handles = [
        module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True)
        for name in (*names, anatomy.head_name)
    ]
    with torch.no_grad():
        module(input_ids=ids)
    for handle in handles:
        handle.remove()
    last = returned[anatomy.block(-1)]
    torch.testing.assert_close(given[anatomy.head_name], anatomy.final_norm(module)(last))
    if anatomy.model_type.startswith(("gemma3", "gemma4", "falcon_h1")):
        return  # a norm after the MLP, or a second mixer beside attention
    for layer in layers:
        change = returned[anatomy.block(layer)] - given[anatomy.block(layer)]
        parts = returned[anatomy.mlp(layer)] + returned[anatomy.attention(layer)]
        torch.testing.assert_close(change, parts, rtol=1e-4, atol=1e-5)


def test_what_probing_finds_can_be_written_as_a_stanza(editor: Editor) -> None:
    found = editor.model.anatomy
    module: Any = editor.model.module
    stanza = yaml.safe_load(yaml.safe_dump(found.spec.model_dump(mode="json")))
    again = Anatomy.of(module, {module.config.model_type: stanza})
    assert (again.parts, again.head_name) == (found.parts, found.head_name)


# -- editing -----------------------------------------------------------------------------------


def test_what_fits_edits_and_leaves_no_trace(editor: Editor) -> None:
    base = state_of(editor.model)
    before = _probability(editor)
    methods = ["grace", "ft", "lora"]
    if editor.model.anatomy.layers_with("mlp"):
        methods += ["kn", "memit"]
    for method in methods:
        edit = editor.edit(FACT, method=method, config=SHORT.get(method, CLOSED))
        assert edit.outcome is not None
        if method in ("grace", "ft", "lora"):
            assert _probability(editor) > before, method
        requests = [edit.requests[0].model_copy(update={"prompt": p.replace("France", "{}")})
                    for p in PROMPTS[:1]]  # fmt: skip
        alone = [answers(editor, [request])[0] for request in requests]
        assert answers(editor, requests) == [pytest.approx(one, abs=1e-4) for one in alone]
        texts = [editor.generate(prompt, max_new_tokens=3) for prompt in PROMPTS]
        assert editor.generate(PROMPTS, max_new_tokens=3) == texts
        editor.revert(edit)
        assert_same(state_of(editor.model), base)
        assert editor.verify() == []


def test_a_causal_trace_runs_through_layers_that_differ(tmp_path: Path) -> None:
    with _opened("lfm2", tmp_path) as editor:
        found = average(editor.model, [Request(**FACT)], samples=2)
        assert {len(effects.of("last subject token")) for effects in found.effects.values()} == {3}


# -- what cannot be is refused, and says what can ------------------------------------------------


def test_a_method_without_an_mlp_to_write_to_is_refused_by_name(experts: Editor) -> None:
    refused = set()
    for method in plugins.installed():
        try:
            experts.configure(method)
        except CapabilityError:
            refused.add(method)
    assert refused >= {"rome", "memit", "emmet", "alphaedit", "pmet", "kn"}
    with pytest.raises(CapabilityError, match="rome edits at the projections of an MLP") as caught:
        experts.edit(FACT, method="rome")
    named = str(caught.value).rpartition("need none: ")[2].rstrip(".").split(", ")
    assert {"ft", "grace", "lora", "adalora"} <= set(named)
    for method in {"ft", "grace", "adalora"}:
        experts.revert(experts.edit(FACT, method=method, config=SHORT[method]))


def test_a_part_that_a_layer_lacks_is_refused_with_the_layers_that_have_it(
    experts: Editor, tmp_path: Path
) -> None:
    with pytest.raises(AnatomyError, match=r"(?s)Layer 1 of this mixtral .*=attention_out"):
        experts.edit(FACT, method="ft", layers=[1], target_modules=["mlp_out"])
    experts.revert(experts.edit(FACT, method="ft", layers=[1], target_modules=["attention_out"]))
    with _opened("qwen3_moe", tmp_path) as editor:
        with pytest.raises(AnatomyError, match=r"Layer 0 .*Choose among the layers 2\."):
            editor.edit(FACT, method="rome", layer=0, config=CLOSED)
        editor.edit(FACT, method="rome", layer=2, config=CLOSED)


@pytest.mark.parametrize(
    ("family", "layers"),
    [("qwen3_moe", {"rome": 2, "memit": (2,), "ft": (2,), "grace": 2}),
     ("mixtral", {"ft": (1,), "grace": 1}),
     ("lfm2", {"rome": 1, "memit": (0, 1, 2), "ft": (1,), "grace": 1})],
)  # fmt: skip
def test_layer_rules_choose_among_the_layers_that_have_the_part(
    family: str, layers: dict[str, Any], tmp_path: Path
) -> None:
    with _opened(family, tmp_path) as editor:
        for method, wanted in layers.items():
            config: Any = editor.configure(method)[0]
            assert getattr(config, "layer" if isinstance(wanted, int) else "layers") == wanted


def test_a_sweep_runs_over_the_layers_that_have_the_part(tmp_path: Path) -> None:
    fact = Request(**FACT, target_true="Paris")
    with _opened("qwen3_moe", tmp_path) as editor:
        found = sweep(editor, [fact], "rome", trace=False, config=CLOSED)
        assert [one.layer for one in found.results] == [2]
        assert editor.configure("rome", {"layer": "auto"})[0].layer == 2  # type: ignore[attr-defined]


def test_attention_is_adapted_where_there_is_some(tmp_path: Path) -> None:
    with _opened("lfm2", tmp_path) as editor:
        edit = editor.edit(FACT, method="lora", config=SHORT["lora"])
        assert {name.split(".")[2] for name in edit.delta.parameters} == {"1"}
        with pytest.raises(AnatomyError, match=r"Layer 0 .* layers 1\."):
            editor.edit(FACT, method="lora", layers=[0])


# -- a language model inside a larger one ----------------------------------------------------------


def test_a_wrapper_is_opened_edited_and_merged_as_what_it_is(tmp_path: Path) -> None:
    module, tokenizer = build("gemma3")
    source = tmp_path / "gemma"
    module.save_pretrained(source)
    tokenizer.save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 16}', encoding="utf-8")
    live = Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path / "b")
    with Editor(source, guards=QUIET, artifacts=tmp_path / "a") as opened, live:
        assert type(opened.model.module) is type(module)
        assert opened.model.anatomy.model_type == "gemma3_text"
        edit = opened.edit(FACT, method="ft", config=SHORT["ft"])
        assert edit.delta.parameters[0].startswith("model.language_model.layers.")
        live.apply(opened.export(tmp_path / "one.errata", edit))  # the same base
        assert_same(state_of(live.model), state_of(opened.model))
        merged = opened.merge(tmp_path / "merged")
        expected = state_of(opened.model)
    again = load_model(merged, architectures=architectures())
    assert type(again.module) is type(module)
    assert_same(state_of(again), expected)
    assert (merged / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("family", sampled(("gemma3", "mistral3", "qwen2_5_vl", "llava", "llama4")))
def test_a_checkpoint_opens_with_its_own_class(family: str, tmp_path: Path) -> None:
    module, tokenizer = build(family)
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, architectures=architectures())
    assert type(model.module) is type(module)
    assert model.task == "causal"


# -- stanzas of a user -----------------------------------------------------------------------------


def test_the_advice_for_an_unknown_family_leads_to_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer("bytes")
    module = transformers.CTRLLMHeadModel(
        transformers.CTRLConfig(
            n_embd=32, n_layer=2, n_head=4, dff=32, n_positions=128, vocab_size=len(tokenizer),
            pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(AnatomyError, match=r"mlp_out among ffn\.0, ffn\.2") as caught:
        Editor(module, tokenizer, artifacts=tmp_path / "cache")
    text = str(caught.value)
    stanza, names = text[text.index("architectures:") :], ("Wq", "Wk", "Wv")
    for field, value in {
        "mlp": "ffn", "mlp_in": "[ffn.0]", "mlp_out": "ffn.2", "attention": "multi_head_attention",
        "attention_in": f"[{', '.join(f'multi_head_attention.{name}' for name in names)}]",
        "attention_out": "multi_head_attention.dense",
    }.items():  # fmt: skip
        stanza = stanza.replace(f"    {field}: ?", f"    {field}: {value}")
    assert ": ?" not in stanza
    (tmp_path / "registry.yaml").write_text(stanza, encoding="utf-8")
    with Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path / "cache") as editor:
        assert editor.edit(FACT, method="ft", config=SHORT["ft"]).config["layers"] == [1]


def test_a_stanza_that_takes_experts_for_a_projection_is_corrected_by_its_error() -> None:
    stanza = yaml.safe_load((CASES / "mixtral.yaml").read_text(encoding="utf-8"))["architectures"]
    module = build("mixtral")[0]
    with pytest.raises(AnatomyError, match=r"experts, but a MixtralExperts has no .*Leave mlp_in"):
        Anatomy.of(module, stanza)
    del stanza["mixtral"]["mlp_in"], stanza["mixtral"]["mlp_out"]
    stanza["mixtral"]["mlp"] = "mlp"
    assert Anatomy.of(module, stanza).parts == Anatomy.of(module, {}).parts


def test_a_stanza_of_a_wrapper_says_what_probing_finds() -> None:
    stanza = yaml.safe_load((CASES / "gemma3.yaml").read_text(encoding="utf-8"))["architectures"]
    module = build("gemma3")[0]
    declared, probed = Anatomy.of(module, stanza), Anatomy.of(module, {})
    assert (declared.parts, declared.head_name) == (probed.parts, probed.head_name)


# -- how much is read at once ----------------------------------------------------------------------


def test_text_is_cut_to_a_context_that_is_called_otherwise(tmp_path: Path) -> None:
    module, tokenizer = build("mpt", max_seq_len=16)
    with Editor(
        module, tokenizer, guards=QUIET, artifacts=tmp_path, corpus=[" ".join(SENTENCES)] * 2
    ) as editor:
        assert editor.model.anatomy.context == 16
        editor.edit(FACT, method="rome", layer=0, config=CLOSED)


# -- half precision --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def half(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Editor]:
    with _opened("gpt_neox", tmp_path_factory.mktemp("cache"), dtype=request.param) as opened:
        yield opened


@pytest.mark.parametrize(
    "method",
    ["rome", "memit", "kn", "ft", "grace", "lora", "adalora", "emmet", "alphaedit", "pmet"],
)
def test_every_method_edits_in_half_precision(half: Editor, method: str) -> None:
    base = state_of(half.model)
    edit = half.edit(FACT, method=method, config=SHORT.get(method, CLOSED))
    assert all(torch.isfinite(t).all() for t in edit.delta.tensors().values())
    half.revert(edit)
    assert_same(state_of(half.model), base)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_neurons_of_an_improbable_answer_are_found_in_fp16(family: str, tmp_path: Path) -> None:
    found = []
    for dtype in (torch.float32, torch.float16):
        module, tokenizer = build(family, dtype)
        module.get_output_embeddings().weight.data.mul_(8.0)
        with Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path) as editor:
            location: Any = editor.locate({**FACT, "target_true": "Steve"}, method="kn")
            found.append({(n["layer"], n["index"]) for n in location.evidence["neurons"]})
    assert found[0] & found[1]


# -- what only some models are warned of -----------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method", "warned"),
    [
        ("gemma2", "lora", True), ("gemma2", "ft", True), ("gemma2", "adalora", True),
        ("gemma2", "grace", False), ("llama", "lora", False),
    ],
)  # fmt: skip
def test_methods_that_do_not_spare_models_with_a_norm_behind_the_mlp_say_so_once(
    family: str, method: str, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts = [FACT, {**FACT, "subject": "Spain"}]
    with _opened(family, tmp_path) as editor:
        editor.edit(facts, method=method, config=SHORT[method], batch_size=1, commit="batch")
    said = [one for one in caplog.messages if "norm" in one and "spare" in one]
    assert len(said) == warned
    for name in ("alphaedit", "grace", "memit", "rome") if warned else ():
        assert name in said[0]


def test_who_measured_otherwise_says_so_in_a_registry_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said = {"methods": {"lora": {"capabilities": {"spares_behind_norm": True}}}}
    (tmp_path / "registry.yaml").write_text(yaml.safe_dump(said))
    monkeypatch.chdir(tmp_path)
    with _opened("gemma2", tmp_path) as editor:
        editor.edit(FACT, method="lora", config=SHORT["lora"])
        assert "spare" not in caplog.text
        editor.edit({**FACT, "subject": "Spain"}, method="ft", config=SHORT["ft"])
    assert "Measured to spare it: alphaedit, grace, lora, memit, rome." in caplog.text


# -- tokens that the model does not know -----------------------------------------------------------


def test_a_token_without_an_embedding_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module, tokenizer = build("llama")
    tokenizer.add_tokens(["Zorblax"])
    tokenizer.add_special_tokens({"pad_token": "[FILL]"})
    with Editor(module, tokenizer, guards=QUIET, artifacts=tmp_path) as editor:
        assert "has 520 rows): 'Zorblax', '[FILL]'" in caplog.text
        for ask in (
            lambda: editor.generate("Zorblax is"),
            lambda: editor.edit({**FACT, "subject": "Zorblax"}, method="ft"),
            lambda: editor.edit({**FACT, "target_new": "Zorblax"}, method="ft"),
        ):
            with pytest.raises(tokens.TokenError, match=r"'Zorblax' \(id 520\)"):
                ask()
        # Rows are filled up with a token that the model does know.
        assert len(editor.generate(PROMPTS, max_new_tokens=2)) == 3
    assert tokenizer.pad_token == "[FILL]"
