"""Knowledge neurons as an editor (Dai et al., ACL 2022): change what a fact's neurons write.

A neuron i of an MLP adds its activation times its *value slot*, column i of the down projection,
to the residual stream. Section 5 of the paper edits by these slots alone:

    W[:, i] ← W[:, i] − λ₁ e(o) + λ₂ e(o*),  e the token's (output) embedding

The paper also empties the slots, to erase whole relations. Of a single fact that erases nothing:
on the models measured the old answer was generated as before (docs/results/kinds.md). So erasing
is not offered.

The neurons are found by `errata.locate.knowledge_neurons`. `algorithm.py` is the edit, `config.py`
its hyper-parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_kn.config import KnConfig

if TYPE_CHECKING:
    from errata.edits.delta import SparseRowsDelta
    from errata.edits.request import Request
    from errata.locate import Location
    from errata.model import Model

__all__ = ["Kn", "KnConfig"]


class Kn:
    """The plugin: locates by integrated gradients, edits a few value slots."""

    name = "kn"
    config = KnConfig

    @hookimpl
    def locate(self, model: Model, request: Request, config: KnConfig) -> Location:
        """Return the layer that most of the fact's knowledge neurons are in."""
        from errata_kn.algorithm import neurons_of

        return neurons_of(model, request, config).location(model, request)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: KnConfig
    ) -> list[SparseRowsDelta]:
        """Return the changed value slots of each request, from the model's present state."""
        from errata_kn.algorithm import edit

        return [edit(model, request, config) for request in requests]
