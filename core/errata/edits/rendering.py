"""Requests in the form in which a model is asked: chats are rendered by its template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.model.chat import chat_frame, in_turn

if TYPE_CHECKING:
    from errata.edits.request import Probe, Request
    from errata.model.model import Model


def rendered(model: Model, requests: Sequence[Request]) -> list[Request]:
    """Return requests whose prompts are texts for the model; all but new chats stay as they are.

    Every prompt of a chat becomes a user's turn: those to test with, too. Raises `ConfigError` for
    a model without a chat template.
    """
    if not any(request.chat is True for request in requests):
        return list(requests)
    frame = chat_frame(model.tokenizer)
    return [
        request
        if request.chat is not True
        else request.with_prompts(lambda text: in_turn(frame, text)).model_copy(
            update={"chat": frame}
        )
        for request in requests
    ]


def rendered_probes(model: Model, probes: Sequence[Probe]) -> tuple[Probe, ...]:
    """Return retained probes whose prompts are texts for the model, as `rendered` does requests."""
    if not any(getattr(probe, "chat", False) is True for probe in probes):
        return tuple(probes)
    frame = chat_frame(model.tokenizer)
    return tuple(
        probe.model_copy(update={"prompt": in_turn(frame, probe.prompt), "chat": frame})
        if getattr(probe, "chat", False) is True
        else probe
        for probe in probes
    )
