"""Rows laid out as a batch, padded so that each computes what it computes by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from errata.model.forward.inputs import inputs_of, takes_positions
from errata.model.forward.resume import TOLERANCE
from errata.model.prompts import pad, padding_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from errata.model.model import Model

_TRIED = "The capital of France is Paris, and that of Italy is Rome."
_LENGTH = 8  # tokens of it, and of the padding before them


def pads_left(model: Model) -> bool:
    """Say whether a row may have padding before it, and still give what it gives by itself.

    That holds in most causal decoders, but not where positions are counted from the first column
    and cannot be given (BART), nor where a recurrence runs over the padding (RecurrentGemma). It
    is tried out on one short text, once per model.
    """
    if model.task != "causal" or model.anatomy.kind != "decoder":
        return model.anatomy.kind == "decoder"
    return model.remembered("pads left", lambda: _same_behind_padding(model))


@torch.no_grad()
def _same_behind_padding(model: Model) -> bool:
    most = min(_LENGTH, (model.anatomy.context or 2 * _LENGTH) // 2)
    ids = model.tokenizer(_TRIED)["input_ids"][:most]
    found = []
    for rows in ([ids], [ids, [*ids, *ids]]):
        batch = pad(model.tokenizer, rows, "left", model.device)
        inputs = inputs_of(model, batch.inputs(positions=takes_positions(model)))
        with model.prompts([batch.column(row, -1) for row in range(len(rows))]):
            logits = model.module(**inputs, use_cache=False).logits
        found.append(logits[0, -len(ids) :].float())
    alone, behind = found
    # Half of what is rounding elsewhere: a recurrence may differ by hardly more in bf16.
    limit = TOLERANCE.get(model.dtype, 1e-4) / 2 * alone.abs().max()
    return bool((behind - alone).abs().max() <= limit)  # not where padding makes NaN


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
    need not run again. Where padding before a row may change it (`pads_left`), as in an encoder
    that counts positions from the first column, rows are padded on the right.

    Args:
        model: a causal decoder, or an encoder-decoder, whose encoder reads the rows.
        tokens: token ids of each row.
        lookups: index of one token per row.
    """
    if pads_left(model):
        inputs, column = aligned(tokens, lookups, padding_id(model.tokenizer))
        return inputs, torch.full((len(tokens),), column)
    return pad(model.tokenizer, tokens).inputs(positions=False), torch.tensor(lookups)
