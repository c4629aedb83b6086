"""WISE, a side memory in shards (Wang et al., NeurIPS 2024), retrieving among them.

Beside the down projection W of a late block stand copies of it, the shards, in which edits are
written. A prompt x whose activation a shard moves far enough goes through that shard:

    Δ_i(x) = mean_t ‖φ(W_i x_t) − φ(W x_t)‖₂   ≥  ratio · min over its edits of Δ_i(edit)

`training.py` is the paper's loss on one shard, `memories.py` says how edits make up shards and how
shards are merged (TIES), `delta.py` which shard a row goes through.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_wise.config import WiseConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_wise.delta import ShardDelta

__all__ = ["Wise", "WiseConfig"]


class Wise:
    """The plugin: what one request adds to the shard that is being written."""

    name = "wise"
    config = WiseConfig

    @hookimpl
    def prepare(self, model: Model, config: WiseConfig) -> None:
        """Generate the contexts in which edits are trained."""
        from errata_wise.training import contexts

        contexts(model, config)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: WiseConfig
    ) -> list[ShardDelta]:
        """Return one difference per request, trained on top of the shard's earlier ones."""
        from errata_wise.training import edit

        return [edit(model, request, config) for request in requests]
