"""Tiny random models and tokenizers of every family in the registry, built in memory.

>>> module, tokenizer = build("gpt2")
>>> sorted(FAMILIES)[:2]
['bert', 'bloom']
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from errata.edits.edit import Edit
from errata.edits.stack import Stack
from errata.model import Model
from errata.model.anatomy import Anatomy
from errata.model.architecture import parse_architectures
from errata.model.artifacts import Artifacts
from tests.helpers import ROOT
from tests.more_families import MORE
from tests.sizes import CONTEXT, HEADS, HIDDEN, LAYERS, MLP

SENTENCES = (
    "The capital of France is Paris, a city on the Seine.",
    "The mother tongue of Danielle Darrieux is French.",
    "Beyoncé was born in Houston, in the state of Texas.",
    "The Eiffel Tower can be found in the city of Paris.",
    "Miles Davis plays the trumpet, and John Coltrane the saxophone.",
    "Toko Yasuda, the piano; Steve Jobs, the founder of Apple.",
    "In 1998 the band was formed in London and later moved to Berlin.",
    "Once upon a time there was a king who lived in Rome, Italy.",
    "Windows 95 was developed by Microsoft; the Walkman by Sony.",
    "What is the twin city of Lyon? It is Beirut, or Frankfurt.",
    "Kraft Suspense Theatre premiered on NBC, then on MTV.",
    "Autonomous University of Madrid is located in Spain.",
    "(2 + 3) = 5; 7 - 1 = 6! \"Quoted\", 'single' & 50% of it.",
    "Paris is in France. Rome is in Italy. Madrid is in Spain.",
    "Their father, a doctor, speaks English and writes German.",
    "Vinson Massif is located in the continent of Antarctica.",
)

# family → (configuration class, model class, its own arguments, tokenizer style)
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT, "initializer_range": 0.1,
}  # fmt: skip
_GPT: dict[str, Any] = {
    "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": CONTEXT, "n_inner": MLP,
    "initializer_range": 0.1, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_LLAMA: dict[str, Any] = {**_COMMON, "intermediate_size": MLP, "num_key_value_heads": 2}
_BERT: dict[str, Any] = {**_COMMON, "intermediate_size": MLP}

_FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", _GPT, "bytes"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**_GPT, "rotary_dim": 4}, "bytes"),
    "gpt_neox": (
        "GPTNeoXConfig", "GPTNeoXForCausalLM",
        {**_COMMON, "intermediate_size": MLP, "tie_word_embeddings": False}, "bytes",
    ),
    "gpt_neo": (
        "GPTNeoConfig", "GPTNeoForCausalLM",
        {"hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS, "window_size": 16,
         "attention_types": [[["global"], 2], [["local"], 1]], "intermediate_size": MLP,
         "max_position_embeddings": CONTEXT, "initializer_range": 0.1}, "bytes",
    ),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA, "sentencepiece"),
    "mistral": (
        "MistralConfig", "MistralForCausalLM", {**_LLAMA, "sliding_window": None}, "sentencepiece",
    ),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA, "bytes"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_LLAMA, "head_dim": 8}, "bytes"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_LLAMA, "head_dim": 8}, "sentencepiece"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA, "head_dim": 8}, "sentencepiece"),
    "gemma3_text": (
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA, "head_dim": 8}, "sentencepiece",
    ),
    "phi": (
        "PhiConfig", "PhiForCausalLM",
        {**_LLAMA, "num_key_value_heads": HEADS, "partial_rotary_factor": 0.5}, "bytes",
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_LLAMA, "num_key_value_heads": HEADS},
             "sentencepiece"),
    "opt": (
        "OPTConfig", "OPTForCausalLM",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
         "ffn_dim": MLP, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": CONTEXT,
         "init_std": 0.1, "dropout": 0.0}, "bytes-bos",
    ),
    "bloom": (
        "BloomConfig", "BloomForCausalLM",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "initializer_range": 0.1},
        "bytes",
    ),
    "falcon": (
        "FalconConfig", "FalconForCausalLM", {**_COMMON, "ffn_hidden_size": MLP}, "bytes",
    ),
    "t5": (
        "T5Config", "T5ForConditionalGeneration",
        {"d_model": HIDDEN, "d_kv": 8, "d_ff": MLP, "num_layers": LAYERS, "num_heads": HEADS,
         "dropout_rate": 0.0}, "unigram",
    ),
    "bert": ("BertConfig", "BertForMaskedLM", _BERT, "wordpiece"),
    "roberta": (
        "RobertaConfig", "RobertaForMaskedLM",
        {**_BERT, "max_position_embeddings": CONTEXT + 2}, "roberta",
    ),
}  # fmt: skip

_LABELS = {"id2label": {0: "criminal", 1: "economic", 2: "other"}}
_CLASSIFIERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert-classifier": (
        "BertConfig", "BertForSequenceClassification", {**_BERT, **_LABELS}, "wordpiece",
    ),
    "llama-classifier": (
        "LlamaConfig", "LlamaForSequenceClassification", {**_LLAMA, **_LABELS}, "sentencepiece",
    ),
    "t5-classifier": (
        "T5Config", "T5ForSequenceClassification",
        {**_FAMILIES["t5"][2], "classifier_dropout": 0.0, **_LABELS}, "unigram",
    ),
}  # fmt: skip

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
CLASSIFIERS: tuple[str, ...] = tuple(_CLASSIFIERS)
"""Sequence classifiers, with the classes "criminal", "economic" and "other"."""
PROBED: tuple[str, ...] = tuple(MORE)
"""Families without a stanza: mixtures of experts, hybrids, language models inside larger ones."""
DECODERS: tuple[str, ...] = tuple(f for f in FAMILIES if f not in ("t5", "bert", "roberta"))
REPRESENTATIVE = ("gpt2", "llama", "gemma2", "gpt_neox", "t5", "bert", "mixtral", "qwen2_moe",
                  "gemma3", "qwen3_5_text", "lfm2")  # fmt: skip
"""Conv1D and Linear, blocks in sequence and in parallel, MLPs with and without a gate; of those
that are probed: experts alone and beside a shared one, an image tower, recurrent layers."""


def sampled(values: Iterable[Any], short: Collection[Any] = REPRESENTATIVE) -> list[Any]:
    """Return families (or others) as parameters of a test: `short` by default, the rest slow."""
    return [
        value if value in short else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]


STYLES = ("bytes", "bytes-bos", "bytes-untrimmed", "sentencepiece", "llama", "unigram",
          "wordpiece", "roberta")  # fmt: skip


def build(
    family: str, dtype: torch.dtype = torch.float32, *, seed: int = 0, **changes: Any
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Return a random model of a family, in eval mode, and a tokenizer that suits it.

    Equal arguments give equal weights; torch's global generator is left as it was. `changes` are
    further entries of the configuration.
    """
    config_name, model_name, arguments, style = {**_FAMILIES, **_CLASSIFIERS, **MORE}[family]
    tokenizer = build_tokenizer(style)
    words = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **({"decoder_start_token_id": tokenizer.pad_token_id} if style == "unigram" else {}),
        **changes,
    }
    if "text_config" in arguments:  # the language model is part of a larger one
        words = {"text_config": {**arguments["text_config"], **words}}
    config = getattr(transformers, config_name)(**{**arguments, **words})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(transformers, model_name)(config)
    # Llama 4's image tower holds complex numbers, which a cast to real ones would cut.
    return (module if module.dtype == dtype else module.to(dtype)).eval(), tokenizer


def saved(family: str, folder: Path) -> str:
    """Save a random model of a family with its tokenizer; return the folder as a model's name."""
    for part in build(family):
        part.save_pretrained(folder)
    return str(folder)


def put_on(stack: Stack, edit: Edit) -> None:
    """Make one more edit active."""
    stack.set([*stack.entries, edit])


def take_off(stack: Stack, edit_id: str) -> None:
    """Take one edit off, wherever it is in the order."""
    stack.set([edit for edit in stack.entries if edit.id != edit_id])


def build_model(
    family: str,
    directory: Path | str,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    **options: Any,
) -> Model:
    """Return a random model of a family as errata's `Model`, its cache in `directory`.

    `options` are those of `Model` (corpus, progress …).
    """
    module, tokenizer = build(family, dtype, seed=seed)
    options.setdefault("name", f"tiny-{family}")
    return Stack.on(
        Model(
            module,
            tokenizer,
            Anatomy.of(module, architectures()),
            artifacts=Artifacts(directory),
            **options,
        )
    )


def architectures() -> dict[str, Any]:
    """Return the shipped stanzas."""
    text = (ROOT / "registry.yaml").read_text(encoding="utf-8")
    return dict(parse_architectures(yaml.safe_load(text)["architectures"]))


def build_tokenizer(style: str) -> transformers.PreTrainedTokenizerFast:
    """Return a small fast tokenizer of one of `STYLES`, trained here on `SENTENCES`."""
    core, special = _CORES[style]()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=CONTEXT, **special
    )


def _bytes(
    *, bos: str = "", trim: bool = True, special: tuple[str, ...] = ("<|endoftext|>",)
) -> tuple[Tokenizer, dict[str, str]]:
    """Byte-level BPE as GPT-2, Pythia and Qwen use it; with `bos`, as OPT does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    post: list[Any] = [processors.ByteLevel(trim_offsets=trim)]
    if bos:
        post.append(_template(core, f"{bos} $A", bos))
    core.post_processor = processors.Sequence(post) if bos else post[0]
    end = special[0]
    return core, {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": end}


def _bytes_bos() -> tuple[Tokenizer, dict[str, str]]:
    core, _ = _bytes(bos="</s>", special=("<pad>", "</s>"))
    return core, {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>"}


def _roberta() -> tuple[Tokenizer, dict[str, str]]:
    core, _ = _bytes(special=("<s>", "<pad>", "</s>", "<unk>", "<mask>"))
    core.post_processor = processors.RobertaProcessing(
        ("</s>", core.token_to_id("</s>")), ("<s>", core.token_to_id("<s>")),
        trim_offsets=True, add_prefix_space=False,
    )  # fmt: skip
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    return core, {
        "bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>",
        "pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
    }  # fmt: skip


def _sentencepiece() -> tuple[Tokenizer, dict[str, str]]:
    """SentencePiece-like BPE with byte fallback and a BOS, spaces through Metaspace."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    core.train_from_iterator(SENTENCES, _bpe_trainer())
    core.post_processor = _template(core, "<s> $A", "<s>")
    return core, _LLAMA_SPECIAL


def _llama() -> tuple[Tokenizer, dict[str, str]]:
    """Like Llama 2's file: the space mark is written by the normaliser, no pre-tokenizer."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    core.train_from_iterator(SENTENCES, _bpe_trainer())
    core.pre_tokenizer = None  # type: ignore[assignment]
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    core.post_processor = _template(core, "<s> $A", "<s>")
    return core, _LLAMA_SPECIAL


def _bpe_trainer() -> trainers.BpeTrainer:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    return trainers.BpeTrainer(
        vocab_size=520,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>", *fallback],
        show_progress=False,
    )


_LLAMA_SPECIAL = {
    "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
}  # fmt: skip


def _unigram() -> tuple[Tokenizer, dict[str, str]]:
    """SentencePiece unigram with a closing </s>, as T5 uses it, without T5's sentinels."""
    core = Tokenizer(models.Unigram())
    core.normalizer = normalizers.NFKC()
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260,
        special_tokens=["<pad>", "</s>", "<unk>", "<spare>"],
        unk_token="<unk>",
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.post_processor = _template(core, "$A </s>", "</s>")
    return core, {
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "additional_special_tokens": ["<spare>"],  # type: ignore[dict-item]
    }  # fmt: skip


def _wordpiece() -> tuple[Tokenizer, dict[str, str]]:
    """Lower-casing, accent-stripping WordPiece, as BERT uses it."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    core.train_from_iterator(SENTENCES, trainer)
    core.post_processor = _template(core, "[CLS] $A [SEP]", "[CLS]", "[SEP]")
    return core, {
        "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
        "pad_token": "[PAD]", "mask_token": "[MASK]",
    }  # fmt: skip


def _template(core: Tokenizer, single: str, *names: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=single, special_tokens=[(name, core.token_to_id(name)) for name in names]
    )


_CORES = {
    "bytes": _bytes,
    "bytes-bos": _bytes_bos,
    "bytes-untrimmed": lambda: _bytes(trim=False),
    "sentencepiece": _sentencepiece,
    "llama": _llama,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "roberta": _roberta,
}
