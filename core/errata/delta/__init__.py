"""Delta kinds: the data of a change, how it is stored, and how it gets onto a model."""

from errata.delta.base import Delta, Undo
from errata.delta.dense import DenseDelta
from errata.delta.low_rank import Factor, LowRankDelta

__all__ = ["Delta", "DenseDelta", "Factor", "LowRankDelta", "Undo"]
