"""Training the network of a set of facts."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch

from errata.common.foreign_noise import quiet_imports
from errata.edits.delta.neurons import Neurons, NeuronsDelta, hang
from errata.kit.feed_forward import is_gated, site_of
from errata.kit.training import Trainer, TrainerSettings, above, target_batches
from errata.model.forward import frozen

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_calinet.config import CaliNetConfig

logger = logging.getLogger("errata")


class AdafactorTrainer(Trainer):
    """Trains by Adafactor with a constant learning rate, as the authors do."""

    def optimiser_for(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return Adafactor without relative steps and without scaling by the parameter."""
        with quiet_imports():
            from transformers.optimization import Adafactor

        made = Adafactor(
            list(parameters),
            lr=self.settings.lr,
            scale_parameter=False,
            relative_step=False,
            warmup_init=False,
        )
        return cast("torch.optim.Optimizer", made)


def train(model: Model, requests: Sequence[Request], config: CaliNetConfig) -> NeuronsDelta:
    """Return the network that makes the model say what all requests want.

    Raises `EditFailed` when the loss is no longer finite.
    """
    layer = config.for_model(model.anatomy).layer
    assert layer is not None
    site = site_of(model, layer, gated=is_gated(model, layer))
    neurons = _untrained(model, site.reads, site.writes, site.gated, config)
    pairs = [
        (prompt, request.target)
        for request in requests
        for prompt in (request.text, *request.paraphrases[: config.paraphrases])
    ]
    trainer = AdafactorTrainer(
        model,
        target_batches(model, pairs, batch_size=config.batch_size),
        TrainerSettings.of(config),
        above=above(model, [site.reads, site.writes]),
        text="Training CaliNET",
    )
    parts = (neurons.keys, neurons.values, neurons.gates)
    leaves = [part.requires_grad_() for part in parts if part is not None]
    undo = hang(model.module, site, neurons)
    try:
        with torch.enable_grad(), frozen(model.module):
            trainer.fit(leaves)
    finally:
        undo()
    logger.info(
        "%d neurons for %d prompts: loss %.3g", config.width, len(pairs), trainer.losses[-1]
    )
    keys, values, gates = (None if part is None else part.detach().cpu() for part in parts)
    assert keys is not None
    assert values is not None
    return NeuronsDelta(site, Neurons(keys, neurons.biases.cpu(), values, gates))


def _untrained(
    model: Model, reads: str, writes: str, gated: bool, config: CaliNetConfig
) -> Neurons:
    """Return a network that adds nothing: in projections as `torch.nn.Linear` begins, out zero."""
    anatomy, module = model.anatomy, model.module
    d_in, d_out = anatomy.shape(module, reads)[1], anatomy.shape(module, writes)[0]
    generator = torch.Generator().manual_seed(config.seed)
    device = model.parameter(f"{writes}.weight").device

    def drawn() -> Tensor:
        uniform = torch.rand(config.width, d_in, generator=generator)
        return ((2 * uniform - 1) / math.sqrt(d_in)).to(device)

    return Neurons(
        drawn(),
        torch.zeros(config.width, device=device),
        torch.zeros(config.width, d_out, device=device),
        drawn() if gated else None,
    )
