"""MEMIT's hyper-parameters."""

from __future__ import annotations

from pydantic import Field

from errata.kit.closed_form.config import ClosedFormConfig


class MemitConfig(ClosedFormConfig):
    """Hyper-parameters of MEMIT; the defaults are the paper's for GPT-2 XL, layers excepted."""

    second_moment_weight: float = Field(
        default=20000.0,
        gt=0,
        description="λ: how many observations of ordinary text C stands for against the new keys",
    )
