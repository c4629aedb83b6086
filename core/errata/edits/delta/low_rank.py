"""Low-rank deltas: W ← W + U Vᵀ per parameter. ROME writes rank one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.common.floats import wide
from errata.edits.delta.base import Delta, by_parameter, relative_norms, require

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class Factor:
    """The change of one parameter, U Vᵀ in the orientation (d_out, d_in).

    Attributes:
        u: (d_out, r).
        v: (d_in, r).
        transposed: the parameter is stored as (d_in, d_out), as GPT-2's Conv1D does.
    """

    u: Tensor
    v: Tensor
    transposed: bool = False

    @property
    def rank(self) -> int:
        """Number of columns r."""
        return self.u.shape[1]

    def norm(self) -> float:
        """Frobenius norm of U Vᵀ, from the r × r Gram matrices."""
        u, v = self.u.double(), self.v.double()
        return float(((u.T @ u) * (v.T @ v)).sum().clamp_min(0).sqrt())


class LowRankDelta(Delta):
    """Factors per parameter name. Folds as base + U Vᵀ over all active edits at once."""

    kind: ClassVar[str] = "low_rank"

    def __init__(self, factors: Mapping[str, Factor]) -> None:
        require(bool(factors), "A low_rank delta needs at least one parameter.")
        for name, factor in factors.items():
            u, v = factor.u, factor.v
            require(
                u.ndim == 2 and v.ndim == 2 and u.shape[1] == v.shape[1] and u.shape[1] > 0,
                f"Factors of {name!r} have shapes {tuple(u.shape)} and {tuple(v.shape)}; "
                "they must be (d_out, r) and (d_in, r).",
            )
            require(
                u.is_floating_point() and v.is_floating_point(),
                f"Factors of {name!r} must be floating point.",
            )
        self.factors = dict(factors)

    def tensors(self) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            out[f"{name}:u"] = factor.u.contiguous()
            out[f"{name}:v"] = factor.v.contiguous()
        return out

    def metadata(self) -> dict[str, Any]:
        return {"transposed": {name: factor.transposed for name, factor in self.factors.items()}}

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        transposed: Any = metadata.get("transposed")
        held = by_parameter(cls.kind, tensors, transposed, ("u", "v"))
        return cls({name: Factor(u, v, bool(transposed[name])) for name, (u, v) in held.items()})

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.factors)

    def check(self, model: Model) -> None:
        super().check(model)
        for name, factor in self.factors.items():
            given = (factor.u.shape[0], factor.v.shape[0])
            expected = model.weight_shape(name, factor.transposed)
            require(
                given == expected,
                f"A low_rank delta for {name!r} has shape {given}; this model's is {expected}.",
            )

    def norms(self, model: Model) -> dict[str, float]:
        return relative_norms(model, {name: f.norm() for name, f in self.factors.items()})

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        u, v = (part.to(accumulator) for part in cls.joint_factors(name, deltas))
        if deltas[0].factors[name].transposed:
            u, v = v, u
        accumulator.addmm_(u, v.T)

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor]:
        own = [delta.factors[name] for delta in deltas]
        device = own[0].u.device
        u = torch.cat([wide(factor.u).to(device) for factor in own], dim=1)
        return u, torch.cat([wide(factor.v).to(device) for factor in own], dim=1)
