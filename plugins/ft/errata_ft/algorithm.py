"""Fine-tuning D on a batch of requests, with what the variants add to the loss or to a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.errors import ConfigError
from errata.kit.second_moments import documents_of
from errata.kit.training import (
    Objective,
    Trainer,
    TrainerSettings,
    TrainingBatch,
    above,
    linear_modules,
    request_batches,
    target_batches,
    text_batches,
)
from errata.kit.training.training_batches import batch_loss
from errata.model.forward import frozen
from errata_ft.difference import Difference, Stored, forms, trained_modules
from errata_ft.fisher import fisher_of, sample

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.model import Model
    from errata_ft.config import FtConfig

logger = logging.getLogger("errata.ft")

_REPLAYED = 8  # retained samples per step


def fine_tune(model: Model, requests: Sequence[Request], config: FtConfig) -> Delta:
    """Train one difference for all requests on top of the active edits, and return it.

    Raises:
        ConfigError: unknown modules or layers, no text to replay.
        EditFailed: a loss is not finite.
        CapabilityError: a loss that this kind of transformer does not have, or a shared weight.
    """
    modules = modules_of(model, config)
    difference = Difference(model, modules, bias=config.bias)
    if config.norm_constraint is not None:
        difference.box(config.norm_constraint)
    # Depth first means one request at a time: a batch of them would be trained together.
    size = 1 if config.order == "depth-first" else config.batch_size
    batches = request_batches(
        model, requests, loss=config.loss, batch_size=size, end=config.append_end
    )
    with torch.enable_grad(), frozen(model.module):
        tuner = FineTuner(model, batches, difference, modules, config)
        with difference.attached():
            tuner.fit(difference.leaves)
        stored = _stored(model, tuner, difference, config)
    logger.info(
        "%s: %d steps, loss %.3g to %.3g, kept as %s (%d bytes, relative error %.2g).",
        config.variant, len(tuner.losses), tuner.losses[0], tuner.losses[-1],
        stored.delta.kind, stored.delta.nbytes, stored.error,
    )  # fmt: skip
    return stored.delta


def modules_of(model: Model, config: FtConfig) -> list[str]:
    """Return the paths of the modules that are trained."""
    written = config.for_model(model.anatomy)
    assert written.layers is not None
    modules = linear_modules(model, written.target_modules, written.layers)
    trained_modules(model, modules)
    return modules


class FineTuner(Trainer):
    """Trains D: the loss of the requests, replayed samples, and the quadratic penalty.

    Args:
        model: the model.
        batches: the requests.
        difference: what is trained; attach it before `fit`.
        modules: where it is.
        config: the hyper-parameters.
    """

    def __init__(
        self,
        model: Model,
        batches: Sequence[TrainingBatch],
        difference: Difference,
        modules: Sequence[str],
        config: FtConfig,
    ) -> None:
        settings = TrainerSettings.of(config)
        super().__init__(model, batches, settings, above=above(model, modules), text="Fine-tuning")
        self._difference = difference
        self._config = config
        self._fisher: dict[str, Tensor] | None = None
        if config.ewc_weight:
            kept = fisher_of(model, modules, config)
            self._fisher = {name: kept[name].to(d) for name, d in difference.tensors.items()}
        self._retained = self._retain()
        self._turn = 0
        self.record(self._retained)

    def compute(self) -> Objective:
        """Compute the loss of the current requests and what is added to it."""
        found = self.objective()
        if self.settings.early_stop and all(found.holds):
            return found  # no step is taken
        if self._retained and self._config.retain_weight:
            batch = self._retained[self._turn % len(self._retained)]
            self._turn += 1
            loss, _ = batch_loss(batch, self.logits(batch))
            found.loss = found.loss + self._config.retain_weight * loss
        if self._fisher is not None:
            penalty = self._config.ewc_weight * self._difference.quadratic(self._fisher)
            found.loss = found.loss + penalty.to(found.loss.device)
        return found

    def updated(self, step: int) -> None:
        """Put D back into its box."""
        self._difference.clamp()

    def _retain(self) -> list[TrainingBatch]:
        """Return the batches to replay: pairs to keep first, then documents."""
        model, config = self.model, self._config
        kept = target_batches(model, config.retain, batch_size=_REPLAYED) if config.retain else []
        if config.retain_documents:
            chosen = sample(documents_of(model), config.retain_documents, config.seed)
            texts = text_batches(model, chosen, batch_size=_REPLAYED, seed=config.seed)
            if not texts:
                raise ConfigError(
                    "No document of the corpus has two tokens: there is nothing to replay. Give "
                    "other text (Editor(corpus=…)) or retain_documents=0."
                )
            kept += texts
        return kept


def _stored(model: Model, tuner: FineTuner, difference: Difference, config: FtConfig) -> Stored:
    """Return the smallest form of D under which every request that holds goes on holding.

    Each form is tried in D's place. Inside a box only exact forms are tried: an approximation would
    leave it.
    """
    error = config.store_error if config.norm_constraint is None else 0.0
    whole = difference.detached()
    with difference.attached():
        wanted = tuner.holding()
    form = None
    for form in forms(whole, difference.transposed, config.store, error):
        if form.error == 0.0 or config.store != "auto":
            return form
        _put(difference, form.values)
        with difference.attached():
            held = tuner.holding()
        _put(difference, whole)
        if all(now or not before for before, now in zip(wanted, held, strict=True)):
            return form
    assert form is not None
    return form


@torch.no_grad()
def _put(difference: Difference, values: dict[str, Tensor]) -> None:
    for name, tensor in difference.tensors.items():
        tensor.copy_(values[name])
