"""AlphaEdit's hyper-parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field, model_validator
from typing_extensions import Self

from errata.kit.closed_form.config import ClosedFormConfig


class AlphaEditConfig(ClosedFormConfig):
    """Hyper-parameters of AlphaEdit; the defaults are the paper's for GPT-2 XL, layers excepted."""

    resolves: ClassVar[frozenset[str]] = frozenset({"threshold", "fraction", "l2", "tokens"})
    derived: ClassVar[Mapping[str, str]] = {"fraction": "threshold"}

    threshold: float | None = Field(
        default=2e-2,
        gt=0,
        description="Eigenvalues of C below this count as null; absolute, so it means something "
        "else for every model",
    )
    fraction: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Share of all directions that counts as null, the smallest; in place of the "
        "threshold. A threshold that is given sets aside the fraction of a preset or a recorded "
        "edit; given together, this one counts",
    )
    l2: float = Field(default=10.0, ge=0, description="L2, the weight of a small change")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if self.threshold is None and self.fraction is None:
            raise ValueError(
                "threshold and fraction are both none (a threshold that is given, none too, sets "
                "aside a preset's fraction): give one of them"
            )
        return self
