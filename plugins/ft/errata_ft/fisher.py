"""Elastic weight consolidation: which entries of a weight does the base rely on?

Kirkpatrick et al. (PNAS 2017, arXiv 1612.00796), equation 3: λ/2 Σ_i F_i (θ_i − θ*_i)², where F is
the diagonal of the Fisher information. Here θ* is the model as it stands, so θ − θ* = D, and

    F_i = mean over documents of (∂ mean NLL of the document's tokens / ∂θ_i)²

of the unedited model on the corpus (the empirical Fisher: the text's own tokens, not sampled ones).
Where there are pairs to keep (`retain`), the mean is over their answers instead: what the model was
made to do, as GRACE's baseline has it, and all that a classifier can be asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from errata.errors import ConfigError
from errata.kit.second_moments import documents_of, text_hash
from errata.kit.training import (
    Trainer,
    TrainerSettings,
    TrainingBatch,
    target_batches,
    text_batches,
)
from errata.model.forward import frozen
from errata_ft.difference import Difference

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model import Model
    from errata_ft.config import FtConfig


Item = TypeVar("Item")


def fisher_of(
    model: Model,
    modules: Sequence[str],
    config: FtConfig,
    corpus: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """Return F by parameter name (fp32, stored orientation): kept, or estimated on the base.

    Raises `ConfigError` when it is not there yet and edits are active.
    """
    documents = documents_of(model, corpus)
    names = list(Difference(model, modules, bias=config.bias).tensors)
    of = config.retain or text_hash(documents)
    recipe = f"{names}|{config.fisher_documents}|{config.seed}|{of}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:32]

    def compute() -> tuple[dict[str, Tensor], dict[str, Any]]:
        found = _estimate(model, modules, config, documents)
        return found, {"documents": config.fisher_documents}

    def sound(tensors: Mapping[str, Tensor], _about: Mapping[str, Any]) -> bool:
        return set(names) == set(tensors)

    tensors, _ = model.of_base("fisher", digest, compute=compute, sound=sound)
    return dict(tensors)


def sample(documents: Sequence[Item], count: int, seed: int) -> list[Item]:
    """Return some documents or pairs (all, where there are no more), drawn with a seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents), generator=generator).tolist()
    return [documents[index] for index in order[:count]]


def _estimate(
    model: Model, modules: Sequence[str], config: FtConfig, documents: Sequence[str]
) -> dict[str, Tensor]:
    # One document (or pair) per batch: it is the gradient of each that is squared.
    if config.retain:
        pairs = sample(config.retain, config.fisher_documents, config.seed)
        each = target_batches(model, pairs, batch_size=1)
    else:
        chosen = sample(documents, config.fisher_documents, config.seed)
        each = text_batches(model, chosen, batch_size=1, seed=config.seed)
    if not each:
        raise ConfigError("No document of the corpus has two tokens: there is nothing to predict.")
    difference = Difference(model, modules, bias=config.bias)
    sums = {name: torch.zeros_like(d) for name, d in difference.detached().items()}
    gradients = _Gradients(model, each)
    with torch.enable_grad(), frozen(model.module), difference.attached():
        for batch in model.progress.track(each, "Fisher information", len(each)):
            found = torch.autograd.grad(gradients.loss(batch), difference.leaves)
            for total, gradient in zip(sums.values(), found, strict=True):
                total.add_(gradient.square())
    return {name: (total / len(each)).float().cpu() for name, total in sums.items()}


class _Gradients(Trainer):
    """Computes the loss of a batch, and trains nothing."""

    def __init__(self, model: Model, batches: Sequence[TrainingBatch]) -> None:
        super().__init__(model, batches, TrainerSettings(lr=1.0, steps=1))

    def loss(self, batch: TrainingBatch) -> Tensor:
        """Return the mean NLL (nats) of a document's tokens."""
        self._current = batch
        return self.objective().loss
