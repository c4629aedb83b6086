"""AdaLoRA as an editor: each edit is a PEFT adapter whose ranks were allocated while training.

KnowEdit's baseline (Zhang et al. 2024, arXiv 2401.01286) on the AdaLoRA of Zhang et al. (ICLR 2023,
arXiv 2303.10512), through the installed PEFT. The authors' code asks for AdaLoRA and never calls
the rank allocation, so what it measures is a plain SVD-shaped adapter of rank 12; current PEFT
refuses to build it at all, because the schedule's length is missing. Here the schedule is given,
ranks are allocated at every step, and the orthogonal regularisation is part of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_adalora.config import AdaloraConfig

if TYPE_CHECKING:
    from errata.edits.delta import AdapterDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Adalora", "AdaloraConfig"]


class Adalora:
    """The plugin: one adapter for all requests of a call."""

    name = "adalora"
    config = AdaloraConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: AdaloraConfig
    ) -> AdapterDelta:
        """Train one adapter for all requests, on top of the edits that are active."""
        from errata_adalora.training import train

        return train(model, requests, config)
