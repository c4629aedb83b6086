"""The hyper-parameters of an edit that holds from both sides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from errata.contract.config import SAME_SUBJECT, Contexts, MethodConfig, Template
from errata.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy

OBJECT = "[object]"
"""Where the object goes in a wording of the relation's prompt."""


class BothSidesConfig(MethodConfig):
    """Hyper-parameters; the values' are ROME's.

    For a model without a preset the entity's layer is a tenth of the way up, as ROME's, and the
    relation's last one half of the way.
    """

    layer: int | Literal["auto"] | None = Field(
        default=None,
        description="Block whose MLP is edited at the subject (negative: from the end); auto: what "
        "a sweep of this model found (`errata locate --sweep`); null: a tenth of the way up",
    )
    relation_layer: int | Literal["auto"] | None = Field(
        default=None,
        description="Last block whose MLP is edited at the object of the relation's prompt; auto: "
        "what a sweep of it found (`errata locate --sweep --set option=relation_layer`); null: "
        "half of the way up",
    )
    relation_depth: int | None = Field(
        default=None,
        ge=1,
        description="Blocks that share what is written for the relation: `relation_layer` and "
        "those below it, down to `layer`; null: 5, or that one alone where a norm stands behind "
        "the MLPs and five do not make the relation likely",
    )
    wordings: tuple[str, ...] = Field(
        default=("{} and [object]: their relation is", "What ties {} to [object] is"),
        description="Other wordings of the relation's prompt, with {} and [object], that the edit "
        "is made for as well",
    )
    end: str = Field(
        default=".",
        description="What the relation's name ends with in what its value is trained for: without "
        "it the text goes on with the name's last word, again and again",
    )
    slack: float = Field(
        default=0.1,
        ge=0,
        description="λ in units of what the edit's own key weighs, kᵀ C⁻¹ k: how much a miss is "
        "tolerated, at the keys of the edit and at those that must stay; divided by the number of "
        "contexts at the entity's side, where one key stands for all of them",
    )
    alike: int = Field(
        default=8,
        ge=0,
        description="Subjects of the same kind, named by the model, whose relation to the object "
        "must stay",
    )
    objects: int = Field(
        default=16, ge=0, description="Other objects whose relation to the subject must stay"
    )
    subjects: int = Field(
        default=8, ge=0, description="Other subjects whose relation to the object must stay"
    )
    pairs: int = Field(default=8, ge=0, description="Other pairs whose relation must stay")
    texts: int = Field(
        default=12,
        ge=0,
        description="Other subjects whose texts must stay: the entity's prompt and what the "
        "unedited model says next",
    )
    text_tokens: int = Field(
        default=32,
        ge=1,
        description="Tokens of these texts that are kept in each block: those that the edit would "
        "change most",
    )
    keep_answer: bool = Field(
        default=True,
        description="The entity's prompts and objects behind them must stay as they were",
    )
    keep_old: bool = Field(
        default=True, description="The relation of subject and old object must stay as it was"
    )
    same_subject: Literal["together", "alone"] = Field(default="together", description=SAME_SUBJECT)
    steps: int = Field(
        default=20,
        ge=1,
        description="Evaluations of each loss (one less updates); at the subject, for every fact",
    )
    lr: float = Field(default=0.5, gt=0, description="Adam's learning rate for the values")
    weight_decay: float = Field(default=0.5, ge=0, description="Factor of ‖δ‖ / ‖v0‖²")
    clamp: float = Field(default=4.0, gt=0, description="Largest ‖δ‖, in units of ‖v0‖")
    relation_clamp: float | None = Field(
        default=None,
        gt=0,
        description="Largest ‖δ′‖ at the relation's side, in units of ‖v0‖; null: as `clamp`",
    )
    kl_factor: float = Field(
        default=0.0625, ge=0, description="Factor of the KL term at the subject; 0: none"
    )
    kl_prompt: Template = Field(
        default="{} is a", description="Prompt whose prediction at the subject should stay"
    )
    early_stop: float = Field(default=5e-2, ge=0, description="Done once a loss is below this")
    tokens: int | None = Field(
        default=None, ge=1, description="Tokens C is estimated from; null: a multiple of its size"
    )
    contexts: Contexts | None = Field(
        default=None, description='Contexts with one {}, the first "{}"; null: generated'
    )
    context_lengths: tuple[tuple[int, int], ...] = Field(
        default=((5, 10), (10, 10)), description="Generated contexts: (tokens, how many)"
    )

    @field_validator("wordings")
    @classmethod
    def _name_both(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            if text.count("{}") != 1 or text.count(OBJECT) != 1:
                raise ValueError(f"wordings: {text!r} must have one {{}} and one {OBJECT}")
        return value

    @property
    def on_base(self) -> bool:
        """Edits are computed from the base alone, whatever is active."""
        return True

    @property
    def shares(self) -> bool:
        """Facts of one subject share their value at the subject."""
        return self.same_subject == "together"

    @property
    def layers(self) -> tuple[int, int]:
        """The entity's block and the relation's last one, once they are written out."""
        if not (isinstance(self.layer, int) and isinstance(self.relation_layer, int)):
            raise ConfigError(
                "The layers are resolved by the editor: go through `Editor`, or name `layer` and "
                "`relation_layer`."
            )
        return self.layer, self.relation_layer

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers counted from 0; "auto" stays as it is.

        Raises `ConfigError` for a layer that the model does not have, and where the relation's
        layer is not above the entity's.
        """
        early, late = self.layer, self.relation_layer
        if early is None:
            early = anatomy.nearest(anatomy.early, "mlp")
        elif early != "auto":
            early = anatomy.layer(early)
        if late is None:
            late = anatomy.nearest(anatomy.n_layers // 2, "mlp")
        elif late != "auto":
            late = anatomy.layer(late)
        if isinstance(early, int) and isinstance(late, int) and early >= late:
            raise ConfigError(
                f"relation_layer {late} must lie above layer {early}: what is written at the "
                "subject is read at the object."
            )
        return self.model_copy(update={"layer": early, "relation_layer": late})
