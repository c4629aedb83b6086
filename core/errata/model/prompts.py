"""Padded batches of token ids, and prompts with their targets, ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from errata.errors import RequestError, UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

SIDES = ("right", "left")
IGNORED = -100
"""Label of a position that nothing is known of, as in torch and transformers."""


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


@dataclass(frozen=True, eq=False)
class PreparedPrompts:
    """Prompts with their targets as one batch, ready to run for a model's task.

    B rows, n target tokens in all rows together, row after row. How each task lays them out:

    * causal: prompt and target in one row; a token is predicted at the column before its own;
    * masked: a mask in the place of each target token, predicted there;
    * seq2seq: the prompt in the encoder, the target in the decoder, each token predicted at its
      label's column;
    * classify: the prompt alone; the one label of a row is a class, and its column means nothing.

    Attributes:
        inputs: keyword tensors of the forward, each (B, T), padded on the right.
        rows: (n,) row of each target token.
        columns: (n,) column whose logits predict it (the decoder's, where there are two).
        labels: (n,) its id, or the class; `IGNORED` where no target was given.
        counts: number of target tokens of each row.
        ends: column of each row's last prompt token (the encoder's, where there are two).
        ahead: how many columns a target token stands behind the one that predicts it: 1 in a
            decoder, else 0.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    columns: Tensor
    labels: Tensor
    counts: tuple[int, ...]
    ends: list[int]
    ahead: int = 0

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def input_ids(self) -> Tensor:
        """(B, T) tokens (the encoder's, where there are two sequences)."""
        return self.inputs["input_ids"]

    @property
    def attention_mask(self) -> Tensor:
        """(B, T), 1 for real tokens."""
        return self.inputs["attention_mask"]

    @property
    def target_spans(self) -> list[tuple[int, int]]:
        """(start, end) columns of each target (in the decoder's labels, where there are two)."""
        spans = (places for places, _ in self.targets())
        return [(places[0] + self.ahead, places[-1] + 1 + self.ahead) for places in spans]

    def targets(self) -> list[tuple[list[int], list[int]]]:
        """Return (columns, labels) of each row."""
        columns, labels = self.columns.tolist(), self.labels.tolist()
        found, at = [], 0
        for count in self.counts:
            found.append((columns[at : at + count], labels[at : at + count]))
            at += count
        return found

    def tokens(self, row: int) -> list[int]:
        """Return the real tokens of a row (the encoder's, where there are two sequences)."""
        ids: list[int] = self.input_ids[row][self.attention_mask[row].bool()].tolist()
        return ids

    def reading(self, rows: Tensor, columns: Tensor, labels: Tensor) -> PreparedPrompts:
        """Return the same rows with other positions read in them, sorted row by row.

        Args:
            rows: (m,) row of each position; every row has one at least.
            columns: (m,) its column.
            labels: (m,) what is predicted there.
        """
        order = rows.argsort(stable=True)
        counts = torch.bincount(rows, minlength=len(self)).tolist()
        return replace(
            self,
            rows=rows[order],
            columns=columns[order],
            labels=labels[order],
            counts=tuple(counts),
        )


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
