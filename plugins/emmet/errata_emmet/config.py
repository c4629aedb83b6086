"""EMMET's hyper-parameters."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from errata.kit.closed_form.config import ClosedFormConfig


class EmmetConfig(ClosedFormConfig):
    """Hyper-parameters of EMMET; the defaults are the authors' for GPT-2 XL, the layer excepted.

    For a model without a preset the one edited layer is a tenth of the way up.
    """

    default_depth: ClassVar[int] = 1
    resolves: ClassVar[frozenset[str]] = frozenset({"second_moment_weight", "ridge", "tokens"})

    second_moment_weight: float = Field(
        default=1000.0, gt=0, description="λ, the factor of C; without a ridge it changes nothing"
    )
    ridge: float = Field(
        default=0.1,
        ge=0,
        description="ε, added to Kᵀ (λC)⁻¹ K so that it can be inverted; with it EMMET is MEMIT at "
        "λε. 0 meets every constraint exactly",
    )

    @property
    def slack(self) -> float:
        """λε: Kᵀ (λC)⁻¹ K + εI is Kᵀ C⁻¹ K + λε I up to the factor λ, which cancels in Δ."""
        return self.second_moment_weight * self.ridge
