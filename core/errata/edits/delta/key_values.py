"""Keys and the residuals wanted at them: what one edit asks of one parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta.joint_solve import KeyRows, floored
from errata.edits.delta.low_rank import Factor

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("k", "w", "r", "s")


@dataclass(frozen=True, eq=False)
class KeyValues:
    """What one edit asks of one parameter: n keys and their residuals.

    Attributes:
        k: (n, D) keys.
        w: (n, D) whitened keys M k.
        r: (n, d) residuals wanted on top of what the base gives there.
        s: (n,) slack of each: how much a miss is tolerated (MEMIT's λ; 0 is a constraint).
        transposed: the parameter is stored as (D, d), as GPT-2's Conv1D does.
        metric: what M is, `Metric.reference`; edits with one `digest` are solved together.
    """

    k: Tensor
    w: Tensor
    r: Tensor
    s: Tensor
    transposed: bool = False
    metric: Mapping[str, Any] = field(default_factory=lambda: {"digest": "identity"})

    @property
    def group(self) -> str:
        """The digest of the metric."""
        return str(self.metric["digest"])

    @cached_property
    def norms(self) -> Tensor:
        """√(kᵀ M k) of each key, (n,) fp32."""
        return (self.k.double() * self.w.double()).sum(1).sqrt().float()

    @cached_property
    def written(self) -> Tensor:
        """Keys at which something is to change, (n,) bool; at the others what they gave stays."""
        return (self.r != 0).any(1)

    def rows(self, device: torch.device | str = "cpu") -> KeyRows:
        """Return the tensors in fp64 on a device."""
        return KeyRows(*(getattr(self, part).to(device, torch.float64) for part in PARTS))

    def alone(self) -> Factor:
        """Return the change that these keys make by themselves, (R (S + Kᵀ M K)⁻¹) (M K)ᵀ."""
        k, w, r, s = self.rows()
        gram = k @ w.T
        system = torch.diag(floored(s, gram.diagonal())) + 0.5 * (gram + gram.T)
        return Factor(torch.linalg.solve(system, r).T.contiguous(), w.T.contiguous())
