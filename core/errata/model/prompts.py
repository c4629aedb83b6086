"""Padded batches of token ids, and which logits predict what in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from errata.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

SIDES = ("right", "left")
IGNORED = -100
"""Label of positions that count in no loss, as in torch and transformers."""


class TokenError(RequestError):
    """A subject or target that is in no token of its text."""


@dataclass(frozen=True)
class Batch:
    """Tokenised texts of one padded batch; B rows, T columns, all int64.

    Attributes:
        input_ids: (B, T).
        attention_mask: (B, T), 1 for real tokens.
        position_ids: (B, T), counting real tokens from 0; padding has 0 (left) or goes on as
            the last one (right).
        lengths: real tokens per row, with BOS and the like.
        padding_side: where the padding is.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    lengths: list[int]
    padding_side: str = "right"

    def __len__(self) -> int:
        return len(self.lengths)

    def column(self, row: int, index: int) -> int:
        """Return the column of a token, given its index in the unpadded row.

        A negative index counts from the end of the row's text.
        """
        length = self.lengths[row]
        if not -length <= index < length:
            raise TokenError(f"Token {index} is out of range: row {row} has {length} tokens.")
        index %= length
        width = self.input_ids.shape[1]
        return index if self.padding_side == "right" else index + width - length

    def inputs(self, positions: bool = True) -> dict[str, Tensor]:
        """Return the keyword arguments of a model's forward.

        Args:
            positions: pass position_ids; `Anatomy.spec.position_ids` says which models take them.
        """
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if positions:
            inputs["position_ids"] = self.position_ids
        return inputs

    def to(self, device: torch.device | str) -> Self:
        """Return the batch on a device."""
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            position_ids=self.position_ids.to(device),
        )


@dataclass(frozen=True)
class TargetBatch(Batch):
    """Prompts with their targets, for a decoder.

    Attributes:
        target_spans: (start, end) of each target, in indices of the unpadded row.
        prompt_lengths: tokens before the target, BOS included; equal to each start.
        target_ids: the target's tokens.
    """

    target_spans: list[tuple[int, int]] = field(default_factory=list)
    target_ids: list[list[int]] = field(default_factory=list)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens before each target."""
        return [start for start, _ in self.target_spans]

    def logit_columns(self, row: int) -> list[int]:
        """Return the columns whose logits predict the target's tokens: each one's predecessor."""
        start, end = self.target_spans[row]
        return [self.column(row, index - 1) for index in range(start, end)]

    def labels(self) -> Tensor:
        """Return (B, T) labels, not shifted: target tokens, and -100 elsewhere."""
        labels = torch.full_like(self.input_ids, IGNORED)
        for row, (start, end) in enumerate(self.target_spans):
            columns = [self.column(row, index) for index in range(start, end)]
            labels[row, columns] = self.input_ids.new_tensor(self.target_ids[row])
        return labels


@dataclass(frozen=True)
class MaskedBatch(TargetBatch):
    """Prompts for an encoder, with one mask token in the place of each target token."""

    def logit_columns(self, row: int) -> list[int]:
        """Return the columns whose logits predict the target's tokens: the masks' own."""
        start, end = self.target_spans[row]
        return [self.column(row, index) for index in range(start, end)]


@dataclass(frozen=True)
class Seq2SeqBatch:
    """Prompts for an encoder and targets for a decoder, both padded on the right.

    Attributes:
        source: the prompts.
        decoder_input_ids: (B, T): the start token, then the labels but the last.
        decoder_attention_mask: (B, T).
        labels: (B, T): the target and its closing token, -100 elsewhere. The logits at a column
            predict the label at the same column.
        target_spans: (start, end) of each target in the labels, without what closes it.
        target_ids: the target's tokens.
    """

    source: Batch
    decoder_input_ids: Tensor
    decoder_attention_mask: Tensor
    labels: Tensor
    target_spans: list[tuple[int, int]]
    target_ids: list[list[int]]

    def __len__(self) -> int:
        return len(self.target_spans)

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of a model's forward."""
        return {
            **self.source.inputs(positions=False),
            "decoder_input_ids": self.decoder_input_ids,
            "decoder_attention_mask": self.decoder_attention_mask,
        }

    def logit_columns(self, row: int) -> list[int]:
        """Return the decoder columns whose logits predict the target's tokens."""
        return list(range(*self.target_spans[row]))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills batches up. Any does: padding is masked everywhere."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token_id, int):
            return token_id
    return 0


def pad(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[Sequence[int]],
    padding_side: str = "right",
    device: torch.device | str | None = None,
) -> Batch:
    """Pad rows of token ids to one batch."""
    if padding_side not in SIDES:
        raise UnknownNameError("padding side", padding_side, SIDES)
    lengths = [len(row) for row in ids]
    width = max(lengths)
    input_ids = torch.full((len(ids), width), padding_id(tokenizer), dtype=torch.int64)
    mask = torch.zeros((len(ids), width), dtype=torch.int64)
    for index, row in enumerate(ids):
        begin = 0 if padding_side == "right" else width - len(row)
        input_ids[index, begin : begin + len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, begin : begin + len(row)] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(input_ids.to(device), mask.to(device), positions.to(device), lengths, padding_side)
