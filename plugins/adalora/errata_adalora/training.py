"""AdaLoRA's own part of the training: the rank allocation, and how an early stop goes with it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from errata.common.foreign_noise import quiet_imports
from errata.kit.training import (
    AdapterTrainer,
    TrainerSettings,
    linear_modules,
    request_batches,
    train_adapter,
)
from errata.kit.training.adapters import TASKS, lowest

if TYPE_CHECKING:
    from errata.edits.delta import AdapterDelta
    from errata.edits.request import Request
    from errata.model import Model
    from errata_adalora.config import AdaloraConfig

logger = logging.getLogger("errata.adalora")


def train(model: Model, requests: Sequence[Request], config: AdaloraConfig) -> AdapterDelta:
    """Train one adapter for all requests on top of the active edits, and return it.

    Raises `ConfigError` for a schedule without room and for unknown modules, `EditFailed` when the
    loss is no longer finite.
    """
    with quiet_imports():
        from peft import AdaLoraConfig

    modules = linear_modules(model, config.target_modules, config.layers)
    batches = request_batches(model, requests, batch_size=config.batch_size)
    total, tinit, tfinal = config.schedule(len(batches))
    peft_config = AdaLoraConfig(
        task_type=TASKS.get(model.task),
        init_r=config.init_rank,
        target_r=config.target_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        total_step=total,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=config.delta_t,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_weight,
        fan_in_fan_out=model.anatomy.transposed(modules[0]),
    )
    settings = TrainerSettings.of(config)
    trainer = AllocatingTrainer(
        model, batches, settings, dropout=True, above=lowest(model, config.layers)
    )
    delta = train_adapter(model, peft_config, modules, trainer)
    logger.debug("adapter of ranks %s after %d steps", delta.ranks, len(trainer.losses))
    return delta


class AllocatingTrainer(AdapterTrainer):
    """Fits an adapter to batches, allocating ranks at every step.

    With early stop, the schedule of PEFT is followed until the requests hold; then the budget is
    cut to its target at once, and the steps that are left fine-tune what remains until the
    requests hold again. So an adapter never keeps more rank than its target, whenever it stops.
    """

    def updated(self, step: int) -> None:
        """Allocate ranks by the gradients of this step."""
        self._tuner.update_and_allocate(step)

    def finished(self, step: int) -> bool:
        """Cut the budget once the requests hold; stop when they hold after that."""
        schedule: Any = self.run.peft_model.peft_config["default"]
        if step <= schedule.tinit:
            return False
        total: int = schedule.total_step
        if step < total - schedule.tfinal and self.holds():
            schedule.tfinal = total - step  # this step is the last of the budget phase
            self._tuner.update_and_allocate(step)
        return step >= total - schedule.tfinal and self.holds()

    @property
    def _tuner(self) -> Any:
        return self.run.peft_model.base_model
