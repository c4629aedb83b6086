"""Defer and Memory: the two small networks beside one module that GRACE is compared with.

Hartvigsen et al. (NeurIPS 2023), after SERAC and memory networks. q is what the module is given at
a prompt's last token; what follows is written over its output at *every* token of the row.

    Defer    y = A q + a   where σ(w·q + c) ≥ ½        (while training: g y + (1 − g) · output)
    Memory   y = Σ_i π_i v_i,  π = softmax(F q + f)    always, for every row

One network serves all edits. Each edit trains all of it further on its own prompt and on nothing
else: no loss keeps the gate shut or the memory's answer harmless for other prompts, so both forget
earlier edits and change other answers. That is the published result, which these two reproduce.

Against the authors' code: every row decides for itself, at the end of its own prompt, once; with
no edit active the model is the base (their Memory replaces the module as soon as it is there).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_side_network.config import DeferConfig, MemoryConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_side_network.delta import SideNetworkDelta

__all__ = ["Defer", "DeferConfig", "Memory", "MemoryConfig"]


class Defer:
    """The plugin: what one request changes in a gate and a linear map."""

    name = "defer"
    config = DeferConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: DeferConfig
    ) -> list[SideNetworkDelta]:
        """Return one difference per request, each trained with those before it in force."""
        from errata_side_network import networks, training

        return training.edit(model, requests, config, networks.DEFER)


class Memory:
    """The plugin: what one request changes in a memory network."""

    name = "memory"
    config = MemoryConfig

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: MemoryConfig
    ) -> list[SideNetworkDelta]:
        """Return one difference per request, each trained with those before it in force."""
        from errata_side_network import networks, training

        return training.edit(model, requests, config, networks.memory(config.slots))
