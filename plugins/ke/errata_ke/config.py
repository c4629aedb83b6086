"""KnowledgeEditor's hyper-parameters: the published ones, the port's, and a small training."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from errata.kit.hypernetworks.settings import NetworkConfig
from errata.kit.training import ROLES

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy

Variant = Literal["published", "published-bart", "efk", "small", "efk-small"]

_BART: Mapping[str, Any] = {
    "margin": 1e-3, "margin_end": 1e-5, "batch_size": 1, "n_locality": 63, "steps": 200_000,
    "decay": 200_000, "views": True, "label_smoothing": 0.1,
}  # fmt: skip

_EFK: Mapping[str, Any] = {
    "constraint": "none", "hidden": 512, "condition": 768, "optimiser": "adam", "lr": 1e-5,
    "warmup": 0, "decay": None, "batch_size": 10, "n_locality": 1, "steps": 100_000,
    "prompt_share": 0.0, "clip": 100.0, "patience": 2000, "locality_answers": "true",
}  # fmt: skip

_SMALL: Mapping[str, Any] = {
    "locality": "neighbours", "n_locality": 2, "batch_size": 8, "steps": 1000, "lr": 3e-4,
    "warmup": 50, "decay": None, "validation": 40, "validate_every": 50, "patience": 400,
    "train_embeddings": False,
}  # fmt: skip

VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "published": {},
        "published-bart": _BART,
        "efk": _EFK,
        "small": {**_SMALL, "locality": "others", "n_locality": 7, "batch_size": 16},
        "efk-small": {**_EFK, **_SMALL, "prompt_share": 0.3, "c_edit": 0.5, "clip": None},
    }
)
"""What each variant sets. The defaults are the values published for BERT on FEVER; those for BART
on zsRE are `published-bart`, which `published` becomes in an encoder–decoder."""


class KeConfig(NetworkConfig):
    """Hyper-parameters of KnowledgeEditor; the defaults are those published for BERT on FEVER.

    There a step has one edit and 255 other examples, here `batch_size` edits, each by itself, with
    `n_locality` other examples each: as many examples in all.
    """

    prepares: ClassVar[set[str] | None] = None
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS

    variant: Variant = Field(
        default="published",
        description="published: for BERT on FEVER, in an encoder-decoder published-bart; "
        "published-bart: for BART on zsRE; efk: the port to decoders by MEND's authors (MLPs of "
        "the last three blocks, MEND's loss); small and efk-small: the same networks, trained "
        "for 1,000 steps",
    )
    batch_size: int = Field(
        default=4, ge=1, description="Edits per step of the training, each by itself"
    )
    n_locality: int = Field(
        default=63, ge=1, description="Prompts that must stay, per edit and step"
    )
    locality_answers: Literal["true", "own"] = Field(
        default="own",
        description="What must stay after other training requests' prompts: true, their true "
        "answer (the model's own where none is given); own, what the model says, as published",
    )
    prompt_share: float = Field(
        default=1.0,
        ge=0,
        le=1,
        description="Share of steps that ask for the edit's own prompt instead of a paraphrase",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Stop when validation has not improved for so many steps; null: never",
    )
    steps: int = Field(default=50_000, ge=1, description="Steps of the training, at most")
    hidden: int = Field(default=128, ge=1, description="Width of the LSTM, per direction")
    condition: int = Field(default=1024, ge=1, description="Width of the condition h")
    inner: int = Field(default=128, ge=1, description="Hidden width of each matrix's conditioner")
    max_scale: float = Field(default=1.0, gt=0, description="ΔW is scaled by this times σ(s)")
    max_length: int = Field(default=32, ge=1, description="Tokens of the condition that are read")
    train_embeddings: bool = Field(
        default=True,
        description="Train the word embeddings that the LSTM reads, a copy of the model's; else "
        "it reads the model's own",
    )
    constraint: Literal["kl", "l2", "none"] = Field(
        default="kl",
        description="What the edit's loss is minimised under, by a Lagrange multiplier: kl, KL ≤ "
        "margin; l2, the root mean square of ΔW's entries ≤ margin (the paper's C_L2); none: the "
        "sum c_edit · NLL + c_loc · KL is minimised",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Under a constraint: share of the edit's loss that falls on all tokens alike",
    )
    margin: float = Field(
        default=0.1, gt=0, description="Bound m on the KL divergence (nats), or on ΔW"
    )
    margin_end: float = Field(default=1e-3, gt=0, description="Least bound")
    margin_decay: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="The bound's factor after a validation whose success is above 0.9",
    )
    lr_multiplier: float = Field(default=0.1, gt=0, description="Learning rate of the multiplier")
    c_edit: float = Field(default=0.1, gt=0, description="Unconstrained: weight of the edit")
    c_loc: float = Field(default=1.0, ge=0, description="Unconstrained: weight of locality")
    optimiser: Literal["rmsprop", "adam"] = Field(
        default="rmsprop", description="What trains the network: RMSprop is centred"
    )
    lr: float = Field(default=3e-4, gt=0, description="Learning rate of the network")
    warmup: int = Field(default=1000, ge=0, description="Steps until the learning rate is whole")
    decay: int | None = Field(
        default=200_000,
        ge=1,
        description="Step at which the learning rate has fallen to zero, warm-up included; null: "
        "it does not fall",
    )
    loops: int = Field(
        default=1,
        ge=1,
        le=5,
        description="Times that an edit is made, each on top of the last, until the target is said",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with layers and modules written out.

        All matrices of all blocks as published (a decoder's cross-attention belongs to all four
        roles together); the MLPs of the last blocks in the port. What was published for BERT
        becomes what was published for BART in an encoder-decoder.
        """
        if self.variant == "published" and anatomy.encoder is not None:
            given = {name: getattr(self, name) for name in self.model_fields_set}
            return type(self)(**{**given, "variant": "published-bart"}).for_model(anatomy)
        port = self.variant.startswith("efk")
        layers, targets = self.layers, self.target_modules
        if layers is None and port:
            layers = anatomy.layers_with("mlp")[-(2 if anatomy.encoder is not None else 3) :]
        if targets is None:
            targets = ("mlp_in", "mlp_out") if port else ROLES
        written = self.model_copy(update={"layers": layers, "target_modules": targets})
        return super(KeConfig, written).for_model(anatomy)

    @model_validator(mode="after")
    def _falls_after_it_has_risen(self) -> Self:
        if self.decay is not None and self.decay <= self.warmup:
            raise ValueError(
                f"decay={self.decay}, the step at which the learning rate is zero, must lie behind "
                f"the warm-up of {self.warmup} steps; give a larger one, or null"
            )
        return self


KeConfig.prepares = set(KeConfig.model_fields) - {"loops"}
