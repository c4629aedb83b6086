"""PMET's hyper-parameters."""

from __future__ import annotations

from pydantic import Field

from errata.kit.closed_form.config import WeightedConfig


class PmetConfig(WeightedConfig):
    """Hyper-parameters of PMET; the defaults are the authors' for GPT-J, layers and λ excepted."""

    steps: int = Field(default=30, ge=1, description="Evaluations of the loss (one less updates)")
    lr: float = Field(default=0.2, gt=0, description="Adam's learning rate for both values")
    kl_factor: float = Field(default=1.0, ge=0, description="Factor of the KL term; 0: none")
    top_factor: float = Field(
        default=0.1, ge=0, description="Factor of the NLL once the target comes first everywhere"
    )
    top_kl: float | None = Field(
        default=0.01,
        ge=0,
        description="Done when the target comes first everywhere and the KL term is at most this; "
        "null: never for that",
    )
