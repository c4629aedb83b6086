"""MEND, Model Editor Networks with Gradient Decomposition (Mitchell et al., ICLR 2022).

The gradient of a matrix W on one edit is a sum over its tokens, ∂L/∂W = Σ_t δ_t x_tᵀ. A small
network turns each pair (x_t, δ_t) into another one, and the edit is

    W ← W ± η Σ_t δ̃_t x̃_tᵀ        (x̃, δ̃) = g(x, δ)

The network g and the rate η are trained once, on other edits; then an edit is one pass back and one
through g. Names such as "MEND-CF" only say what it was trained on (CounterFact). `network.py` is g,
`config.py` names the published settings and the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_mend.config import MendConfig

if TYPE_CHECKING:
    from errata.edits.delta import LowRankDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Mend", "MendConfig"]


class Mend:
    """The plugin: one low-rank change per request, computed at the unedited model."""

    name = "mend"
    config = MendConfig

    @hookimpl
    def prepare(self, model: Model, training: Sequence[Request], config: MendConfig) -> None:
        """Train the network, where that was not done yet."""
        from errata_mend.network import trained

        trained(model, config, training)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: MendConfig
    ) -> list[LowRankDelta]:
        """Return what the network makes of each request's gradient."""
        from errata_mend.network import edit

        return edit(model, requests, config)
