"""CaliNET, calibrating factual knowledge (Dong et al., EMNLP Findings 2022).

A small feed-forward network E is added beside that of the last decoder block and trained on a whole
set of facts, everything else frozen:

    h ← h + FFN(LN h) + E(LN h),   E(x) = W_o act(W_i x)   (gated: W_o (act(W_i x) ⊙ W_g x))

The set is one edit and comes out as one. E begins with W_o = 0, so that an untrained one changes
nothing (the authors' begins at random, and changes the model before it has learnt anything). Where
a norm follows the network (Gemma 2 and 3), E stands in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_calinet.config import CaliNetConfig

if TYPE_CHECKING:
    from errata.edits.delta.neurons import NeuronsDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["CaliNet", "CaliNetConfig"]


class CaliNet:
    """The plugin: the neurons of one network for all requests of a call."""

    name = "calinet"
    config = CaliNetConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: CaliNetConfig
    ) -> NeuronsDelta:
        """Train one network for all requests, with the active edits in force."""
        from errata_calinet.training import train

        return train(model, requests, config)
