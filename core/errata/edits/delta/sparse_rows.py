"""Sparse differences: a few rows (or columns) of a parameter, for neurons and embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.common.floats import frobenius
from errata.edits.delta.base import Delta, by_parameter, relative_norms, require

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Rows:
    """The change of one parameter, as it is stored: some slices along one axis, zero elsewhere.

    Attributes:
        index: (n,) int64, strictly ascending: which slices change.
        values: (n, …) what is added to each; row i belongs to slice index[i]. A slice of a matrix
            is a row of it (axis 0) or a column (axis 1); of a vector, a number.
        axis: 0 or 1.
    """

    index: Tensor
    values: Tensor
    axis: int = 0

    @classmethod
    def of(cls, difference: Tensor, index: Tensor, axis: int = 0) -> Rows:
        """Return the named slices of a whole difference."""
        index = index.sort().values
        values = difference.index_select(axis, index.to(difference.device)).movedim(axis, 0)
        return cls(index, values.contiguous(), axis)

    def add_to(self, target: Tensor) -> None:
        """Add the change to a tensor of the parameter's shape, in place."""
        index = self.index.to(target.device)
        target.index_add_(self.axis, index, self.values.to(target).movedim(0, self.axis))


class SparseRowsDelta(Delta):
    """Changed rows or columns by parameter name; folds as a sum."""

    kind: ClassVar[str] = "sparse_rows"

    def __init__(self, rows: Mapping[str, Rows]) -> None:
        require(bool(rows), "A sparse_rows delta needs at least one parameter.")
        for name, part in rows.items():
            index, values = part.index, part.values
            require(
                index.ndim == 1 and index.dtype == torch.int64 and values.is_floating_point(),
                f"The changed rows of {name!r} need an index of whole numbers (int64) and floating "
                f"point values, not {tuple(index.shape)} {index.dtype} and {values.dtype}.",
            )
            require(
                values.ndim in (1, 2) and values.shape[0] == index.shape[0] > 0,
                f"The changed rows of {name!r} have {index.shape[0]} numbers and values of shape "
                f"{tuple(values.shape)}: each row needs its values, and there must be one.",
            )
            require(
                type(part.axis) is int and 0 <= part.axis < values.ndim,
                f"The changed rows of {name!r} lie along axis {part.axis!r}; a tensor with "
                f"{values.ndim} axes allows {', '.join(map(str, range(values.ndim)))}.",
            )
            ascending = bool((index[1:] > index[:-1]).all()) and int(index[0]) >= 0
            require(ascending, f"The row numbers of {name!r} must be ascending and distinct.")
        self.rows = dict(rows)

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, part in self.rows.items():
            out[f"{name}:index"] = part.index.contiguous()
            out[f"{name}:values"] = part.values.contiguous()
        return out

    def metadata(self) -> dict[str, Any]:
        return {"axis": {name: part.axis for name, part in self.rows.items()}}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        axis: Any = metadata.get("axis")
        held = by_parameter(cls.kind, tensors, axis, ("index", "values"))
        return cls({name: Rows(i, v, axis[name]) for name, (i, v) in held.items()})

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.rows)

    def check(self, model: Model) -> None:
        super().check(model)
        for name, part in self.rows.items():
            shape = tuple(model.parameter(name).shape)
            width = tuple(part.values.shape[1:])
            fits = len(shape) == part.values.ndim and part.axis < len(shape)
            expected = tuple(n for axis, n in enumerate(shape) if axis != part.axis)
            require(
                fits and width == expected,
                f"A sparse_rows delta for {name!r} has rows of shape {width} along axis "
                f"{part.axis}; this model's parameter is {shape}.",
            )
            require(
                int(part.index[-1]) < shape[part.axis],
                f"A sparse_rows delta for {name!r} changes row {int(part.index[-1])} along axis "
                f"{part.axis}; this model's parameter is {shape}.",
            )

    def norms(self, model: Model) -> dict[str, float]:
        norms = {name: frobenius(part.values) for name, part in self.rows.items()}
        return relative_norms(model, norms)

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        for delta in deltas:
            delta.rows[name].add_to(accumulator)
