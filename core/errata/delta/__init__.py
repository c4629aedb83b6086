"""Delta kinds: the data of a change, how it is stored, and how it gets onto a model."""

from errata.delta.adapter import AdapterDelta
from errata.delta.base import Delta, Undo
from errata.delta.codebook import CodebookDelta
from errata.delta.dense import DenseDelta
from errata.delta.low_rank import Factor, LowRankDelta

CORE_KINDS: tuple[type[Delta], ...] = (AdapterDelta, CodebookDelta, DenseDelta, LowRankDelta)

__all__ = [
    "CORE_KINDS",
    "AdapterDelta",
    "CodebookDelta",
    "Delta",
    "DenseDelta",
    "Factor",
    "LowRankDelta",
    "Undo",
]
