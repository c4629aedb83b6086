"""GRACE, General Retrieval Adaptors for Continual Editing (Hartvigsen et al., NeurIPS 2023).

No weight changes. Beside one module lies a codebook; where the hidden state of a prompt's last
token falls within the radius of a stored key, the module's output is replaced by the stored value,
which was trained so that the model then gives the wanted target:

    h_out = v_i  if  d(h_in, k_i) ≤ ε_i  with  i = argmin_j d(h_in, k_j),  else  W h_in + b

How keys and radii come about is in `errata.edits.delta.codebook_replay`, how a hit acts on a batch,
in generation and in an encoder, in `errata.edits.delta.codebook_runtime`; `algorithm.py` trains
values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_grace.config import GraceConfig

if TYPE_CHECKING:
    from errata.edits.delta.codebook import CodebookDelta
    from errata.edits.request import Request
    from errata.model import Model

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

        return algorithm.Grace.on(model, config).edit(requests)
