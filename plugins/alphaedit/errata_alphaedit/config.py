"""AlphaEdit's hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from errata.kit.closed_form.config import ClosedFormConfig


class AlphaEditConfig(ClosedFormConfig):
    """Hyper-parameters of AlphaEdit; the defaults are the paper's for GPT-2 XL, but for two.

    Layers are those of `ClosedFormConfig`. And a share of the directions counts as null: the
    published threshold, 0.02, is absolute, and means something else for every model (it makes 76 to
    86 % of SmolLM2's directions null, and 35 to 67 % of Gemma 3 270M's).
    """

    resolves: ClassVar[frozenset[str]] = frozenset({"threshold", "fraction", "l2", "tokens"})
    derived: ClassVar[Mapping[str, str]] = {"fraction": "threshold"}

    fraction: float | None = Field(
        default=0.8,
        gt=0,
        lt=1,
        description="Share of all directions that counts as null, those of the smallest "
        "eigenvalues. Ignored if only `threshold` is given; if both are, `fraction` wins",
    )
    threshold: float | None = Field(
        default=None,
        gt=0,
        description="Eigenvalues of C below this count as null, instead of a fraction (published: "
        "0.02)",
    )
    l2: float = Field(default=10.0, ge=0, description="L2, the weight of a small change")

    @model_validator(mode="before")
    @classmethod
    def _threshold_instead(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("threshold") is not None:
            return {"fraction": None, **data}
        return data

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.threshold is None and self.fraction is None:
            raise ValueError(
                "threshold and fraction are both null (without a threshold the fraction decides): "
                "give one of them"
            )
        return self
