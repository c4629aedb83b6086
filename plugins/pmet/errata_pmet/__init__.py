"""PMET, precise model editing (Li et al., AAAI 2024): MEMIT with values for attention and MLP.

MEMIT asks the MLPs for everything that the block should output. PMET optimises what attention and
MLP should each output at the last edited layer, together, and writes only the MLP's part: what
attention would have to say is not forced into the MLP. The residual is shared out by the square
root of the layers that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_pmet.config import PmetConfig

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.layer_updates import LayerUpdate
    from errata.model import Model

__all__ = ["Pmet", "PmetConfig"]


class Pmet:
    """The plugin: one key-value delta per request, or one low-rank delta for the batch."""

    name = "pmet"
    config = PmetConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: PmetConfig) -> None:
        """Compute what belongs to the base: contexts, second moments, the norm anchor."""
        from errata.kit.closed_form.statistics import prepare

        prepare(model, corpus, config)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: PmetConfig
    ) -> Delta | Sequence[Delta]:
        """Return the change, computed from the base (frozen) or the model's present state."""
        from errata.kit.closed_form.deltas import JointProblem, deltas_of
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights
        from errata_pmet.algorithm import pmet

        C, λ = known_keys(model, config), second_moment_weights(model, config)

        def solve(facts: Sequence[Request], shared: bool) -> list[LayerUpdate]:
            return pmet(model, facts, C, λ, config, shared=shared)

        return deltas_of(model, requests, config, solve, JointProblem.whitened(C, λ))

    @hookimpl
    def resolve(self, model: Model, delta: Delta, config: PmetConfig) -> Delta | None:
        """Return a recorded joint edit with another λ."""
        from errata.kit.closed_form.deltas import JointProblem, solved_again
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights

        C, λ = known_keys(model, config), second_moment_weights(model, config)
        return solved_again(model, delta, config, JointProblem.whitened(C, λ))
