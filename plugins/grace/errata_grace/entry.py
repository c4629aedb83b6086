"""Entries of a codebook: a key, the value that replaces what it hits, and how they are filed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

from errata.edits.delta.base import require
from errata.model.prompts import IGNORED

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

if TYPE_CHECKING:
    from torch import Tensor

Distance = Literal["euclidean", "cosine"]
Replacement = Literal["replace_last", "replace_prompt", "replace_all"]
LabelMatch = Literal["exact", "upstream"]
IndexKind = Literal["auto", "exact", "faiss"]


class BookName(NamedTuple):
    """What tells codebooks apart: entries that differ in it never meet."""

    module: str
    distance: Distance
    replacement: Replacement


@dataclass(frozen=True)
class CodebookSettings:
    """How an entry is filed and looked up.

    Attributes:
        distance: "euclidean", or "cosine" for 1 − cos.
        replacement: which outputs a hit replaces: "replace_last" the key position,
            "replace_prompt" every position before it (and not itself: as published),
            "replace_all" every position of the row.
        eps: radius of a new key.
        label_match: when two labels count as the same: "exact" compares the token ids,
            "upstream" the mean of all label ids, ignored positions (−100) included, as the
            published code does (different answers can then pass for the same).
        split_margin: what a split leaves between the two balls.
        index: "exact" compares with every key, "faiss" asks an approximate index, "auto" does
            the second from `faiss_from` entries on. Where faiss is not installed every key is
            compared. The entry made last decides for its codebook.
        faiss_from: size of a large codebook.
    """

    distance: Distance = "euclidean"
    replacement: Replacement = "replace_prompt"
    eps: float = 1.0
    label_match: LabelMatch = "exact"
    split_margin: float = 1e-5
    index: IndexKind = "auto"
    faiss_from: int = 20_000

    def __post_init__(self) -> None:
        for name, allowed in (
            ("distance", get_args(Distance)),
            ("replacement", get_args(Replacement)),
            ("label_match", get_args(LabelMatch)),
            ("index", get_args(IndexKind)),
        ):
            value = getattr(self, name)
            require(
                value in allowed,
                f"A codebook's {name} is {value!r}; allowed are {', '.join(allowed)}.",
            )
        for name in ("eps", "split_margin"):
            value = getattr(self, name)
            require(
                isinstance(value, (int, float)) and 0 <= value < float("inf"),
                f"A codebook's {name} is {value!r}; it must be a number, not negative.",
            )
        require(
            isinstance(self.faiss_from, int) and self.faiss_from > 0,
            f"A codebook's faiss_from is {self.faiss_from!r}; it must be a positive integer.",
        )


class CodebookEntry:
    """One edit's entry: where it looked, what it wrote, under which label.

    Args:
        module: path of the module whose output is replaced, for example
            "transformer.h.35.mlp.c_fc".
        key: (d_in) the module's input at the last prompt token.
        value: (d_out) what the edit trained; None for a void entry, which records that the
            model already gave the target and changes nothing.
        label: (n) int64, token ids of the target (one class index for a classifier).
        settings: how it is filed.
        ignored: how many positions of the training sequence carry no label; `label_match:
            upstream` counts them.
        label_text: the label for people.
        notes: what the computation saw (losses, operation); plain JSON, changes nothing.
    """

    def __init__(
        self,
        module: str,
        key: Tensor,
        value: Tensor | None,
        label: Tensor,
        settings: CodebookSettings | None = None,
        *,
        ignored: int = 0,
        label_text: str = "",
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        require(bool(module), "A codebook entry needs the path of a module.")
        require(key.ndim == 1, f"A codebook key has shape {tuple(key.shape)}; it must be (d_in,).")
        require(value is None or value.ndim == 1, "A codebook value must have the shape (d_out,).")
        require(
            all(tensor is None or tensor.is_floating_point() for tensor in (key, value)),
            "A codebook key and value must be floating point.",
        )
        require(
            label.ndim == 1 and label.numel() > 0 and label.dtype in WHOLE,
            "A codebook label must be a non-empty list of token ids.",
        )
        require(ignored >= 0, f"A codebook label cannot have {ignored} ignored positions.")
        self.module = module
        self.key = key.detach().to("cpu", torch.float32).contiguous()
        self.value = None if value is None else value.detach().to("cpu", torch.float32).contiguous()
        self.label = label.detach().to("cpu", torch.int64).contiguous()
        self.settings = settings or CodebookSettings()
        self.ignored = ignored
        self.label_text = label_text
        self.notes = dict(notes or {})

    def __repr__(self) -> str:
        what = "void" if self.value is None else f"{self.key.numel()} → {self.value.numel()}"
        return f"{type(self).__name__}({self.module}, {what}, {self.label_text!r})"

    @property
    def book(self) -> BookName:
        """The codebook that this entry belongs to."""
        return BookName(self.module, self.settings.distance, self.settings.replacement)

    def same_label(self, other: CodebookEntry) -> bool:
        """Say whether two entries stand for the same answer, by this entry's rule."""
        if self.settings.label_match == "exact":
            return torch.equal(self.label, other.label)
        return self._mean_label() == other._mean_label()

    def _mean_label(self) -> float:
        """The published identity of a label: the fp32 mean of its ids, −100 included."""
        padding = torch.full((self.ignored,), IGNORED, dtype=torch.int64)
        return float(torch.cat([padding, self.label]).float().mean())
