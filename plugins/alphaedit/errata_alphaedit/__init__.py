"""AlphaEdit, null-space constrained editing (Fang et al., ICLR 2025).

Instead of weighing new against known, everything that ordinary text uses is left alone exactly:
the change is projected onto the directions in which C = E[k kᵀ] has next to no weight. With P the
projector, K the new keys, K_p those of earlier edits:

    Δ = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L2 I)⁻¹

`algorithm.py` is the paper in its reduced form, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from errata.contract.hooks import hookimpl
from errata.kit.closed_form.method import ClosedForm, Found
from errata_alphaedit.config import AlphaEditConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.model import Model

__all__ = ["AlphaEdit", "AlphaEditConfig"]


class AlphaEdit(ClosedForm):
    """The plugin."""

    name = "alphaedit"
    config = AlphaEditConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: ClosedFormConfig) -> None:
        """Compute what belongs to the base, the null spaces among it."""
        from errata.kit.closed_form.statistics import prepare
        from errata_alphaedit.algorithm import metrics_of

        config = self.settled(model, config)
        prepare(model, corpus, config)
        metrics_of(model, cast(AlphaEditConfig, config))

    def find(self, model: Model, requests: Sequence[Request], config: ClosedFormConfig) -> Found:
        """Solve within the null space."""
        from errata_alphaedit.algorithm import alphaedit, metrics_of

        settings = cast(AlphaEditConfig, config)
        return alphaedit(model, requests, metrics_of(model, settings), settings)
