"""KnowledgeEditor (De Cao, Aziz, Titov: Editing Factual Knowledge in Language Models, EMNLP 2021).

A recurrent network reads what the model says, what it shall say and to what, and from that gates
the gradient G = ∂L/∂W of the edit in every matrix:

    ΔW = σ(s) ( G ⊙ softmax(a_row) a_colᵀ + softmax(b_row) b_colᵀ )

It is trained to make the edit under a bound on what else changes, KL(P ‖ P') ≤ m, by a Lagrange
multiplier. `network.py` is the network, `objective.py` what it is trained for, and `editing.py` an
edit. `config.py` has the published settings, and those of the port to decoders by MEND's authors
(variant `efk`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_ke.config import KeConfig

if TYPE_CHECKING:
    from errata.edits.delta import LowRankDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Ke", "KeConfig"]


class Ke:
    """The plugin: one low-rank change per request, computed at the unedited model."""

    name = "ke"
    config = KeConfig

    @hookimpl
    def prepare(self, model: Model, training: Sequence[Request], config: KeConfig) -> None:
        """Train the network, where that was not done yet."""
        from errata_ke.editing import trained

        trained(model, config, training)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: KeConfig
    ) -> list[LowRankDelta]:
        """Return what the network makes of each request's gradient, again until it holds."""
        from errata_ke.editing import edit

        return edit(model, requests, config)
