"""What every delta kind is: data that can be stored, checked, and folded or attached."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model

Undo = Callable[[], None]


class Delta(ABC):
    """The data of a change. Immutable once built: composing never alters it.

    A *weight* kind implements `fold`: it adds all its active edits to a parameter.
    A *runtime* kind implements `attach`: it hangs all its active edits on the live module and
    returns the undo. `runtime` says which. A kind computes its effect from the stored data alone,
    deterministically, so that taking an edit out is folding (attaching) the others again.
    """

    kind: ClassVar[str]
    runtime: ClassVar[bool] = False
    pointwise: ClassVar[bool] = False
    """Of a runtime kind: what it does to a token depends on that token's own states alone, so the
    keys and values of a common beginning may be used again."""

    # -- storage -------------------------------------------------------------------------------

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, contiguous, ready for safetensors."""

    def metadata(self) -> dict[str, Any]:
        """Return everything else that `from_parts` needs, as plain JSON."""
        return {}

    @classmethod
    @abstractmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        """Rebuild from stored parts; raise `IntegrityError` for anything that does not fit."""

    # -- what it belongs to ----------------------------------------------------------------------

    @property
    @abstractmethod
    def parameters(self) -> tuple[str, ...]:
        """Names of the base parameters this change refers to: the fingerprint covers them."""

    def check(self, model: Model) -> None:
        """Raise `IntegrityError` unless this delta is finite and fits the model's shapes."""
        for name, tensor in self.tensors().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise IntegrityError(
                    f"The {self.kind} delta's tensor {name!r} has NaN or infinite entries."
                )
        for name in self.parameters:
            if name not in model.parameters:
                raise IntegrityError(
                    f"The {self.kind} delta changes parameter {name!r}, which this model "
                    f"({model.name}) does not have."
                )

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data that storing this delta takes."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def norms(self, model: Model) -> dict[str, float]:
        """Return the Frobenius norm of the change per parameter, relative to the base weight.

        Runtime kinds change no parameter and return an empty dict.
        """
        del model
        return {}

    # -- effect ----------------------------------------------------------------------------------

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        """Add all `deltas` (ledger order) to `accumulator`, in place.

        `accumulator` starts as the pristine parameter `name` in fp32 or wider (plus what other
        kinds added before); it is cast once, after the last kind. Weight kinds only.
        """
        raise NotImplementedError(f"{cls.__name__} is a runtime kind")

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor] | None:
        """Return what folding all `deltas` adds to parameter `name` as factors, where it has any.

        U (d_out, r) and V (d_in, r) with U Vᵀ the change in the orientation (d_out, d_in), exact
        up to rounding. They let edits run beside the weights and leave as LoRA adapters. None
        (the default): the change is only known whole.
        """
        del name, deltas
        return None

    @classmethod
    def attach(cls, model: Model, deltas: Sequence[tuple[str, Self]]) -> Undo:
        """Hang all `deltas`, as (edit id, delta) in ledger order, on the live module.

        Return the undo, which must leave the module object exactly as it was found: same
        submodule objects, parameters, hooks, flags and attributes. Runtime kinds only.
        """
        raise NotImplementedError(f"{cls.__name__} is a weight kind")


def require(condition: bool, message: str) -> None:
    """Raise `IntegrityError` with `message` unless `condition` holds."""
    if not condition:
        raise IntegrityError(message)
