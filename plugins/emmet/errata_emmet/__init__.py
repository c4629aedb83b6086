"""EMMET, equality-constrained mass editing (Gupta, Sajnani, Anumanchipalli, EMNLP Findings 2024).

ROME meets its one constraint exactly, MEMIT meets many in the least-squares sense; EMMET meets
many exactly, by the same preservation objective:

    min ‖Δ C^½‖  with  Δ K = R      ⇒      Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

`algorithm.py` is the paper, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_emmet.config import EmmetConfig

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.layer_updates import LayerUpdate
    from errata.model import Model

__all__ = ["Emmet", "EmmetConfig"]


class Emmet:
    """The plugin: one key-value delta per request, or one low-rank delta for the batch."""

    name = "emmet"
    config = EmmetConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: EmmetConfig) -> None:
        """Compute what belongs to the base: contexts, second moments, the norm anchor."""
        from errata.kit.closed_form.statistics import prepare

        prepare(model, corpus, config)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: EmmetConfig
    ) -> Delta | Sequence[Delta]:
        """Return the change, computed from the base (frozen) or the model's present state."""
        from errata.kit.closed_form.deltas import JointProblem, deltas_of
        from errata.kit.closed_form.statistics import known_keys
        from errata_emmet.algorithm import emmet

        C = known_keys(model, config)

        def solve(facts: Sequence[Request], shared: bool) -> list[LayerUpdate]:
            return emmet(model, facts, C, config, shared=shared)

        joint = JointProblem.whitened(C, dict.fromkeys(C, config.slack))
        return deltas_of(model, requests, config, solve, joint)

    @hookimpl
    def resolve(self, model: Model, delta: Delta, config: EmmetConfig) -> Delta | None:
        """Return a recorded joint edit with another ridge."""
        from errata.kit.closed_form.deltas import JointProblem, solved_again
        from errata.kit.closed_form.statistics import known_keys

        C = known_keys(model, config)
        joint = JointProblem.whitened(C, dict.fromkeys(C, config.slack))
        return solved_again(model, delta, config, joint)
