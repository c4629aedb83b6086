"""AlphaEdit, null-space constrained editing (Fang et al., ICLR 2025).

Instead of weighing new against known, everything that ordinary text uses is left alone exactly:
the change is projected onto the directions in which C = E[k kᵀ] has next to no weight. With P the
projector, K the new keys, K_p those of earlier edits:

    Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2 I)⁻¹

Batches as published (`history: none`) take K_p from the published AlphaEdit edits that are active.
With `history: joint` all active edits are one problem, and K_p is empty. `algorithm.py` is the
paper, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_alphaedit.config import AlphaEditConfig

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.layer_updates import LayerUpdate
    from errata.model import Model

__all__ = ["AlphaEdit", "AlphaEditConfig"]


class AlphaEdit:
    """The plugin: one key-value delta per request, or one low-rank delta for the batch."""

    name = "alphaedit"
    config = AlphaEditConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: AlphaEditConfig) -> None:
        """Compute what belongs to the base, the null spaces among it."""
        from errata.kit.closed_form.statistics import prepare
        from errata_alphaedit.algorithm import null_spaces

        prepare(model, corpus, config)
        null_spaces(model, config)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: AlphaEditConfig
    ) -> Delta | Sequence[Delta]:
        """Return the change, computed from the base (frozen) or the model's present state."""
        from errata.kit.closed_form.deltas import JointProblem, deltas_of
        from errata_alphaedit.algorithm import alphaedit, earlier_requests, null_spaces

        P = null_spaces(model, config)
        earlier = earlier_requests(model, self.name) if config.history == "none" else {}

        def solve(facts: Sequence[Request], shared: bool) -> list[LayerUpdate]:
            return alphaedit(model, facts, P, config, earlier, shared=shared)

        # Of all active edits, too: M = P, and L2 is what a miss costs.
        joint = JointProblem(P, dict.fromkeys(P, config.l2))
        return deltas_of(model, requests, config, solve, joint)

    @hookimpl
    def resolve(self, model: Model, delta: Delta, config: AlphaEditConfig) -> Delta | None:
        """Return a recorded joint edit with another null space or L2."""
        from errata.kit.closed_form.deltas import JointProblem, solved_again
        from errata_alphaedit.algorithm import null_spaces

        P = null_spaces(model, config)
        return solved_again(model, delta, config, JointProblem(P, dict.fromkeys(P, config.l2)))
