"""The hyper-parameters that closed-form methods share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from errata.contract.config import SAME_SUBJECT, Contexts, MethodConfig, Template
from errata.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class ClosedFormConfig(MethodConfig):
    """Hyper-parameters of the family; the defaults are MEMIT's for GPT-2 XL, layers excepted.

    For a model without a preset the edited layers are the (up to) three around the one that is a
    tenth of the way up: further up, small models' neighbours are overwritten, too
    (docs/results/presets.md). A layer sweep is the better guide.
    """

    default_depth: ClassVar[int] = 3

    layers: tuple[int, ...] | Literal["auto"] | None = Field(
        default=None,
        description="Blocks whose MLP is edited; auto: what a sweep of this model found (`errata "
        "locate --sweep`); null: those around a tenth of the way up",
    )
    placement: Literal["spread", "boundary"] = Field(
        default="spread",
        description="spread: one value at the last layer, its residual shared out over all; "
        "boundary: the first and the last layer only, each with a value of its own (BLUE)",
    )
    history: Literal["joint", "none"] = Field(
        default="joint",
        description="joint: one least-squares solution over all active edits, each of which can "
        "be reverted alone; none: as published, a batch knows nothing of earlier ones and is one "
        "edit",
    )
    policy: Literal["frozen", "replay"] = Field(
        default="frozen",
        description="Of joint edits. frozen: keys and residuals are those of the base, each "
        "request by itself, so that order does not matter; replay: those of the model as it "
        "stands, to be computed again (`Editor.rebase`) when an earlier edit is reverted",
    )
    same_subject: Literal["together", "alone"] = Field(
        default="together", description=f"Of joint, frozen edits. {SAME_SUBJECT}"
    )
    steps: int = Field(default=20, ge=1, description="Evaluations of the loss (one less updates)")
    lr: float = Field(default=0.5, gt=0, description="Adam's learning rate for the value")
    weight_decay: float = Field(default=0.5, ge=0, description="Factor of ‖δ‖ / ‖h0‖²")
    clamp: float = Field(default=0.75, gt=0, description="Largest ‖δ‖, in units of ‖h0‖")
    kl_factor: float = Field(default=0.0625, ge=0, description="Factor of the KL term; 0: none")
    kl_prompt: Template = Field(
        default="{} is a", description="Prompt whose prediction at the subject should stay"
    )
    early_stop: float = Field(default=5e-2, ge=0, description="Done once the loss is below this")
    top_steps: int | None = Field(
        default=None,
        ge=1,
        description="Done once the target came first in all contexts so many times in a row "
        "(MPES); null: never for that",
    )
    norm_anchor: float | None = Field(
        default=None,
        gt=0,
        description="Scale what the MLP is to say to this many times its mean norm on text (NAS: "
        "1); null: leave it",
    )
    loss_layer: int | None = Field(
        default=None, description="Block whose output the loss is read from; null: the last"
    )
    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = (
        Field(default="subject_last", description="Token whose value is rewritten")
    )
    window: int = Field(
        default=16,
        ge=1,
        description="Of requests of kind text: most tokens that one value has to say (AnyEdit)",
    )
    kept_positions: bool = Field(
        default=False,
        description="Of requests of kind text, in a joint edit: the keys of the text's other "
        "positions ask for no change (AnyEdit); each is stored with the edit",
    )
    tokens: int | None = Field(
        default=None, ge=1, description="Tokens C is estimated from; null: a multiple of its size"
    )
    contexts: Contexts | None = Field(
        default=None, description='Contexts with one {}, the first "{}"; null: generated'
    )
    context_lengths: tuple[tuple[int, int], ...] = Field(
        default=((10, 5),), description="Generated contexts: (tokens, how many)"
    )
    context_starts: tuple[str, ...] = Field(
        default=("The", "Therefore", "Because", "I", "You"),
        min_length=1,
        description='What generated contexts begin with, in turn; "" is the start-of-text token',
    )
    precision: Literal["float64", "float32"] = Field(
        default="float64",
        description="Of the whitened keys in a joint edit: float32 halves its size, at a relative "
        "error of the change of about 1e-7 times the condition of Kᵀ M K + S",
    )

    @property
    def on_base(self) -> bool:
        """Edits are computed from the base alone, whatever is active."""
        return self.history == "joint" and self.policy == "frozen"

    @property
    def shares(self) -> bool:
        """Facts of one subject share their values."""
        return self.on_base and self.same_subject == "together"

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers written out: ascending, counted from 0.

        "auto" stays as it is: it needs a sweep of the model.

        Raises:
            ConfigError: a layer that the model does not have, or one that is named twice.
        """
        changes: dict[str, object] = {}
        stack = anatomy.reader
        if self.loss_layer is not None:
            changes["loss_layer"] = anatomy.layer(self.loss_layer)
        if self.layers is None:
            last = stack.nearest(stack.early + (self.default_depth - 1) // 2, "mlp")
            below = [layer for layer in stack.layers_with("mlp") if layer <= last]
            changes["layers"] = tuple(below[-self.default_depth :])
        elif self.layers != "auto":
            layers = sorted(stack.layer(layer) for layer in self.layers)
            if len(set(layers)) != len(layers):
                raise ConfigError(
                    f"layers {list(self.layers)} name one of the model's {stack.n_layers} blocks "
                    "twice: negative numbers count from the end."
                )
            changes["layers"] = tuple(layers)
        return self.model_copy(update=changes)

    @field_validator("layers")
    @classmethod
    def _ascending(
        cls, value: tuple[int, ...] | Literal["auto"] | None
    ) -> tuple[int, ...] | Literal["auto"] | None:
        if isinstance(value, tuple) and (not value or len(set(value)) != len(value)):
            raise ValueError(f"layers {list(value)} must name at least one block, each once")
        return value


class WeightedConfig(ClosedFormConfig):
    """What methods that weigh ordinary text against new keys have besides: MEMIT and PMET."""

    resolves: ClassVar[frozenset[str]] = frozenset(
        {"second_moment_weight", "relative_weight", "tokens"}
    )
    derived: ClassVar[Mapping[str, str]] = {"second_moment_weight": "relative_weight"}

    second_moment_weight: float | None = Field(
        default=None,
        gt=0,
        description="λ: how many observations of ordinary text C stands for against the new keys; "
        "null: from relative_weight",
    )
    relative_weight: float = Field(
        default=0.25,
        gt=0,
        description="λ in units of what a usual subject's key weighs, the median of kᵀ C⁻¹ k: an "
        "edit alone writes 1 / (1 + this) of its residual",
    )
