"""Delta kinds: the data of a change, how it is stored, and how it gets onto a model."""

from errata.edits.delta.adapter import AdapterDelta
from errata.edits.delta.base import Delta, Undo
from errata.edits.delta.codebook import CodebookDelta
from errata.edits.delta.dense import DenseDelta
from errata.edits.delta.key_value import KeyValueDelta
from errata.edits.delta.key_values import KeyValues
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.delta.neurons import NeuronsDelta
from errata.edits.delta.prompt import PromptDelta
from errata.edits.delta.sparse_rows import Rows, SparseRowsDelta

__all__ = [
    "AdapterDelta",
    "CodebookDelta",
    "Delta",
    "DenseDelta",
    "Factor",
    "KeyValueDelta",
    "KeyValues",
    "LowRankDelta",
    "NeuronsDelta",
    "PromptDelta",
    "Rows",
    "SparseRowsDelta",
    "Undo",
]
