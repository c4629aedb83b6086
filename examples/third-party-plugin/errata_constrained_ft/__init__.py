"""Constrained fine-tuning: train one MLP projection, never further than ε from where it was.

Zhu et al., "Modifying Memories in Transformer Models" (2020), in the form that Meng et al. (2022)
use as the baseline FT-L: Adam on the down-projection W of one layer, and after each step every
entry is put back into the box |W − W₀| ≤ ε. Unlike that baseline's published code, the loss is
the ordinary language-model loss over the target's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy

from errata import MethodConfig, Model, Request, hookimpl
from errata.edits.delta import DenseDelta
from errata.model.running import prepare, run


class ConstrainedFineTuningConfig(MethodConfig):
    """Hyper-parameters."""

    layer: int = Field(default=0, description="Block whose MLP down-projection is trained")
    steps: int = Field(default=25, ge=1, description="Optimiser steps")
    lr: float = Field(default=5e-4, gt=0, description="Adam's learning rate")
    epsilon: float = Field(default=5e-4, gt=0, description="Largest change of an entry (L∞)")
    early_stop: float = Field(default=1e-2, ge=0, description="Stop below this loss (nats)")


class ConstrainedFineTuning:
    """The plugin: a name, a configuration class, and the `edit` hook."""

    name = "constrained-ft"
    config = ConstrainedFineTuningConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: ConstrainedFineTuningConfig
    ) -> DenseDelta:
        """Train how W differs, on all requests together; return the difference."""
        batch = prepare(
            model,
            [request.text for request in requests],
            [request.target for request in requests],
        )

        path = model.anatomy.mlp_out(config.layer)
        name = model.anatomy.weight(path)
        # We train the difference W − W₀ (as W is stored) and never write W itself: a hook adds its
        # effect to the module's output. That also works where an adapter wraps the module.
        difference = torch.zeros(model.parameter(name).shape, device=model.device)
        difference.requires_grad_()

        def add(module: torch.nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            stored = difference if model.anatomy.transposed(path) else difference.T
            return output + inputs[0] @ stored.to(output.dtype)

        optimiser = torch.optim.Adam([difference], lr=config.lr)
        hook = model.module.get_submodule(path).register_forward_hook(add)
        try:
            for _ in model.progress.track(range(config.steps), "Training"):
                loss = cross_entropy(run(model, batch), batch.labels)
                if loss.item() < config.early_stop:
                    break
                (difference.grad,) = torch.autograd.grad(loss, [difference])
                optimiser.step()
                with torch.no_grad():
                    difference.clamp_(-config.epsilon, config.epsilon)
        finally:
            hook.remove()
        return DenseDelta({name: difference.detach().cpu()})
