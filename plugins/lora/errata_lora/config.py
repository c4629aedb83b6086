"""LoRA's hyper-parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from errata.contract.config import MethodConfig

if TYPE_CHECKING:
    from typing_extensions import Self

    from errata.model.anatomy import Anatomy


class LoraConfig(MethodConfig):
    """Hyper-parameters of LoRA as an editor.

    Rank, α and steps are what EasyEdit's `hparams/LoRA` says for Llama-2-7B, which its code then
    gives to AdaLoRA. Its learning rate (5e-3), dropout and targets (query and value projections of
    all blocks) wreck small models; the defaults are what spares SmolLM2 (docs/results/presets.md).
    """

    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Linear modules of each block: roles (attention_in, attention_out, mlp_in, "
        "mlp_out) or names (c_attn, q_proj); none: with layers, attention's query and value (or "
        "its fused input); without, the MLP's output",
    )
    layers: tuple[int, ...] | None = Field(
        default=None,
        description="Blocks that are adapted (negative: from the end); none: of a decoder the one "
        "a tenth of the way up, unless modules are named; else all",
    )
    rank: int = Field(default=8, ge=1, description="Rank r of every module's change")
    alpha: float = Field(default=32.0, gt=0, description="LoRA's alpha: the change is × α / r")
    rslora: bool = Field(default=False, description="Scale by α / √r instead (rank-stabilised)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    lr: float = Field(default=1e-3, gt=0, description="Adam's learning rate")
    steps: int = Field(default=70, ge=1, description="Passes over the requests, at most")
    batch_size: int = Field(default=16, ge=1, description="Requests per optimisation step")
    order: Literal["breadth-first", "depth-first"] = Field(
        default="breadth-first",
        description="All requests in every pass, or each until it holds, then the next",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Adam's weight decay")
    append_end: bool = Field(
        default=False, description="Targets go on with the end token: generation learns to stop"
    )
    early_stop: bool = Field(
        default=True, description="Stop once every target token is the most probable one"
    )
    stop_loss: float | None = Field(
        default=None,
        gt=0,
        description="Early stop also needs each target's mean NLL (nats) below this; none: no need",
    )

    def for_model(self, anatomy: Anatomy) -> Self:
        """Return the configuration with its layers written out, counted from 0.

        A decoder without any of both is adapted where facts are best written. Attention's
        projections in all blocks, as published, overwrite what a small model says of neighbours
        (docs/results/presets.md).
        """
        if self.layers is not None:
            return self.model_copy(update={"layers": tuple(map(anatomy.layer, self.layers))})
        if self.target_modules is not None or anatomy.kind != "decoder":
            return self
        sublayer = "mlp" if anatomy.layers_with("mlp") else "attention"
        layer = anatomy.nearest(anatomy.early, sublayer)
        where = {"layers": (layer,), "target_modules": (anatomy.editable(layer),)}
        return self.model_copy(update=where)
