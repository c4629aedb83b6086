"""Fine-tuning's hyper-parameters, and the published variants as sets of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.edits.request import Request
    from errata.model.anatomy import Anatomy

Variant = Literal["ft", "ft-l", "ft-m", "ft-ewc", "ft-retrain", "locft"]

VARIANTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ft": {"loss": "text"},
        "ft-m": {"loss": "target"},
        "ft-l": {"loss": "target", "norm_constraint": 5e-4},
        "ft-ewc": {"loss": "target", "ewc_weight": 0.2},
        "ft-retrain": {"loss": "target", "retain_documents": 32},
        "locft": {"loss": "target", "append_end": True, "batch_size": 100},
    }
)
"""What each variant switches on. Everything else is the same for all."""


class FtConfig(MethodConfig):
    """Hyper-parameters of fine-tuning as an editor.

    `variant` is a name for a set of the other values: it fills in what is not given (by presets
    or arguments). So the switches combine: "ft-m" with a `norm_constraint` is FT-M in a box.

    The ROME paper's baselines (lr 5e-4, 25 steps, done below a loss of 1e-2) are presets of the
    published models. Elsewhere steps are smaller and end once the answer is said, on the layer a
    tenth of the way up: larger ones, and EasyEdit's layer two thirds of the way up, overwrite what
    a small model says of neighbours (docs/results/presets.md).
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS

    variant: Variant = Field(
        default="ft-m",
        description="ft: plain; ft-m: loss masked to the target; ft-l: in an L∞ box; ft-ewc: with "
        "elastic weight consolidation; ft-retrain: replays other text; locft: all requests of "
        "a call as one edit, with end tokens, breadth-first",
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks that are trained (negative: from the end); null: the one a tenth of "
        "the way up",
    )
    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Linear modules of each block: roles (attention_in, attention_out, mlp_in, "
        "mlp_out) or names (c_proj, down_proj); null: mlp_out, or attention_out in a block whose "
        "MLP is a mixture of experts",
    )
    bias: bool = Field(default=False, description="Train these modules' biases as well")
    loss: Literal["target", "text", "prompt_last"] = Field(
        default="target",
        description="target: its tokens, teacher-forced; text: the prompt's as well; prompt_last: "
        "all target tokens predicted at the prompt's end (the published baseline; no "
        "language-model loss for a target of several tokens)",
    )
    append_end: bool = Field(
        default=False, description="Put the end token after targets: generation learns to stop"
    )
    lr: float = Field(default=1e-4, gt=0, description="Adam's learning rate")
    steps: int = Field(default=100, ge=1, description="Passes over the requests, at most")
    batch_size: int = Field(default=64, ge=1, description="Requests per optimisation step")
    order: Literal["breadth-first", "depth-first"] = Field(
        default="breadth-first",
        description="Train on all requests in every pass, or on each until it holds, then the next",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Adam's weight decay, on D")
    early_stop: bool = Field(
        default=True,
        description="Stop once every target token is the most probable one; leave alone what holds",
    )
    stop_loss: float | None = Field(
        default=None,
        gt=0,
        description="Early stop also needs each target's mean NLL (nats) below this; null: any",
    )
    norm_constraint: float | None = Field(
        default=None,
        gt=0,
        description="Largest change ε of an entry (L∞), kept after every step: this edit's by "
        "itself, and together with the edits beneath it against the base; null: no box",
    )
    ewc_weight: float = Field(
        default=0.0, ge=0, description="λ of λ/2 Σ F D², F the base's Fisher diagonal; 0: none"
    )
    fisher_documents: int = Field(
        default=256,
        ge=1,
        description="Documents of the corpus (or pairs of `retain`, if any) that F is a mean over",
    )
    retain: tuple[tuple[str, str], ...] = Field(
        default=(),
        description="(prompt, answer) pairs to keep: replayed in every step; F is a mean over them",
    )
    retain_documents: int = Field(
        default=0, ge=0, description="Documents of the corpus to replay, drawn with the seed"
    )
    retain_weight: float = Field(
        default=1.0, ge=0, description="Weight of the replayed batch's loss in a step"
    )
    store: Literal["auto", "dense", "low_rank", "sparse"] = Field(
        default="auto",
        description="How D is kept: auto takes the smallest that changes no prediction of a target",
    )
    store_error: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Largest ‖D − stored‖ / ‖D‖ (Frobenius, per parameter); dense has none",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers written out, counted from 0."""
        if self.layers is None:
            wanted = self.target_modules or ()
            sublayer = "mlp" if anatomy.layers_with("mlp") else "attention"
            if wanted and all(target.startswith("attention") for target in wanted):
                sublayer = "attention"
            layers: tuple[int, ...] = (anatomy.nearest(anatomy.early, sublayer),)
        else:
            layers = tuple(map(anatomy.layer, self.layers))
        # Of several layers all have the part that the first one has, or are refused.
        targets = self.target_modules or tuple(anatomy.editable(layer) for layer in layers[:1])
        return self.model_copy(update={"layers": layers, "target_modules": targets})

    def batches(
        self, requests: Sequence[Request], asked: int | None, declared: int | None
    ) -> list[Sequence[Request]]:
        """Return the requests that are trained together; LocFT makes one edit of a call."""
        return super().batches(requests, asked, None if self.variant == "locft" else declared)

    @model_validator(mode="after")
    def _fits_together(self) -> FtConfig:
        if self.norm_constraint is not None and self.store == "low_rank":
            raise ValueError(
                "store='low_rank' with a norm_constraint: what an SVD leaves is outside the box. "
                "Take 'auto', 'dense' or 'sparse'."
            )
        if self.bias and self.store == "low_rank":
            raise ValueError("store='low_rank' with bias=true: a bias has no factors. Take 'auto'.")
        return self
