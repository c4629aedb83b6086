"""Training one PEFT adapter for an edit, on top of the edits that are active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.delta.adapter_layers import no_randomness
from errata.edits.delta.adapter_training import Training, training
from errata.kit.training.trainer import Above, Objective, Trainer, TrainerSettings

if TYPE_CHECKING:
    from errata.edits.delta import AdapterDelta
    from errata.kit.training.training_batches import TrainingBatch
    from errata.model.model import Model

TASKS = {"causal": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM"}
"""Task → PEFT's name for it. For other tasks PEFT adds more than an adapter (a new head)."""


class AdapterTrainer(Trainer):
    """Trains an adapter that is on the model while `train_adapter` runs.

    Args:
        dropout: the adapter has dropout: a pass with it only hints that requests hold, and one
            without must confirm it.
        model, batches, settings, above, text: as in `Trainer`.

    Attributes:
        run: the adapter in training; there inside `train_adapter` only.
    """

    run: Training

    def __init__(
        self,
        model: Model,
        batches: Sequence[TrainingBatch],
        settings: TrainerSettings,
        *,
        dropout: bool,
        above: Above | None = None,
        text: str = "Training an adapter",
    ) -> None:
        super().__init__(model, batches, settings, above=above, text=text)
        self.certain = not dropout

    def compute(self) -> Objective:
        """Compute the loss through PEFT, which adds its own terms to it, with dropout."""
        self.run.dropout(True)
        found: Objective = self.run.peft_model()
        return found

    def holds(self) -> bool:
        """Say whether every request holds, without dropout."""
        self.run.dropout(False)
        return super().holds()


def lowest(model: Model, layers: Sequence[int] | None) -> Above | None:
    """Return what has to be run again while adapters in some blocks are trained."""
    if layers is None:
        return None
    return Above(min(model.anatomy.layer(layer) for layer in layers))


def train_adapter(
    model: Model, config: Any, modules: Sequence[str], trainer: AdapterTrainer
) -> AdapterDelta:
    """Put a new adapter on the model, train it, take it off, and return it.

    Its random initialisation and dropout come from the trainer's seed; PyTorch's global
    generators stay as they are.

    Args:
        model: the model.
        config: PEFT's configuration object.
        modules: paths of the linear modules to adapt.
        trainer: trains it.
    """
    with (
        no_randomness(trainer.settings.seed),
        torch.enable_grad(),
        training(model, config, modules, trainer.objective) as run,
    ):
        trainer.run = run
        trainer.fit(run.parameters)
        run.dropout(False)
    return run.extract()
