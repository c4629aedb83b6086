"""The base of every method's hyper-parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo


def _one_place(value: str, info: ValidationInfo) -> str:
    if value.count("{}") != 1:
        raise ValueError(f"{info.field_name} {value!r} must have exactly one {{}} for the subject")
    return value


def _bare_first(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value or value[0] != "{}":
        raise ValueError('contexts must begin with "{}", the prompt without a prefix')
    for context in value:
        if context.count("{}") != 1:
            raise ValueError(f"the context {context!r} must have exactly one {{}}")
    return value


Template = Annotated[str, AfterValidator(_one_place)]
"""A text with one {} for the subject."""

Contexts = Annotated[tuple[str, ...], AfterValidator(_bare_first)]
"""Texts with one {} for the prompt, the first of them the prompt alone."""


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
