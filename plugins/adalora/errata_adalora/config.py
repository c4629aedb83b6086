"""AdaLoRA's hyper-parameters."""

from __future__ import annotations

from pydantic import Field, model_validator

from errata.errors import ConfigError
from errata.kit.adapter_place import AdapterPlaceConfig


class AdaloraConfig(AdapterPlaceConfig):
    """Hyper-parameters of AdaLoRA as an editor; ranks and steps are KnowEdit's for Llama-2-7B.

    KnowEdit writes "rank 8", which its AdaLoRA ignores: it runs with PEFT's initial rank 12. Here
    12 is where training starts and 8 is what the allocation leaves on average. Its learning rate
    (5e-3), dropout and targets (query and value projections of all blocks) wreck small models; the
    defaults are what spares SmolLM2 (docs/results/presets.md).
    """

    init_rank: int = Field(default=12, ge=2, description="Rank that training starts with")
    target_rank: int = Field(
        default=8, ge=1, description="Mean rank per module that the allocation leaves"
    )
    alpha: float = Field(default=32.0, gt=0, description="LoRA's alpha: the change is × α / r")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapter's input")
    lr: float = Field(default=2e-3, gt=0, description="Adam's learning rate")
    steps: int = Field(default=70, ge=3, description="Passes over the requests, at most")
    batch_size: int = Field(default=16, ge=1, description="Requests per optimisation step")
    weight_decay: float = Field(default=0.0, ge=0, description="Adam's weight decay")
    orth_weight: float = Field(
        default=0.5, ge=0, description="Weight of the orthogonal regularisation ‖PᵀP − I‖"
    )
    tinit: int | None = Field(
        default=None, ge=0, description="Steps before ranks are cut; null: a tenth of all"
    )
    tfinal: int | None = Field(
        default=None, ge=0, description="Steps after the last cut; null: a third of all"
    )
    delta_t: int = Field(default=1, ge=1, description="Steps between two allocations")
    beta1: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of the sensitivity")
    beta2: float = Field(default=0.85, gt=0, lt=1, description="Smoothing of its uncertainty")
    early_stop: bool = Field(
        default=True, description="Stop once every target token is the most probable one"
    )
    stop_loss: float | None = Field(
        default=None,
        gt=0,
        description="Early stop also needs each target's mean NLL (nats) below this; null: any",
    )

    @model_validator(mode="after")
    def _ranks_can_be_cut(self) -> AdaloraConfig:
        if self.target_rank >= self.init_rank:
            raise ValueError(
                f"target_rank={self.target_rank} must be below init_rank={self.init_rank}: "
                "otherwise there is nothing to allocate"
            )
        return self

    def schedule(self, batches: int) -> tuple[int, int, int]:
        """Return (total_step, tinit, tfinal) for this many batches per pass.

        Raises `ConfigError` when no step is left between `tinit` and `tfinal`.
        """
        total = self.steps * batches
        tinit = total // 10 if self.tinit is None else self.tinit
        tfinal = total // 3 if self.tfinal is None else self.tfinal
        if tinit >= total - tfinal:
            raise ConfigError(
                f"tinit={tinit} and tfinal={tfinal} leave none of the {total} steps for allocating "
                "ranks: give smaller ones, or more steps."
            )
        return total, tinit, tfinal
