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
from typing import TYPE_CHECKING, cast

from errata.kit.closed_form.method import ClosedForm, Found
from errata_memit.config import MemitConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.model import Model

__all__ = ["Memit", "MemitConfig"]


class Memit(ClosedForm):
    """The plugin."""

    name = "memit"
    config = MemitConfig

    def find(self, model: Model, requests: Sequence[Request], config: ClosedFormConfig) -> Found:
        """Run algorithm 1."""
        from errata.kit.closed_form.statistics import whitenings_of
        from errata_memit.algorithm import memit

        settings = cast(MemitConfig, config)
        return memit(model, requests, whitenings_of(model, settings), settings)
