"""Hyper-parameters of Defer and Memory; the defaults are those of grace/config/editor."""

from __future__ import annotations

from pydantic import Field

from errata.kit.placement import PlacedConfig


class DeferConfig(PlacedConfig):
    """Hyper-parameters of Defer."""

    steps: int = Field(default=100, ge=1, description="Adam steps for each edit (n_iter)")
    lr: float = Field(default=0.1, gt=0, description="Adam's learning rate, a new Adam each edit")
    only_when_wrong: bool = Field(
        default=True,
        description="Leave the network alone when every target token is the most probable one",
    )


class MemoryConfig(DeferConfig):
    """Hyper-parameters of Memory."""

    slots: int = Field(default=100, ge=1, description="Values that the memory mixes (nkeys)")
