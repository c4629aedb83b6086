"""PMET, precise model editing (Li et al., AAAI 2024): MEMIT with values for attention and MLP.

MEMIT asks the MLPs for everything that the block should output. PMET optimises what attention and
MLP should each output at the last edited layer, together, and writes only the MLP's part: what
attention would have to say is not forced into the MLP. The residual is shared out by the square
root of the layers that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from errata.kit.closed_form.method import ClosedForm, Found
from errata_pmet.config import PmetConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.model import Model

__all__ = ["Pmet", "PmetConfig"]


class Pmet(ClosedForm):
    """The plugin."""

    name = "pmet"
    config = PmetConfig

    def find(self, model: Model, requests: Sequence[Request], config: ClosedFormConfig) -> Found:
        """Optimise both parts, write one."""
        from errata.kit.closed_form.statistics import whitenings_of
        from errata_pmet.algorithm import pmet

        settings = cast(PmetConfig, config)
        return pmet(model, requests, whitenings_of(model, settings), settings)
