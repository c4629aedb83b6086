"""T-Patcher, Transformer-Patcher: one mistake, one neuron (Huang et al., ICLR 2023).

For each target token that the model gets wrong, a neuron is added to the last feed-forward network:

    FFN(h) + Σ_j (a_j ⊙ v_j) · act(k_j · h + b_j)

It is trained to fire at its mistake (the activation loss), to stay silent on a memory of other
hidden states (the memory loss), and to put the token right. `algorithm.py` is the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_t_patcher.config import TPatcherConfig

if TYPE_CHECKING:
    from errata.edits.delta.neurons import NeuronsDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["TPatcher", "TPatcherConfig"]


class TPatcher:
    """The plugin: a few neurons per request."""

    name = "t-patcher"
    config = TPatcherConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: TPatcherConfig) -> None:
        """Remember hidden states of plain text, which patches must leave alone."""
        from errata_t_patcher.algorithm import memories

        memories(model, config, corpus)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: TPatcherConfig
    ) -> list[NeuronsDelta]:
        """Return the neurons of each request, trained with those of all others in force."""
        from errata_t_patcher.algorithm import patch

        return [patch(model, request, config) for request in requests]
