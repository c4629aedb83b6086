"""GRACE, General Retrieval Adaptors for Continual Editing (Hartvigsen et al., NeurIPS 2023).

No weight changes. Beside one module lies a codebook; where the hidden state of a prompt's last
token falls within the radius of a stored key, the module's output is replaced by the stored value,
which was trained so that the model then gives the wanted target:

    h_out = v_i  if  d(h_in, k_i) ≤ ε_i  with  i = argmin_j d(h_in, k_j),  else  W h_in + b

`algorithm.py` trains values. How keys and radii come about is in `codebook.py`, what an edit
stores in `entry.py` and `delta.py`, how a hit acts on a batch in `router.py`, in generation and in
an encoder in `errata.model.routing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_grace.config import GraceConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_grace.delta import CodebookDelta

__all__ = ["Grace", "GraceConfig"]


class Grace:
    """The plugin: one codebook entry per request."""

    name = "grace"
    config = GraceConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: GraceConfig
    ) -> list[CodebookDelta]:
        """Return one entry per request; each is computed with those before it in force."""
        from errata_grace import algorithm

        return algorithm.GraceRun.on(model, config).edit(requests)
