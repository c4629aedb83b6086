"""Training one LoRA block on the requests of a call."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.common.foreign_noise import quiet_imports
from errata.errors import ConfigError
from errata.kit.placement import key_state, placed_module
from errata.kit.training import (
    AdapterTrainer,
    TrainerSettings,
    linear_modules,
    target_batches,
    train_adapter,
)
from errata.kit.training.adapters import TASKS, lowest
from errata_melo.delta import Databases, RoutedAdapterDelta

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_melo.config import MeloConfig

logger = logging.getLogger("errata")


class BlockTrainer(AdapterTrainer):
    """Trains a block for a number of steps, halving the learning rate on the way.

    Attributes:
        halve_every: steps after which the learning rate is halved, again and again.
    """

    halve_every = 30

    def updated(self, step: int) -> None:
        """Halve the learning rate when its time has come."""
        if step % self.halve_every == 0:
            for group in self.optimiser.param_groups:
                group["lr"] /= 2


def edit(model: Model, requests: Sequence[Request], config: MeloConfig) -> RoutedAdapterDelta:
    """Return one LoRA block for all requests, trained with no other block in force.

    Raises `ConfigError` for a database outside of all blocks, and blocks that do not lie behind it.
    """
    with quiet_imports():
        from peft import LoraConfig

    module, written = placed_module(model, config), config.for_model(model.anatomy)
    layer, blocks = written.layer, written.blocks
    if layer is None:
        raise ConfigError(
            f"module={module!r} lies in none of the model's {model.anatomy.n_layers} blocks, and "
            "the adapted blocks must lie behind the database: give a module of a block."
        )
    if not blocks or min(blocks) <= layer:
        raise ConfigError(
            f"The database lies in block {layer} ({module}), and the adapted blocks are "
            f"{list(blocks or ())}: all of them must lie behind it. Give layer and blocks."
        )
    modules = linear_modules(model, config.target_modules, blocks)
    pairs = [(request.text, request.target) for request in requests]
    with Databases.of(model).aside():
        keys, labels = points(model, module, pairs)
        trainer = BlockTrainer(
            model,
            # One batch, as the authors train a block: each step is on all of its requests.
            target_batches(model, pairs, batch_size=len(pairs)),
            TrainerSettings.of(config),
            dropout=False,
            above=lowest(model, blocks),
            text="Training a LoRA block",
        )
        trainer.halve_every = config.halve_every
        peft_config = LoraConfig(
            task_type=TASKS.get(model.task),
            r=config.rank,
            lora_alpha=config.scale * config.rank,
            lora_dropout=0.0,
            fan_in_fan_out=model.anatomy.transposed(modules[0]),
        )
        adapter = train_adapter(model, peft_config, modules, trainer)
    logger.info("a block for %d requests: loss %.3g", len(pairs), trainer.losses[-1])
    return RoutedAdapterDelta(module, keys, labels, config.radius, adapter)


def points(
    model: Model, module: str, pairs: Sequence[tuple[str, str]]
) -> tuple[Tensor, list[list[int]]]:
    """Return the keys (m, d) of prompts, and the token ids of their targets."""
    keys, labels = [], []
    for pair in pairs:  # one at a time: a key must not depend on the prompts beside it
        (batch,) = target_batches(model, [pair])
        key, _ = key_state(model, module, batch.prompts, output=True)
        keys.append(key.cpu())
        labels.append([int(token) for token in batch.prompts.labels])
    return torch.stack(keys), labels
