"""Texts of different length run together give what each gives by itself, whatever pads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from errata import Editor
from errata.model.forward import laid_out, logits_at
from tests.families import build_tokenizer
from tests.sizes import CONTEXT, HEADS, HIDDEN, LAYERS, MLP

PROMPTS = ["The capital of France is", "The mother tongue of Danielle Darrieux, I think, is", "A"]
_TWO: dict[str, Any] = {
    "d_model": HIDDEN, "decoder_layers": LAYERS, "decoder_ffn_dim": MLP, "encoder_layers": LAYERS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": MLP, "encoder_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT, "init_std": 0.3, "dropout": 0.0,
}  # fmt: skip
_ONE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": MLP, "max_position_embeddings": CONTEXT, "initializer_range": 0.3,
}  # fmt: skip
_RECURRENT = {
    **_ONE, "num_key_value_heads": 1, "head_dim": 8, "lru_width": HIDDEN,
    "attention_window_size": 64, "intermediate_size": 6 * HIDDEN, "w_init_variance_scale": 1.0,
}  # fmt: skip
MODELS = {
    "positions by column, none can be given": ("Bart", "BartForCausalLM", _TWO),
    "positions in the encoder by column": ("Pegasus", "PegasusForConditionalGeneration", _TWO),
    "an encoder as a decoder": ("Bert", "BertLMHeadModel", {**_ONE, "is_decoder": True}),
    "positions that do not count from zero": (
        "Roberta", "RobertaForCausalLM", {**_ONE, "is_decoder": True},
    ),
    "a recurrence over the padding": ("RecurrentGemma", "RecurrentGemmaForCausalLM", _RECURRENT),
}  # fmt: skip


def opened(what: str, dtype: torch.dtype = torch.float32) -> Editor:
    family, name, arguments = MODELS[what]
    tokenizer = build_tokenizer("bytes")
    end = tokenizer.eos_token_id
    # An end that greedy texts do not meet at once, and padding that is no end for RoBERTa to skip.
    words = {"vocab_size": len(tokenizer), "pad_token_id": 1, "bos_token_id": end,
             "eos_token_id": end, "decoder_start_token_id": end}  # fmt: skip
    config = getattr(transformers, f"{family}Config")(**arguments, **words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = getattr(transformers, name)(config)
    guards = {"efficacy": "off", "perplexity": "off", "norm": "off"}
    return Editor((module.to(dtype).eval(), tokenizer), guards=guards)


@pytest.mark.parametrize("what", MODELS)
def test_texts_continued_together_are_what_each_is_alone(what: str) -> None:
    with opened(what) as editor:
        alone = [editor.generate(prompt, max_new_tokens=6) for prompt in PROMPTS]
        assert editor.generate(PROMPTS, max_new_tokens=6) == alone
        assert len(set(alone)) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrence_over_padding_is_noticed_in_half_precision_as_well(dtype: torch.dtype) -> None:
    with opened("a recurrence over the padding", dtype) as editor:
        forwards = []
        editor.model.module.register_forward_hook(
            lambda _, args, kwargs, out: forwards.append(len(out.logits)), with_kwargs=True
        )
        editor.generate(PROMPTS, max_new_tokens=1)
        assert forwards[-len(PROMPTS) :] == [1] * len(PROMPTS)


@pytest.mark.parametrize("what", [w for w in MODELS if "encoder by" not in w])
def test_rows_laid_out_for_an_edit_give_what_each_gives_alone(what: str) -> None:
    with opened(what) as editor:
        model = editor.model
        rows = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
        lookups = [len(row) // 2 for row in rows]
        inputs, columns = laid_out(model, rows, lookups)
        together = logits_at(model, inputs, torch.arange(len(rows)), columns)
        for row, lookup, found in zip(rows, lookups, together, strict=True):
            own, column = laid_out(model, [row], [lookup])
            alone = logits_at(model, own, torch.tensor([0]), column)[0]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


def test_a_codebook_fires_behind_a_recurrence_in_a_batch_as_well() -> None:
    with opened("a recurrence over the padding") as editor:
        edit = {"subject": "France", "target_new": "Rome", "method": "grace"}
        editor.edit("The capital of {} is", **edit, config={"steps": 20})
        alone = [editor.generate(prompt, max_new_tokens=3) for prompt in PROMPTS]
        assert editor.generate(PROMPTS, max_new_tokens=3) == alone
