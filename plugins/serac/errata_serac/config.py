"""SERAC's hyper-parameters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from errata.contract.config import MethodConfig


class SeracConfig(MethodConfig):
    """Hyper-parameters of SERAC; the defaults are the authors' for question answering.

    Where the authors have a T5-small beside their T5, the counterfactual model here is the base
    itself with a LoRA.
    """

    prepares: ClassVar[set[str] | None] = {
        "seed", "variant", "scope", "encoder", "encoder_layers", "rank", "target_modules", "layers",
        "steps", "lr", "batch_size", "accumulate", "edit_weight", "scope_weight", "clip",
        "hard_negatives", "validation", "validate_every", "patience", "records", "append_end",
    }  # fmt: skip

    variant: Literal["serac", "mixture"] = Field(
        default="serac",
        description="serac: a prompt in scope is answered by the counterfactual model, any other "
        "by the base; mixture: every answer is a mixture of both, in training and at test",
    )
    scope: Literal["embedding", "cross-attention"] = Field(
        default="embedding",
        description="How edit and prompt are compared: by the distance of two vectors, or read "
        "together by one encoder",
    )
    encoder: str | None = Field(
        default="minilm",
        min_length=1,
        description="What the scope classifier starts from: a model of the zoo, a folder or a hub "
        "name (the authors': distilbert-base-cased); null: a linear map of the model's own states",
    )
    encoder_layers: int | None = Field(
        default=None,
        ge=0,
        description="Blocks of the encoder that are trained, the last; null: all",
    )
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="Least g(edit, prompt) of a prompt in scope"
    )
    rank: int = Field(default=8, ge=1, description="Rank of the counterfactual model's LoRA")
    target_modules: tuple[str, ...] = Field(
        default=("attention_in", "attention_out"), description="Linear modules that get the LoRA"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Blocks with a LoRA; null: all"
    )
    append_end: bool = Field(
        default=True,
        description="The counterfactual model learns to end its text after the answer, as the "
        "authors' T5 does",
    )
    steps: int = Field(default=1_000_000, ge=1, description="Batches, at most")
    lr: float = Field(default=1e-5, gt=0, description="Adam's learning rate, of both networks")
    batch_size: int = Field(default=10, ge=1, description="Edits per batch")
    accumulate: int = Field(default=10, ge=1, description="Batches per update")
    edit_weight: float = Field(
        default=0.1, ge=0, description="Weight of the answer's loss (c_edit)"
    )
    scope_weight: float = Field(default=1.0, ge=0, description="Weight of the scope's loss (c_loc)")
    clip: float = Field(default=100.0, gt=0, description="Largest norm of a gradient")
    hard_negatives: float = Field(
        default=0.5, ge=0, le=1, description="Share of prompts out of scope that are hard: the "
        "training request's own neighbours (the authors' are near questions by an encoder)"
    )  # fmt: skip
    validation: int = Field(
        default=20,
        ge=1,
        description="Training requests that are held out to validate on, at most a tenth of all",
    )
    validate_every: int = Field(default=5000, ge=1, description="Batches between validations")
    patience: int = Field(
        default=40_000, ge=1, description="Batches without a better validation before it stops"
    )
    records: int | None = Field(
        default=None, ge=2, description="Training requests that are used, at most; null: all"
    )

    @property
    def on_base(self) -> bool:
        """A row of text does not depend on other edits."""
        return True

    @model_validator(mode="after")
    def _reads_together_with_an_encoder(self) -> SeracConfig:
        if self.scope == "cross-attention" and self.encoder is None:
            raise ValueError(
                "scope='cross-attention' reads edit and prompt together in an encoder: name one, "
                "or take scope='embedding'"
            )
        return self
