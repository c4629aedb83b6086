"""The plugin that closed-form methods share: what is stored, and what is computed beforehand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from errata.contract.hooks import hookimpl

if TYPE_CHECKING:
    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.closed_form.layer_updates import Update
    from errata.kit.metric import Metric
    from errata.model.model import Model


class Found(NamedTuple):
    """What a closed-form method found for some requests.

    Attributes:
        updates: what each layer is asked for.
        metrics: M of each layer.
        slack: how much a miss is tolerated, of every key.
    """

    updates: Sequence[Update]
    metrics: Mapping[int, Metric]
    slack: float


class ClosedForm(ABC):
    """One key-value delta per request (`history: joint`), or one low-rank delta for the batch."""

    name: ClassVar[str]
    config: ClassVar[type[ClosedFormConfig]]

    @abstractmethod
    def find(self, model: Model, requests: Sequence[Request], config: ClosedFormConfig) -> Found:
        """Compute keys and residuals, as the method's paper says, from the present state."""

    @hookimpl
    def prepare(self, model: Model, corpus: Sequence[str], config: ClosedFormConfig) -> None:
        """Compute what belongs to the base: contexts, second moments, the norm anchor."""
        from errata.kit.closed_form.statistics import prepare

        prepare(model, corpus, self.settled(model, config))

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: ClosedFormConfig
    ) -> Delta | list[Delta]:
        """Return the change, computed from the base (frozen) or the model's present state."""
        from errata.kit.closed_form.deltas import key_values, low_rank

        config = self.settled(model, config)
        updates, metrics, slack = self.find(model, requests, config)
        if config.history == "none":
            return low_rank(model, updates)
        return [*key_values(model, updates, metrics, slack, config)]

    def settled(self, model: Model, config: ClosedFormConfig) -> ClosedFormConfig:
        """Return the configuration with its layers named, where a caller left `auto` in it."""
        if config.layers != "auto":
            return config
        from errata.kit.auto_layers import resolve_auto_layers

        return resolve_auto_layers(model, self.name, config)[0]
