"""EMMET, equality-constrained mass editing (Gupta, Sajnani, Anumanchipalli, EMNLP Findings 2024).

ROME meets its one constraint exactly, MEMIT meets many in the least-squares sense; EMMET meets
many exactly, by the same preservation objective:

    min ‖Δ C^½‖  with  Δ K = R      ⇒      Δ = R (Kᵀ C⁻¹ K)⁻¹ Kᵀ C⁻¹

`algorithm.py` is the paper, `config.py` its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from errata.kit.closed_form.method import ClosedForm, Found
from errata_emmet.config import EmmetConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.model import Model

__all__ = ["Emmet", "EmmetConfig"]


class Emmet(ClosedForm):
    """The plugin."""

    name = "emmet"
    config = EmmetConfig

    def find(self, model: Model, requests: Sequence[Request], config: ClosedFormConfig) -> Found:
        """Solve the constrained problem."""
        from errata.kit.closed_form.statistics import whitenings_of
        from errata_emmet.algorithm import emmet

        settings = cast(EmmetConfig, config)
        return emmet(model, requests, whitenings_of(model, settings), settings)
