"""MEMIT, Mass-Editing Memory in a Transformer (Meng et al., ICLR 2023), with and without history.

Many associations are written at once into the MLPs of a range of layers. Per layer, the change
that leaves what is known (C = E[k kᵀ], weighted λ) in place and brings the new keys K their
residuals R is a least-squares solution:

    Δ = R Kᵀ (λC + K Kᵀ)⁻¹

Published MEMIT solves it for one batch and forgets the batch. With `history: joint` all active
edits are in K and R, so that batches do not wear each other out, and each edit can be taken out.
`algorithm.py` is the paper, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_memit.config import MemitConfig

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.layer_updates import LayerUpdate
    from errata.model import Model

__all__ = ["Memit", "MemitConfig"]


class Memit:
    """The plugin: one key-value delta per request, or one low-rank delta for the batch."""

    name = "memit"
    config = MemitConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: MemitConfig) -> None:
        """Compute what belongs to the base: contexts, second moments, the norm anchor."""
        from errata.kit.closed_form.statistics import prepare

        prepare(model, corpus, config)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: MemitConfig
    ) -> Delta | Sequence[Delta]:
        """Return the change, computed from the base (frozen) or the model's present state."""
        from errata.kit.closed_form.deltas import JointProblem, deltas_of
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights
        from errata_memit.algorithm import memit

        C, λ = known_keys(model, config), second_moment_weights(model, config)

        def solve(facts: Sequence[Request], shared: bool) -> list[LayerUpdate]:
            return memit(model, facts, C, λ, config, shared=shared)

        return deltas_of(model, requests, config, solve, JointProblem.whitened(C, λ))

    @hookimpl
    def resolve(self, model: Model, delta: Delta, config: MemitConfig) -> Delta | None:
        """Return a recorded joint edit with another λ."""
        from errata.kit.closed_form.deltas import JointProblem, solved_again
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights

        C, λ = known_keys(model, config), second_moment_weights(model, config)
        return solved_again(model, delta, config, JointProblem.whitened(C, λ))
