"""Training something small beside a frozen model: what fine-tuning and adapters share.

`modules` says which linear modules are meant, `lessons` what is learnt from, `trainer` how, and
`adapters` puts a PEFT adapter into the trainer's hands.
"""

from errata.training.adapters import AdapterTrainer, train_adapter
from errata.training.lessons import Lesson, Loss, lessons, reading
from errata.training.modules import ROLES, linear_modules
from errata.training.trainer import Objective, Trainer, TrainerSettings

__all__ = [
    "ROLES",
    "AdapterTrainer",
    "Lesson",
    "Loss",
    "Objective",
    "Trainer",
    "TrainerSettings",
    "lessons",
    "linear_modules",
    "reading",
    "train_adapter",
]
