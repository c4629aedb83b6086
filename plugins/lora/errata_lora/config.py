"""LoRA's hyper-parameters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from errata.kit.adapter_place import AdapterPlaceConfig


class LoraConfig(AdapterPlaceConfig):
    """Hyper-parameters of LoRA as an editor.

    Rank, α and steps are what EasyEdit's `hparams/LoRA` says for Llama-2-7B, which its code then
    gives to AdaLoRA. Its learning rate (5e-3), dropout and targets (query and value projections of
    all blocks) wreck small models; the defaults are what spares SmolLM2 (docs/results/presets.md).
    """

    rank: int = Field(default=8, ge=1, description="Rank r of every module's change")
    alpha: float = Field(default=32.0, gt=0, description="LoRA's alpha: the change is × α / r")
    rslora: bool = Field(default=False, description="Scale by α / √r instead (rank-stabilised)")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    lr: float = Field(default=1e-3, gt=0, description="Adam's learning rate")
    steps: int = Field(default=70, ge=1, description="Passes over the requests, at most")
    batch_size: int = Field(default=16, ge=1, description="Requests per optimisation step")
    order: Literal["breadth-first", "depth-first"] = Field(
        default="breadth-first",
        description="Train on all requests in every pass, or on each until it holds, then the next",
    )
    weight_decay: float = Field(default=0.0, ge=0, description="Adam's weight decay")
    append_end: bool = Field(
        default=False, description="Put the end token after targets: generation learns to stop"
    )
    early_stop: bool = Field(
        default=True, description="Stop once every target token is the most probable one"
    )
    stop_loss: float | None = Field(
        default=None,
        gt=0,
        description="Early stop also needs each target's mean NLL (nats) below this; null: any",
    )
