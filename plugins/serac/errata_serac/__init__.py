"""SERAC: memory-based model editing at scale (Mitchell, Lin, Bosselut, Manning, Finn, ICML 2022).

Edits are rows of text. A scope classifier g says which row a prompt is about, if any; a
counterfactual model h then answers with that row in front of the prompt, and the base f answers
everything else:

    i* = argmaxᵢ g(zᵢ, x);   h(zᵢ*, x) if g(zᵢ*, x) > ½, else f(x)

Both networks are trained once, on other requests, and never by an edit: taking a row out leaves
all others as they were. `scope.py` has g, `counterfactual.py` h, `training.py` the losses,
`delta.py` the memory. The variant "mixture" answers with (1 − g) f + g h: it is what other
toolkits ship under the paper's name (unsupervised scope), and not the published hard switch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_serac.config import SeracConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_serac.delta import CounterfactualDelta

__all__ = ["Serac", "SeracConfig"]


class Serac:
    """The plugin: one row of text per request."""

    name = "serac"
    config = SeracConfig

    @hookimpl
    def prepare(self, model: Model, training: Sequence[Request], config: SeracConfig) -> None:
        """Train both networks, once per base, configuration and training requests."""
        from errata_serac.training import train

        _states(model, config)  # while no edit is on it
        recipe = config.recipe()
        unfinished = model.base_key("serac_unfinished", recipe, trained=True)
        model.of_base(
            "serac", recipe, trained=True,
            compute=lambda: train(model, training, config, unfinished),
        )  # fmt: skip

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: SeracConfig
    ) -> list[CounterfactualDelta]:
        """Return one row per request; of a chat it holds what the user says."""
        from errata_serac.delta import CounterfactualDelta

        key = model.base_key("serac", config.recipe(), trained=True)
        parameter = model.anatomy.weight(model.anatomy.embedding_name)
        states, mixture = _states(model, config), config.variant == "mixture"
        return [
            CounterfactualDelta(
                request.plain.text, request.target_new, key, parameter,
                states=states, threshold=config.threshold, mixture=mixture,
            )
            for request in requests
        ]  # fmt: skip


def _states(model: Model, config: SeracConfig) -> tuple[str, ...]:
    """Return the key of what the scope classifier needs to read the model's own states."""
    from errata.kit.sentence_encoder import sentence_encoder

    return sentence_encoder(model, None).artifact if config.encoder is None else ()
