"""Training something small beside a frozen model: what fine-tuning and adapters share.

`modules` says which linear modules are meant, `training_batches` what is learnt from, `trainer`
how, and `adapters` puts a PEFT adapter into the trainer's hands.
"""

from errata.kit.training.adapters import AdapterTrainer, train_adapter
from errata.kit.training.modules import ROLES, linear_modules
from errata.kit.training.trainer import Objective, Trainer, TrainerSettings, above
from errata.kit.training.training_batches import (
    Loss,
    TrainingBatch,
    aim_batch,
    request_batches,
    target_batches,
    text_batches,
)

__all__ = [
    "ROLES", "AdapterTrainer", "Loss", "Objective", "Trainer", "TrainerSettings", "TrainingBatch",
    "above", "aim_batch", "linear_modules", "request_batches", "target_batches", "text_batches",
    "train_adapter",
]  # fmt: skip
