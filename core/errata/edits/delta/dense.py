"""Dense deltas: the whole difference of a parameter, for fine-tuning and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from errata.common.floats import frobenius
from errata.edits.delta.base import Delta, relative_norms, require

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


class DenseDelta(Delta):
    """Differences by parameter name, in the parameter's stored orientation; folds as a sum."""

    kind: ClassVar[str] = "dense"

    def __init__(self, differences: Mapping[str, Tensor]) -> None:
        require(bool(differences), "A dense delta needs at least one parameter.")
        for name, tensor in differences.items():
            require(
                tensor.is_floating_point(), f"The difference of {name!r} is not floating point."
            )
        self.differences = dict(differences)

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self.differences.items()}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        del metadata
        return cls(tensors)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.differences)

    def check(self, model: Model) -> None:
        super().check(model)
        for name, tensor in self.differences.items():
            expected = tuple(model.parameter(name).shape)
            require(
                tuple(tensor.shape) == expected,
                f"A dense delta for {name!r} has shape {tuple(tensor.shape)}; "
                f"this model's is {expected}.",
            )

    def norms(self, model: Model) -> dict[str, float]:
        norms = {name: frobenius(tensor) for name, tensor in self.differences.items()}
        return relative_norms(model, norms)

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        for delta in deltas:
            accumulator.add_(delta.differences[name].to(accumulator))
