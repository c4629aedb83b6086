"""What a model's forward can be given: positions, how many tokens, where its decoder starts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.model.model import Model


def context_limit(model: Model) -> int | None:
    """Return how many tokens the model has learned positions for; None when they are computed."""
    embedding = model.anatomy.position_embedding(model.module)
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    if embedding is None or limit is None:
        return None
    # RoBERTa counts positions from behind the padding's own: its first ones are never used.
    padding: int | None = getattr(embedding, "padding_idx", None)
    return limit if padding is None else limit - padding - 1


def takes_positions(model: Model) -> bool:
    """Say whether position_ids are passed. Encoders count by themselves: from 2, in RoBERTa."""
    return model.anatomy.kind == "decoder" and model.anatomy.spec.position_ids


def decoder_start(model: Model) -> int | None:
    """Return the token that the decoder of an encoder-decoder starts from, None if unsaid."""
    for holder in (getattr(model.module, "generation_config", None), model.config):
        value: Any = getattr(holder, "decoder_start_token_id", None)
        if isinstance(value, int):
            return value
    return None


def vocabulary_size(model: Model) -> int:
    """Return the width of the model's logits, as its configuration says."""
    return int(model.config.get_text_config().vocab_size)
