"""The hyper-parameters that every trained editor has."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from errata.contract.config import MethodConfig
from errata.kit.hypernetworks.lessons import Locality

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class NetworkConfig(MethodConfig):
    """What is edited, and how the network is trained. Edits are computed at the unedited model."""

    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks whose matrices are edited (negative: from the end), of each stack "
        "where there are two; null: the method's rule",
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Linear modules of each block: roles (attention_in, attention_out, mlp_in, "
        "mlp_out) or names (gate_proj, down_proj); null: the method's rule",
    )
    batch_size: int = Field(
        default=10, ge=1, description="Edits per step of the training, each by itself"
    )
    steps: int = Field(default=100_000, ge=1, description="Steps of the training, at most")
    clip: float | None = Field(
        default=None, gt=0, description="Largest norm of a step's gradient; null: any"
    )
    locality: Locality = Field(
        default="others",
        description="What an edit must leave alone in training: others, other training requests "
        "(as published); neighbours, the request's own neighbours, which are hurt first",
    )
    locality_answers: Literal["true", "own"] = Field(
        default="true",
        description="What must stay after other training requests' prompts: true, their true "
        "answer (the model's own where none is given); own, what the model says",
    )
    n_locality: int = Field(
        default=1, ge=1, description="Prompts that must stay, per edit and step"
    )
    prompt_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of steps that ask for the edit's own prompt instead of a paraphrase",
    )
    views: bool = Field(
        default=False,
        description="Each step asks for the edit's own prompt and for a paraphrase of it",
    )
    validation: int = Field(
        default=500,
        ge=1,
        description="Training requests that are held out to validate on, at most a fifth of all",
    )
    validate_every: int = Field(
        default=500, ge=1, description="Steps between validations; each keeps the training's state"
    )
    patience: int | None = Field(
        default=2000,
        ge=1,
        description="Stop when validation has not improved for so many steps; null: never",
    )

    @property
    def on_base(self) -> bool:
        """Every edit is computed at the unedited model: the network was trained there."""
        return True

    def recipe(self, *, leave_out: Collection[str] = ()) -> str:
        """Return a short digest of the hyper-parameters that the training depends on.

        `locality_answers` plays no part beside neighbours.
        """
        idle = {"locality_answers"} if self.locality == "neighbours" else set()
        return super().recipe(leave_out={*leave_out, *idle})

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers counted from 0."""
        if self.layers is None:
            return self
        return self.model_copy(update={"layers": tuple(map(anatomy.layer, self.layers))})
