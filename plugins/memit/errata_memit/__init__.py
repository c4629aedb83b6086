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
        from errata.kit.closed_form.deltas import deltas_of
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights
        from errata.kit.same_subject import sharing
        from errata_memit.algorithm import memit

        C = known_keys(model, config)
        # The joint problem of all active edits: M = C⁻¹, and λ is what a miss costs.
        M = {layer: matrix.metric for layer, matrix in C.items()}
        λ = second_moment_weights(model, config)

        def compute(facts: Sequence[Request], shared: bool = False) -> Delta | Sequence[Delta]:
            updates = memit(model, facts, C, config, shared=shared)
            return deltas_of(model, facts, updates, config, metrics=M, slack=λ)

        return sharing(model, requests, compute) if config.shares else compute(requests)

    @hookimpl
    def resolve(self, model: Model, delta: Delta, config: MemitConfig) -> Delta | None:
        """Return a recorded joint edit with another λ."""
        from errata.kit.closed_form.deltas import solved_again
        from errata.kit.closed_form.statistics import known_keys, second_moment_weights

        M = {layer: matrix.metric for layer, matrix in known_keys(model, config).items()}
        λ = second_moment_weights(model, config)
        return solved_again(model, delta, config, metrics=M, slack=λ)
