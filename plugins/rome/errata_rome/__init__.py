"""ROME, Rank-One Model Editing (Meng et al., NeurIPS 2022), with r-ROME and p-ROME.

One MLP is read as a memory of keys and values, W k ≈ v. An edit writes one more pair (k*, v*) into
it by the smallest change that leaves what is known in place:

    min ‖Ŵ K − V‖  with  Ŵ k* = v*      ⇒      Ŵ = W + Λ (C⁻¹ k*)ᵀ,   C = E[k kᵀ]

`algorithm.py` is the paper, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_rome.config import RomeConfig

if TYPE_CHECKING:
    from errata.edits.delta import LowRankDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Rome", "RomeConfig"]


class Rome:
    """The plugin: one rank-one delta per request."""

    name = "rome"
    config = RomeConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: RomeConfig) -> None:
        """Compute what belongs to the base: the second moment of the layer, the contexts."""
        from errata_rome.algorithm import contexts_of, statistic_of

        contexts_of(model, config)
        statistic_of(model, config, corpus)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: RomeConfig
    ) -> list[LowRankDelta]:
        """Return one rank-one delta per request, all computed from the model's present state."""
        from errata_rome.algorithm import contexts_of, layer_of, rome, statistic_of

        C = statistic_of(model, config)
        edits = rome(model, requests, contexts_of(model, config), C, config)
        return [edit.delta(model, layer_of(model, config)) for edit in edits]
