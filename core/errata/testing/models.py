"""Helpers on models for tests: their state as a dictionary, a copy that differs, tiny ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from errata.edits.edit import Edit
from errata.edits.outcome import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from errata.editor import Editor
    from errata.edits.delta import Delta
    from errata.model.model import Model


def edit_with(sequence: int, edit_id: str, delta: Delta) -> Edit:
    """Return a bare record with a delta, as a stack holds it: only what folding needs is true."""
    return Edit.model_construct(
        id=edit_id, sequence=sequence, method="test", delta_kind=delta.kind, requests=(),
        config={}, fingerprint={}, parents=(), outcome=Outcome(), artifacts={},
    ).bind(delta)  # fmt: skip


def state_of(model: Model) -> dict[str, Tensor]:
    """Return a copy of every parameter and buffer of the live model, by its base name."""
    live = {**model.parameters, **model.buffers}
    return {name: tensor.detach().clone() for name, tensor in live.items()}


def perturbed(editor: Editor) -> nn.Module:
    """Return a copy of the editor's base module in which one entry of every matrix differs."""
    with editor.disabled():
        other = copy.deepcopy(editor.model.module)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim == 2:
                parameter[0, 0] += 0.5
    return other


class TinyKind(NamedTuple):
    """A kind of model that a method may or may not declare, and how a tiny one is built.

    Attributes:
        architecture: decoder, encoder-decoder or encoder.
        task: what it is made for.
        classes: names of the configuration's and the module's class in transformers.
        sizes: arguments of the configuration.
    """

    architecture: str
    task: str
    classes: tuple[str, str]
    sizes: dict[str, Any]


_GPT2 = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 128}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2}
_BERT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 32, "max_position_embeddings": 128}  # fmt: skip
TINY_KINDS = (
    TinyKind("decoder", "causal", ("GPT2Config", "GPT2LMHeadModel"), _GPT2),
    TinyKind("decoder", "classify", ("GPT2Config", "GPT2ForSequenceClassification"), _GPT2),
    TinyKind("encoder-decoder", "seq2seq", ("T5Config", "T5ForConditionalGeneration"), _T5),
    TinyKind("encoder", "masked", ("BertConfig", "BertForMaskedLM"), _BERT),
    TinyKind("encoder", "classify", ("BertConfig", "BertForSequenceClassification"), _BERT),
)


def tiny(kind: TinyKind, vocab_size: int) -> nn.Module:
    """Return a model of a kind in eval mode: four layers of 16 units, the same at every call."""
    import transformers

    config, module = (getattr(transformers, name) for name in kind.classes)
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        built: nn.Module = module(config(vocab_size=vocab_size, **ids, **kind.sizes))
    return built.eval()
