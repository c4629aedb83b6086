"""LoRA's hyper-parameters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from errata.contract.config import MethodConfig


class LoraConfig(MethodConfig):
    """Hyper-parameters of LoRA as an editor.

    The defaults are what EasyEdit's `hparams/LoRA` says for Llama-2-7B (rank 8, α 32, dropout 0.1,
    lr 5e-3, 70 steps, query and value projections), which its code then gives to AdaLoRA.
    """

    target_modules: tuple[str, ...] | None = Field(
        default=None,
        description="Linear modules of each block: roles (attention_in, attention_out, mlp_in, "
        "mlp_out) or names (c_attn, q_proj); none: attention's query and value, or its fused input",
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="Blocks that are adapted (negative: from the end); none: all"
    )
    rank: int = Field(default=8, ge=1, description="Rank r of every module's change")
    alpha: float = Field(default=32.0, gt=0, description="LoRA's alpha: the change is × α / r")
    rslora: bool = Field(default=False, description="Scale by α / √r instead (rank-stabilised)")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Dropout on the adapter's input")
    lr: float = Field(default=5e-3, gt=0, description="Adam's learning rate")
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
