"""A tokenizer as metadata of a GGUF file: byte-level BPE, which is what it can say exactly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from errata.errors import CapabilityError

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from errata.model.model import Model

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's kinds of token

# How llama.cpp calls what cuts a text into words, by the regular expression that it is.
_SPLITS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+": "llama-bpe",
}


def add_tokenizer(writer: GGUFWriter, model: Model) -> None:
    """Put the model's tokenizer into a file.

    Raises `CapabilityError` for one that is no byte-level BPE, or cuts words in an unknown way.
    """
    tokenizer = model.tokenizer
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    bpe = whole["model"]
    if bpe.get("type") != "BPE" or bpe.get("byte_fallback") or bpe.get("ignore_merges"):
        raise _unknown("it is no byte-level BPE")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(whole.get("pre_tokenizer") or {}))

    size = int(model.config.vocab_size)
    tokens, kinds = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, index in bpe["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in whole["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])

    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer("a").input_ids[0]
    writer.add_add_bos_token(bool(first == tokenizer.bos_token_id))
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _splitting(rule: dict[str, Any]) -> str:
    """Return llama.cpp's name of how a text is cut into words before the merges."""
    steps = rule.get("pretokenizers", [rule])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        found = _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if found is not None:
            return found
    raise _unknown(f"how it cuts words ({', '.join(map(str, kinds))}) has no name in llama.cpp")


def _unknown(reason: str) -> CapabilityError:
    return CapabilityError(
        f"This model's tokenizer cannot be written as GGUF here: {reason}. Name the base's own "
        "GGUF file (base=…, --base FILE): its tokenizer is taken over."
    )
