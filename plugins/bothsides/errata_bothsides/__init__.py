"""Both sides of a fact: an edit that holds when it is asked for the object, and for the relation.

Methods that write (s, r → o*) at the subject leave what the model says of the relation between s
and o* as it was (RaKE, Wei et al. 2023). This one writes two keys as one edit: s's last token, low
in the model, for "s's r is …", and o*'s last token, half of the way up, for "The relation between
s and o* is …". Pairs like the new one, and o* where it is the answer, are keys that must give what
they gave.

`algorithm.py` is the method, `kept_pairs.py` says what must stay, `config.py` has the
hyper-parameters. It is errata's own; docs/results/both-sides.md has what it does and costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_bothsides.config import BothSidesConfig

if TYPE_CHECKING:
    from errata.edits.delta import KeyValueDelta
    from errata.edits.request import Request
    from errata.model import Model

__all__ = ["BothSides", "BothSidesConfig"]


class BothSides:
    """The plugin: one key-value delta per request, for two layers."""

    name = "bothsides"
    config = BothSidesConfig

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: BothSidesConfig) -> None:
        """Compute what belongs to the base: contexts, the second moments of both layers."""
        from errata_bothsides.algorithm import contexts_of, moments_of

        contexts_of(model, config)
        moments_of(model, config, corpus)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: BothSidesConfig
    ) -> list[KeyValueDelta]:
        """Return the change of each request, computed from the base."""
        from errata.kit.same_subject import sharing
        from errata_bothsides.algorithm import both_sides, contexts_of, delta_of, known_keys

        contexts, C = contexts_of(model, config), known_keys(model, config)

        def compute(facts: Sequence[Request], shared: bool = False) -> list[KeyValueDelta]:
            groups = [facts] if shared else [[fact] for fact in facts]
            return [
                delta_of(model, both_sides(model, group, contexts, C, config), C)
                for group in groups
            ]

        return sharing(model, requests, compute) if config.shares else compute(requests)
