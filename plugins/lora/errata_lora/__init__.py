"""LoRA as an editor: each edit is a plain low-rank adapter beside the frozen weights.

Hu et al. (ICLR 2022, arXiv 2106.09685): a linear module computes W x + (α/r) B A x, of which only
A (r, d_in) and B (d_out, r) are trained, on the target's tokens. Through the installed PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_lora.config import LoraConfig

if TYPE_CHECKING:
    from errata.edits.delta import AdapterDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Lora", "LoraConfig"]


class Lora:
    """The plugin: one adapter for all requests of a call."""

    name = "lora"
    config = LoraConfig

    @hookimpl
    def edit(self, model: Model, requests: Sequence[Request], config: LoraConfig) -> AdapterDelta:
        """Train one adapter for all requests, on top of the edits that are active."""
        from errata_lora.training import train

        return train(model, requests, config)
