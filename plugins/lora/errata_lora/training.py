"""Training one LoRA adapter for all requests of a call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
    from errata_lora.config import LoraConfig

logger = logging.getLogger("errata.lora")


def train(model: Model, requests: Sequence[Request], config: LoraConfig) -> AdapterDelta:
    """Train one adapter for all requests on top of the active edits, and return it.

    Raises `ConfigError` for unknown modules, `EditFailed` when the loss is no longer finite.
    """
    with quiet_imports():
        from peft import LoraConfig as PeftConfig

    modules = linear_modules(model, config.target_modules, config.layers)
    # Depth first means one request at a time: a batch of them would be trained together.
    size = 1 if config.order == "depth-first" else config.batch_size
    batches = request_batches(model, requests, batch_size=size, end=config.append_end)
    peft_config = PeftConfig(
        task_type=TASKS.get(model.task),
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        fan_in_fan_out=model.anatomy.transposed(modules[0]),
    )
    settings = TrainerSettings.of(config)
    trainer = AdapterTrainer(
        model, batches, settings, dropout=config.dropout > 0, above=lowest(model, config.layers)
    )
    delta = train_adapter(model, peft_config, modules, trainer)
    logger.debug("adapter of rank %d after %d steps", config.rank, len(trainer.losses))
    return delta
