"""Hyper-parameters of the methods that edit in context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field
from typing_extensions import Self

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from errata.model.anatomy import Anatomy


class InContextConfig(MethodConfig):
    """What these methods share: which facts enter a prompt where several are active."""

    encoder: str | None = Field(
        default="minilm",
        min_length=1,
        description="Sentence encoder that finds the facts a prompt is about: a model of the zoo, "
        "a folder or a hub name; null: the model's own hidden states",
    )
    facts: int = Field(default=1, ge=1, description="Facts that may enter one prompt, at most")

    @property
    def on_base(self) -> bool:
        """Texts do not depend on other edits."""
        return True


class IceConfig(InContextConfig):
    """Hyper-parameters of ICE: the fact alone, as published in front of every prompt."""

    prepares: ClassVar[set[str] | None] = {"encoder", "threshold"}

    threshold: float | None = Field(
        default=None,
        ge=-1,
        le=1,
        description="Least cosine of a prompt with the fact's own; null: the nearest fact enters "
        "every prompt",
    )


class RetrievalConfig(InContextConfig):
    """Hyper-parameters of the baseline: the fact alone, where the gate lets it in."""

    prepares: ClassVar[set[str] | None] = {"encoder", "records", "seed"}

    records: int = Field(
        default=200, ge=2, description="Training requests that the threshold is chosen on"
    )


class IkeConfig(InContextConfig):
    """Hyper-parameters of IKE; the defaults are the authors'."""

    prepares: ClassVar[set[str] | None] = {"encoder", "records", "gate", "gate_records", "seed"}
    derived: ClassVar[Mapping[str, str]] = {"demonstrations": "variant"}

    variant: Literal["ike", "easyedit"] = Field(
        default="ike",
        description="ike: records nearest last, copy, update and retain as 1 : 3 : 4, then the "
        "edit's own copy; easyedit: the nearest sentences of whatever type, nearest first",
    )
    demonstrations: int | None = Field(
        default=None,
        ge=0,
        description="Demonstrations, at most; null: 32, and 16 of EasyEdit's. Fewer, in the same "
        "ratio, where the model's context is short",
    )
    records: int = Field(
        default=1000, ge=1, description="Training requests that demonstrations are drawn from"
    )
    gate: bool = Field(
        default=False,
        description="A fact enters only prompts that the gate finds to be about it; false: the "
        "nearest fact enters every prompt, as published for a single one",
    )
    gate_records: int = Field(
        default=200, ge=2, description="Training requests that the gate's threshold is chosen on"
    )

    @property
    def most(self) -> int:
        """Demonstrations, at most."""
        published = 16 if self.variant == "easyedit" else 32
        return published if self.demonstrations is None else self.demonstrations

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with the number of demonstrations written out."""
        del anatomy
        return self.model_copy(update={"demonstrations": self.most})
