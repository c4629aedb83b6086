"""Editing in context: the model reads the new fact with every prompt; no weight changes.

* `ice`, the fact alone: "New Fact: {p} {t*}", then the prompt. In-context editing as Cohen et al.
  2024 and KnowEdit (Zhang et al. 2024) measure it, and IKE's own baseline PROMPT.
* `ike` (Zheng et al. EMNLP 2023): demonstrations before it, drawn from training requests.
* `retrieval`: the fact alone, and only where a gate finds a prompt to be about it. The plain
  baseline of every memory of texts.

The papers have one fact at a time and put it before every prompt. Where several edits are active
here, the nearest fact enters a prompt. Delta kind: `errata_in_context.delta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.hooks import hookimpl
from errata_in_context.config import IceConfig, IkeConfig, RetrievalConfig

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_in_context.delta import PromptDelta

__all__ = ["Ice", "Ike", "Retrieval"]


class Ice:
    """The fact alone, in front of every prompt."""

    name = "ice"
    config = IceConfig

    @hookimpl
    def prepare(self, model: Model, config: IceConfig) -> None:
        """Open the encoder if it is asked: a fact before every prompt needs none."""
        from errata_in_context.delta import PromptSettings

        PromptSettings.of(model, config.encoder, config.threshold, config.facts)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: IceConfig
    ) -> list[PromptDelta]:
        """Return one fact per request."""
        from errata_in_context.facts import facts

        return facts(model, requests, config, config.threshold)


class Retrieval:
    """The fact alone, in front of prompts that the gate finds to be about it."""

    name = "retrieval"
    config = RetrievalConfig

    @hookimpl
    def prepare(self, model: Model, training: Sequence[Request], config: RetrievalConfig) -> None:
        """Choose the gate's threshold."""
        from errata_in_context.gate import calibrated

        calibrated(model, training, config.encoder, config.records, config.seed)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: RetrievalConfig
    ) -> list[PromptDelta]:
        """Return one fact per request."""
        from errata_in_context.facts import facts
        from errata_in_context.gate import calibrated

        gate = calibrated(model, (), config.encoder, config.records, config.seed)
        return facts(model, requests, config, gate.threshold)


class Ike:
    """The fact behind demonstrations."""

    name = "ike"
    config = IkeConfig

    @hookimpl
    def prepare(self, model: Model, training: Sequence[Request], config: IkeConfig) -> None:
        """Keep what demonstrations are made of, and choose the gate's threshold if there is one."""
        from errata_in_context.demonstrations import Demonstrations
        from errata_in_context.gate import calibrated

        Demonstrations.of(model, training, config.encoder, config.records)
        if config.gate:
            calibrated(model, training, config.encoder, config.gate_records, config.seed)

    @hookimpl
    def edit(
        self, model: Model, requests: Sequence[Request], config: IkeConfig
    ) -> list[PromptDelta]:
        """Return one fact with its demonstrations per request."""
        from errata_in_context.demonstrations import Demonstrations
        from errata_in_context.facts import facts
        from errata_in_context.gate import calibrated

        source = Demonstrations.of(model, (), config.encoder, config.records)
        requests = [request.plain for request in requests]
        if config.variant == "easyedit":
            shown = [source.nearest_sentences(request, config.most) for request in requests]
        else:
            shown = [source.published(request, config.most, config.seed) for request in requests]
        threshold = None
        if config.gate:
            gate = calibrated(model, (), config.encoder, config.gate_records, config.seed)
            threshold = gate.threshold
        return facts(model, requests, config, threshold, shown)
