"""Direct optimisation: the weight of a few modules is fine-tuned, in every published variant.

What is trained is the difference D of the weight W from what it is now, beside W: a module then
computes (W + D) x. `config.py` names the variants (FT, FT-L, FT-M, FT + EWC, FT + Retrain, LocFT),
each a set of switches that also combine; `algorithm.py` is the training, `difference.py` D with its
box and the ways to keep it, `fisher.py` elastic weight consolidation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_ft.config import FtConfig

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["Ft", "FtConfig"]


class Ft:
    """The plugin: one difference for all requests of a call."""

    name = "ft"
    config = FtConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: FtConfig) -> None:
        """Estimate the Fisher information of the base on the corpus, where it is asked for."""
        from errata_ft.algorithm import modules_of
        from errata_ft.fisher import fisher_of

        if config.ewc_weight:
            fisher_of(model, modules_of(model, config), config, corpus or None)

    @hookimpl
    def edit(self, model: Model, requests: Sequence[Request], config: FtConfig) -> Delta:
        """Fine-tune on all requests, on top of the edits that are active."""
        from errata_ft.algorithm import fine_tune

        return fine_tune(model, requests, config)
