"""What forward calls are about: where prompts end, which edits a row takes, what a call covers.

Everything here belongs to a call, and so to the thread that makes it, never to the model.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from errata.model.prompts import IGNORED

if TYPE_CHECKING:
    from torch import Tensor, nn


# What attention is told where texts lie behind one another in a row, or in pages.
_PACKED = ("cu_seq_lens_q", "block_table")


class Call(threading.local):
    """The state of the calls that are running; every thread sees its own.

    Attributes:
        prompt_ends: for each row the column of the last prompt token (absolute: columns already in
            a KV cache count), or None when nobody said.
        row_edits: for each row the ids of the edits that it takes, or None for all active ones.
        routes: what a router (`errata.model.routing`) holds while a call runs, by router.
    """

    prompt_ends: list[int] | None = None
    row_edits: list[frozenset[str]] | None = None

    def __init__(self) -> None:
        self.routes: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


class Decided(NamedTuple):
    """What was decided for the rows of a batch.

    Attributes:
        ends: per row the absolute column of the last prompt token.
        decisions: per row what was decided; None for nothing, or not yet.
    """

    ends: list[int]
    decisions: list[Any]

    def repeated(self, rows: int) -> Decided | None:
        """Return the same for k times as many rows (beams); None if `rows` does not fit."""
        if not self.ends or rows % len(self.ends):
            return None
        each = rows // len(self.ends)
        return Decided(
            [end for end in self.ends for _ in range(each)],
            [decision for decision in self.decisions for _ in range(each)],
        )


@dataclass
class StackCall:
    """What one running call of a transformer stack covers.

    Attributes:
        rows: batch size, 0 where it is not known.
        tokens: columns that it runs, 0 where it is not known.
        past: columns before them, in a KV cache.
        mask: (B, T or more) which columns are real, or None.
        cache: the KV cache, or None.
        packed: several texts lie behind one another in a row.
        decided: what was decided about its rows so far, by the module that decides.
    """

    rows: int = 0
    tokens: int = 0
    past: int = 0
    mask: Tensor | None = None
    cache: Any = None
    packed: bool = False
    decided: dict[str, Decided] = field(default_factory=dict)

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> StackCall:
        """Read from a forward call's arguments by name what it covers."""
        mask = given.get("attention_mask")
        if not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
            mask = None  # a mask that is made already (4-D) does not say which tokens are padding
        tokens = (given.get("input_ids"), given.get("inputs_embeds"))
        shape = next((t.shape[:2] for t in tokens if isinstance(t, torch.Tensor)), (0, 0))
        rows = shape[0] or (0 if mask is None else mask.shape[0])
        cache = given.get("past_key_values")
        packed = any(given.get(name) is not None for name in _PACKED)
        return cls(rows, shape[1], _past_length(given), mask, cache, packed)

    def last_real(self, rows: int, tokens: int) -> list[int]:
        """Return the last real column per row, for a call with nothing before it."""
        mask = self.mask
        if mask is None or mask.shape[0] != rows or mask.shape[1] < tokens:
            return [tokens - 1] * rows
        return last_real(mask[:, :tokens])


def arguments_by_name(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return a forward call's arguments by name; `signature` is that of the unbound forward."""
    return {**dict(zip(list(signature.parameters)[1:], args, strict=False)), **kwargs}


def last_real(mask: Tensor) -> list[int]:
    """Return the column of the last real token per row of an attention mask (B, T)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    ends: list[int] = (columns * (mask != 0)).amax(dim=1).tolist()
    return ends


def stack_of(root: nn.Module, path: str) -> str:
    """Return the path of the innermost Hugging Face model around a module.

    That is the stack whose forward gets the attention mask and the cache (`GPT2Model`,
    `T5Stack`, `BertModel`), whoever calls it: the model with its head, or `generate`.
    """
    from transformers import PreTrainedModel

    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        candidate = ".".join(parts[:length])
        if isinstance(root.get_submodule(candidate), PreTrainedModel):
            return candidate
    return ""


def ends_given_to_generate(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[int]:
    """Return the column of the last real token per row of what `generate` was given."""
    names = (kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    tokens = next((t for t in (*args[:1], *names) if isinstance(t, torch.Tensor)), None)
    if tokens is None:
        return [0]  # generation from nothing starts with one token
    mask = kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.ndim == 2 and mask.shape == tokens.shape[:2]:
        return last_real(mask)
    return [tokens.shape[1] - 1] * tokens.shape[0]


def ends_before_labels(given: Mapping[str, Any]) -> list[int | None] | None:
    """Return, per row, the column before its first label, where a decoder is called with labels.

    None for a row whose labels begin with its text: no prompt was set apart in it.
    """
    labels, mask = given.get("labels"), given.get("attention_mask")
    if not (isinstance(labels, torch.Tensor) and labels.ndim == 2):
        return None
    first = (labels != IGNORED).int().argmax(dim=1) - 1  # −1 as well where no label is
    ends: list[int | None] = [end if end >= 0 else None for end in first.tolist()]
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        real = mask[torch.arange(len(mask)), first.clamp_min(0)].tolist()
        ends = [end if is_real else None for end, is_real in zip(ends, real, strict=True)]
    return ends


def _past_length(given: Mapping[str, Any]) -> int:
    positions = given.get("cache_position")
    if isinstance(positions, torch.Tensor) and positions.numel():
        return int(positions.flatten()[0])
    cache = given.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return int(cache[0][0].shape[-2]) if cache and cache[0] is not None else 0
