"""MEND's hyper-parameters: the published ones, and named departures from them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from errata.kit.hypernetworks.settings import NetworkConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy

Variant = Literal["published", "descent", "small"]

VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": {},
        "descent": {"descent": True},
        "small": {
            "descent": True, "rank": 128, "edit_lr_start": None, "lr": 1e-4, "edit_lr": 2e-2,
            "c_edit": 0.5, "batch_size": 8, "steps": 1000, "clip": 10.0, "locality": "neighbours",
            "n_locality": 2, "prompt_share": 0.3, "validation": 40, "validate_every": 50,
            "patience": 400,
        },
    }
)  # fmt: skip
"""What each variant sets. The defaults are the published values."""

LAST = 3
"""Blocks that are edited, counted from the end: in BERT, GPT and LLaMA; two in a T5 or BART."""


class MendConfig(NetworkConfig):
    """Hyper-parameters of MEND; the defaults are those of the authors' code.

    They take one edit and one unrelated prompt at a time and average the gradients of ten steps;
    here a step has ten edits at once, each by itself, so 100,000 steps are their million.

    `variant` is a name for a set of the other values, which fills in what is not given.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS

    variant: Variant = Field(
        default="published",
        description="published; descent: the change is subtracted, as the authors' later code "
        "has it; small: descent with less rank and fewer steps, started by a line search, kept in "
        "check by neighbours",
    )
    rank: int = Field(default=1920, ge=1, description="Rank of the network's matrices U V, at most")
    n_hidden: int = Field(default=1, ge=0, description="Hidden layers of the network")
    clip: float | None = Field(
        default=100.0, gt=0, description="Largest norm of a step's gradient; null: any"
    )
    descent: bool = Field(
        default=False,
        description="W − η Σ δ̃ x̃ᵀ, which starts as a gradient step; else W + η Σ δ̃ x̃ᵀ as published",
    )
    lr: float = Field(default=1e-6, gt=0, description="Adam's learning rate for the network")
    edit_lr: float = Field(default=1e-4, gt=0, description="Adam's learning rate for the rates η")
    edit_lr_start: float | None = Field(
        default=1e-4,
        gt=0,
        description="η before training; null: a line search over shares of ‖W x‖ for each matrix; "
        "η then counts in units of what it found",
    )
    c_edit: float = Field(default=0.1, gt=0, description="Weight of the edit in the loss")
    c_loc: float = Field(default=1.0, ge=0, description="Weight of locality in the loss")
    c_reverse: float = Field(
        default=0.0,
        ge=0,
        description="Weight of KL(P' ‖ P) in the loss, where nothing should change: it counts what "
        "the edited model says and the base does not; 0, as published",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with layers and modules written out: the last blocks' MLPs."""
        layers = self.layers
        if layers is None:
            n = 2 if anatomy.encoder is not None else LAST
            layers = anatomy.layers_with("mlp")[-n:]
        targets = self.target_modules or ("mlp_in", "mlp_out")
        written = self.model_copy(update={"layers": layers, "target_modules": targets})
        return super(MendConfig, written).for_model(anatomy)
