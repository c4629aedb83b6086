"""The base of every method's hyper-parameters."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class MethodConfig(BaseModel):
    """Hyper-parameters of a method: frozen, every field described, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    seed: int = Field(default=0, ge=0, description="Seeds every random choice of the method")

    @property
    def on_base(self) -> bool:
        """The method's edits are computed from the base alone: the core takes every other off.

        They then depend on nothing that is active, and none of them goes stale.
        """
        return False
