"""What a model's forward can be given: positions, and what its decoder starts with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.model.model import Model


def takes_positions(model: Model) -> bool:
    """Say whether position_ids are passed. Encoders count by themselves: from 2, in RoBERTa."""
    return model.anatomy.kind == "decoder" and model.anatomy.spec.position_ids


def pads(model: Model) -> bool:
    """Say whether rows of different length may run together.

    A decoder's sequence classifier finds the end of a padded row by the padding's id; without one
    it takes one row at a time.
    """
    return model.task != "classify" or isinstance(model.config.pad_token_id, int)


def decoder_start(model: Model) -> int | None:
    """Return the token that the decoder of an encoder-decoder starts from, None if unsaid."""
    for holder in (getattr(model.module, "generation_config", None), model.config):
        value: Any = getattr(holder, "decoder_start_token_id", None)
        if isinstance(value, int):
            return value
    return None


def decoder_prefix(model: Model) -> list[int]:
    """Return what the decoder of an encoder-decoder starts with before it writes anything."""
    start = decoder_start(model)
    settings: Any = getattr(model.module, "generation_config", None)
    forced = getattr(settings, "forced_bos_token_id", None)  # BART and mBART answer after it
    first = (model.tokenizer.pad_token_id or 0) if start is None else start
    return [first] if forced is None else [first, int(forced)]


def vocabulary_size(model: Model) -> int:
    """Return the width of the model's logits, as its configuration says."""
    return int(model.config.get_text_config().vocab_size)
