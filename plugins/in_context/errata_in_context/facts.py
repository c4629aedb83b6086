"""From requests to facts in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.kit.sentence_encoder import sentence_encoder
from errata_in_context.delta import PromptDelta, PromptSettings
from errata_in_context.demonstrations import fact_of

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model
    from errata_in_context.config import InContextConfig


def facts(
    model: Model,
    requests: Sequence[Request],
    config: InContextConfig,
    threshold: float | None,
    demonstrations: Sequence[Sequence[str]] | None = None,
) -> list[PromptDelta]:
    """Return one delta per request: its fact, when it enters a prompt, and demonstrations.

    The fact of a request in a chat does not hold what the chat template puts around it.
    """
    settings = PromptSettings.of(model, config.encoder, threshold, config.facts)
    shown = demonstrations or [()] * len(requests)
    made = []
    for request, texts in zip([request.plain for request in requests], shown, strict=True):
        if settings.has_vector:
            (vector,) = sentence_encoder(model, config.encoder).encode([request.text])
            made.append(PromptDelta(fact_of(request), vector.clone(), settings, texts))
        else:
            made.append(PromptDelta(fact_of(request), None, settings, texts, request.text))
    return made
