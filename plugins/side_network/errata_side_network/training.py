"""Training a side network further on one request, as grace/editors/defer.py and memory.py do."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.kit.placement import key_state, placed_module
from errata.kit.training import Trainer, TrainerSettings, above, target_batches
from errata.model.forward import frozen, patched
from errata_side_network.delta import Place, SideNetworkDelta, SideNetworks

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_side_network.config import DeferConfig
    from errata_side_network.networks import Parameters, SideNetwork

logger = logging.getLogger("errata")


def edit(
    model: Model, requests: Sequence[Request], config: DeferConfig, network: SideNetwork
) -> list[SideNetworkDelta]:
    """Return what each request changes in the network, one after the other."""
    place = Place(network.name, network.size, placed_module(model, config), config.seed)
    networks = SideNetworks.of(model)
    active = [
        (edit_id, delta)
        for edit_id, delta in model.active(SideNetworkDelta.kind)
        if delta.place == place and delta.differences
    ]
    parameters: Parameters = networks.sums(active).get(place) or place.start(model)
    made = []
    in_force = bool(active)
    for request in requests:
        with networks.aside(), frozen(model.module):
            after = train(model, request, config, place, parameters, in_force)
        differences = {n: after[n] - parameters[n] for n in after}
        made.append(SideNetworkDelta(place, differences, model.fingerprint))
        # What the next one starts from is what will be put on: the sum, not the trained tensors.
        parameters = {n: t + differences[n] if differences else t for n, t in parameters.items()}
        in_force = in_force or bool(differences)
    return made


def train(
    model: Model,
    request: Request,
    config: DeferConfig,
    place: Place,
    parameters: Parameters,
    in_force: bool,
) -> dict[str, Tensor]:
    """Return the parameters after training on one request; nothing where it holds already.

    Raises `EditFailed` when the loss is no longer finite.
    """
    network, module = place.function(), place.module
    (batch,) = target_batches(model, [(request.text, request.target)])
    device = model.parameter(f"{module}.weight").device
    leaves = {n: t.detach().to(device, copy=True) for n, t in parameters.items()}
    q = key_state(model, module, batch.prompts)[0][None]

    def hard(output: Tensor) -> Tensor:
        g, y = network.answer(leaves, q)
        return y.to(output).expand_as(output) if in_force and float(g) >= 0.5 else output

    def soft(output: Tensor) -> Tensor:
        g, y = network.answer(leaves, q)
        return (g * y + (1 - g) * output.float()).to(output.dtype)

    settings = TrainerSettings(lr=config.lr, steps=config.steps, early_stop=False)
    what = f"Training {network.name}"
    trainer = Trainer(model, [batch], settings, above=above(model, [module]), text=what)
    if config.only_when_wrong:
        with patched(model.module, {module: hard}):
            if trainer.holds():
                logger.info("%r is what the model says already", request.target_new)
                return {}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with torch.enable_grad(), patched(model.module, {module: soft}):
        trainer.fit(list(leaves.values()))
    return {name: leaf.detach().cpu() for name, leaf in leaves.items()}
