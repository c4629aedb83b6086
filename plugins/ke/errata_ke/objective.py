"""How KnowledgeEditor's network is trained: to make the edit, under a bound on what else changes.

    min L'(x, a)  subject to  KL(P ‖ P') ≤ m        as        L' + α (KL − m),  α ≥ 0

The multiplier α rises where the constraint is broken; m shrinks while validation succeeds. The port
to decoders minimises c_edit · NLL + c_loc · KL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from errata.kit.hypernetworks import EditingNetwork

if TYPE_CHECKING:
    from torch import Tensor

    from errata.kit.hypernetworks.lessons import Answered
    from errata.kit.hypernetworks.training import Validation
    from errata_ke.config import KeConfig

SUCCESS = 0.9
"""Validation success above which the margin shrinks."""


class ConstrainedNetwork(EditingNetwork):
    """A network with the multiplier α and the bound m of its constraint.

    Attributes:
        config: the hyper-parameters.
        size: root mean square of the last changes ΔW, where that is bounded.
    """

    margin: Tensor

    def __init__(self, config: KeConfig) -> None:
        super().__init__()
        self.config = config
        self.size = torch.zeros(())
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("margin", torch.tensor(config.margin))

    def objective(self, answered: Answered) -> Tensor:
        """Return L' + α (KL − m), or the port's weighted sum.

        The gradient in α has its sign turned, so that a step of descent raises α.
        """
        config = self.config
        if config.constraint == "none":
            return config.c_edit * answered.edit.mean() + config.c_loc * answered.locality
        smoothing = config.label_smoothing
        edit = answered.edit.mean()
        if smoothing and answered.spread is not None:
            edit = (1 - smoothing) * edit + smoothing * answered.spread.mean()
        bounded = answered.locality if config.constraint == "kl" else self.size
        rising = 2 * self.alpha.detach() - self.alpha
        return edit + rising * (bounded - self.margin)

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Return what trains the network, and the multiplier."""
        config = self.config
        own = [p for name, p in self.named_parameters() if name != "alpha"]
        if config.optimiser == "adam":
            return [torch.optim.Adam(own, lr=config.lr)]
        return [
            torch.optim.RMSprop(own, lr=config.lr, centered=True),
            torch.optim.RMSprop([self.alpha], lr=config.lr_multiplier, centered=True),
        ]

    def rate(self, step: int) -> float:
        """Return the learning rate's factor: linear warm-up, then linear decay."""
        config = self.config
        if step < config.warmup:
            return (step + 1) / config.warmup
        if config.decay is None:
            return 1.0
        return max(0.0, (config.decay - step) / (config.decay - config.warmup))

    @torch.no_grad()
    def stepped(self) -> None:
        """Keep the multiplier at 0 or above."""
        self.alpha.clamp_(min=0)

    def validated(self, found: Validation) -> None:
        """Tighten the margin after a validation that succeeds."""
        if found["success"] > SUCCESS:
            self.margin.mul_(self.config.margin_decay).clamp_(min=self.config.margin_end)

    def badness(self, found: Validation) -> float:
        """Return 1 − the mean of what succeeds and what is kept, or the loss of the port."""
        if self.config.constraint == "none":
            return found["loss"]
        return 1.0 - (found["success"] + found["kept"]) / 2
