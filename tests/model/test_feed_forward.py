"""What a feed-forward network is activated by is found where its configuration does not say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from errata import Editor
from errata.errors import CapabilityError
from errata.kit.feed_forward import activation_of
from tests.families import build, build_tokenizer
from tests.sizes import CONTEXT, HEADS, HIDDEN, LAYERS, MLP

GUARDS = {"efficacy": "off", "perplexity": "off", "norm": "off"}
_APERTUS: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": MLP, "max_position_embeddings": CONTEXT, "initializer_range": 0.1,
}  # fmt: skip
_SHAPE = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT}
OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "openai": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", {**_SHAPE, "initializer_range": 0.3}),
    "ctrl": ("CTRLConfig", "CTRLLMHeadModel", {**_SHAPE, "dff": MLP, "initializer_range": 0.3}),
    "apertus": ("ApertusConfig", "ApertusForCausalLM", _APERTUS),
}


def opened(family: str, dtype: torch.dtype = torch.float32) -> Editor:
    if family not in OTHERS:
        return Editor(build(family, dtype), guards=GUARDS)
    config_name, name, arguments = OTHERS[family]
    tokenizer = build_tokenizer("bytes")
    end = tokenizer.eos_token_id
    words = {"vocab_size": len(tokenizer), "pad_token_id": end, "eos_token_id": end}
    config = getattr(transformers, config_name)(**arguments, **words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, name)(config)
    return Editor((module.to(dtype).eval(), tokenizer), guards=GUARDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "found"),
    [
        ("lfm2", ("silu",)),  # two projections, and a function that the code fixes
        ("openai", ("gelu_new", "gelu_fast")),  # its configuration says gelu, and means another
        ("ctrl", ("relu",)),
        ("bloom", ("gelu_new", "gelu_fast")),
        ("mpt", ("gelu", "gelu_python")),
        ("apertus", (None,)),  # xIELU, with parameters of its own
    ],
)
def test_it_is_found_in_what_the_network_computes(
    family: str, found: tuple[str | None, ...], dtype: torch.dtype
) -> None:
    with opened(family, dtype) as editor:
        assert activation_of(editor.model, 1) in found


@pytest.mark.parametrize(
    "method", ["wise", "t-patcher", pytest.param("calinet", marks=pytest.mark.slow)]
)
def test_methods_that_add_neurons_or_shards_edit_a_family_that_does_not_name_it(
    method: str,
) -> None:
    with opened("lfm2") as editor:
        before = editor.generate("The capital of France is")
        edit = editor.edit(
            "The capital of {} is", subject="France", target_new="Rome", method=method,
            config={"steps": 3},
        )  # fmt: skip
        editor.revert(edit)
        assert editor.generate("The capital of France is") == before
        assert editor.verify() == []


def test_neurons_are_refused_where_none_has_the_networks_activation_and_shards_are_not() -> None:
    asked = {"subject": "France", "target_new": "Rome", "config": {"steps": 3}}
    with opened("apertus") as editor:
        editor.edit("The capital of {} is", method="wise", **asked)
        with pytest.raises(CapabilityError, match=r"activates its MLPs by xielu; neurons can be"):
            editor.edit("The capital of {} is", method="t-patcher", **asked)
