"""MELO, editing with neuron-indexed dynamic LoRA (Yu et al., AAAI 2024).

Each edit (of one or several requests) trains a LoRA block of a few late modules. Beside an earlier
module lies a vector database: the outputs at the last prompt token of all edited prompts, in
clusters with radii. A row whose own output falls within a cluster takes the block of that cluster's
nearest point; all others take none. `database.py` is the paper's rules, `delta.py` how a block
acts on a batch. A block is an ordinary PEFT adapter: `export(…, edit, format="peft")` writes one
edit's, which then acts on every prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_melo.config import MeloConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_melo.delta import RoutedAdapterDelta

__all__ = ["Melo", "MeloConfig"]


class Melo:
    """The plugin: one LoRA block, with a key for each request."""

    name = "melo"
    config = MeloConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: MeloConfig
    ) -> RoutedAdapterDelta:
        """Train one block for all requests of a call."""
        from errata_melo.training import edit

        return edit(model, requests, config)
