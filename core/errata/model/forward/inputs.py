"""What a model's forward is given: its tensors, rows laid out as a batch, the decoder's start."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

from errata.model.prompts import pad, padding_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

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


def accepted(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those inputs that the module's forward has a parameter for.

    BLOOM, for one, has none for `position_ids`: it counts the mask.
    """
    known = inspect.signature(type(module).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def inputs_of(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that this model takes, and positions only where they count from zero.

    Tensors are moved to the model's device.
    """
    given = accepted(model.module, inputs)
    if not model.anatomy.spec.position_ids:
        given.pop("position_ids", None)
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }


def aligned(
    tokens: Sequence[Sequence[int]], lookups: Sequence[int], pad: int
) -> tuple[dict[str, Tensor], int]:
    """Return rows as one batch in which token `lookups[i]` of row i is in one common column.

    Rows are padded on both sides. Positions count real tokens only, so that a causal decoder
    computes for each row what it computes for that row by itself.

    Args:
        tokens: token ids of each row.
        lookups: index of one token per row.
        pad: token id to pad with.

    Returns:
        input_ids, attention_mask and position_ids (rows, width), and the common column. Token j
        of row i is in column `column - lookups[i] + j`.
    """
    column = max(lookups)
    width = column + max(len(t) - p for t, p in zip(tokens, lookups, strict=True))
    ids = torch.full((len(tokens), width), pad)
    mask = torch.zeros_like(ids)
    positions = torch.zeros_like(ids)
    for row, (content, lookup) in enumerate(zip(tokens, lookups, strict=True)):
        begin = column - lookup
        end = begin + len(content)
        ids[row, begin:end] = torch.tensor(content)
        mask[row, begin:end] = 1
        positions[row, begin:end] = torch.arange(len(content))
        positions[row, end:] = len(content) - 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, column


def laid_out(
    model: Model, tokens: Sequence[Sequence[int]], lookups: Sequence[int]
) -> tuple[dict[str, Tensor], Tensor]:
    """Return rows that the model reads as one batch, and the column (B,) of one token of each.

    In a causal decoder that is one column for all rows (`aligned`), so that the columns before it
    need not run again. An encoder, which may count positions from a row's first column, has its
    rows padded on the right.

    Args:
        model: a causal decoder, or an encoder-decoder, whose encoder reads the rows.
        tokens: token ids of each row.
        lookups: index of one token per row.
    """
    if model.anatomy.kind == "decoder":
        inputs, column = aligned(tokens, lookups, padding_id(model.tokenizer))
        return inputs, torch.full((len(tokens),), column)
    return pad(model.tokenizer, tokens).inputs(positions=False), torch.tensor(lookups)


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
