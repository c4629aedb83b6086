"""Delta kinds: the data of a change, how it is stored, and how it gets onto a model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.edits.delta.adapter import AdapterDelta
    from errata.edits.delta.base import Delta, Undo
    from errata.edits.delta.dense import DenseDelta
    from errata.edits.delta.key_value import KeyValueDelta
    from errata.edits.delta.key_values import KeyValues
    from errata.edits.delta.low_rank import Factor, LowRankDelta
    from errata.edits.delta.neurons import Neurons, NeuronsDelta
    from errata.edits.delta.sparse_rows import Rows, SparseRowsDelta

# PEP 562: an edit loads the kinds that it needs, not all of them.
_LAZY = {
    "AdapterDelta": "adapter", "Delta": "base", "DenseDelta": "dense", "Factor": "low_rank",
    "KeyValueDelta": "key_value", "KeyValues": "key_values", "LowRankDelta": "low_rank",
    "Neurons": "neurons", "NeuronsDelta": "neurons", "Rows": "sparse_rows",
    "SparseRowsDelta": "sparse_rows", "Undo": "base",
}  # fmt: skip

__all__ = [
    "AdapterDelta", "Delta", "DenseDelta", "Factor", "KeyValueDelta", "KeyValues", "LowRankDelta",
    "Neurons", "NeuronsDelta", "Rows", "SparseRowsDelta", "Undo",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
