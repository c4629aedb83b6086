"""The side memories that a list of edits makes: sums in shards, full shards merged by TIES.

All of it follows from the edits' stored differences. Taking an edit out replays its shard: the
differences of the others are added up again, in order. They are not trained anew; edits
that were trained on top of the removed one are stale.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Settings(NamedTuple):
    """What edits of one set of side memories have in common.

    Attributes:
        module: path of the down projection W.
        activation: φ, as transformers names it.
        ratio: share of an edit's distance at which a shard claims a prompt.
        save_every: edits in one shard.
        merge_every: edits after which full shards are merged.
        density: share of the entries that TIES keeps.
        clip: largest change of an entry.
    """

    module: str
    activation: str
    ratio: float
    save_every: int
    merge_every: int
    density: float
    clip: float


class Write(Protocol):
    """One edit, as it is written into a shard.

    Attributes:
        number: how many were there before it.
        distance: Δ of its own prompts after it was made.
    """

    number: int
    distance: float

    def add_to(self, total: Tensor) -> None:
        """Add the edit's difference to a shard's (d, D), in place."""


class SideMemory(NamedTuple):
    """One shard, or several merged ones.

    Attributes:
        difference: (d, D) what it adds to W.
        distance: least Δ among its edits.
    """

    difference: Tensor
    distance: float


class Shards:
    """The shards of one set of edits; each further edit costs one addition."""

    def __init__(self, settings: Settings, shape: tuple[int, int]) -> None:
        self.settings, self._shape = settings, shape
        # Weak references: an edit that was taken out need not stay in memory.
        self._sums: dict[int, tuple[list[weakref.ref[Write]], Tensor]] = {}
        self._lock = threading.Lock()

    def shard(self, writes: Sequence[Write], index: int) -> Tensor:
        """Return (d, D), the sum of a shard's differences in order, each entry within the clip."""
        own = [w for w in writes if w.number // self.settings.save_every == index]
        with self._lock:
            known, total = self._sums.get(index, ([], torch.zeros(self._shape)))
            same = [summed() is write for summed, write in zip(known, own, strict=False)]
            if len(known) > len(own) or not all(same):
                known, total = [], torch.zeros(self._shape)
            for write in own[len(known) :]:
                write.add_to(total)
            self._sums[index] = ([weakref.ref(write) for write in own], total)
            return total.clamp(-self.settings.clip, self.settings.clip)

    def memories(self, writes: Sequence[Write]) -> list[SideMemory]:
        """Return the side memories of some edits, in the order of their shards."""
        save, merge = self.settings.save_every, self.settings.merge_every
        complete = (max(write.number for write in writes) + 1) // merge  # groups that are full
        groups: dict[tuple[int, int], set[int]] = {}
        for write in writes:
            group = write.number // merge
            index = write.number // save
            # A group that is not full yet stands as its single shards.
            groups.setdefault((group, -1 if group < complete else index), set()).add(index)
        found = []
        for indices in map(sorted, groups.values()):
            distances = [w.distance for w in writes if w.number // save in indices]
            parts = [self.shard(writes, index) for index in indices]
            joined = parts[0] if len(parts) == 1 else ties(parts, self.settings.density)
            found.append(SideMemory(joined, min(distances)))
        return found


def ties(differences: Sequence[Tensor], density: float) -> Tensor:
    """Return differences merged by TIES (Yadav et al., NeurIPS 2023), all with the same weight.

    Of each the entries of largest magnitude are kept; per entry the sign of their sum is elected,
    and those that agree with it are averaged.
    """
    trimmed = []
    for difference in differences:
        count = difference.numel()
        kept = max(1, int(density * count))
        limit = difference.abs().flatten().kthvalue(count - kept + 1).values
        trimmed.append(torch.where(difference.abs() >= limit, difference, 0.0))
    stacked = torch.stack(trimmed)
    elected = stacked.sum(dim=0).sign()
    agreeing = (stacked.sign() == elected) & (stacked != 0)
    counts = agreeing.sum(dim=0).clamp_min(1)
    return torch.where(agreeing, stacked, 0.0).sum(dim=0) / counts


def moved(before: Tensor, after: Tensor, activation: object) -> Tensor:
    """Return ‖φ(after) − φ(before)‖₂ of each token, for outputs (…, t, d)."""
    assert callable(activation)
    distances: Tensor = (activation(after) - activation(before)).norm(dim=-1)
    return distances


def over_prompt(distances: Tensor) -> Tensor:
    """Return Δ of one prompt from its tokens' (t): the mean; of more than 100 the largest."""
    return distances.max() if len(distances) > 100 else distances.mean()
