"""Requests in the form in which a model is asked: long texts cut, chats rendered by its template.

Editing, scoring and guards all take requests in this form, so that what is cut is cut once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.errors import RequestError
from errata.model.chat import chat_frame, in_turn
from errata.model.tokens import first_tokens

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model


def rendered(model: Model, requests: Sequence[Request]) -> list[Request]:
    """Return requests whose prompts are texts for the model; others stay as they are.

    Prompts are cut to `max_tokens`, or to what the model reads at once if that is fewer. Every
    prompt of a chat becomes a user's turn. So do the prompts to test with.

    Raises:
        ConfigError: a chat, and the model has no chat template.
        RequestError: nothing of the subject is left.
    """
    requests = [
        request if request.chat else with_cut_prompts(model, request) for request in requests
    ]
    if not any(request.chat is True for request in requests):
        return requests
    frame = chat_frame(model.tokenizer)
    return [
        request
        if request.chat is not True
        else request.with_prompts(lambda text: in_turn(frame, text)).model_copy(
            update={"chat": frame}
        )
        for request in requests
    ]


def with_cut_prompts(model: Model, request: Request) -> Request:
    """Return a request whose prompts have at most `max_tokens` tokens, special ones counted."""
    limits = [n for n in (request.max_tokens, model.anatomy.context) if n is not None]
    if request.max_tokens is None:
        return request

    def short(text: str) -> str:
        return first_tokens(model.tokenizer, text, min(limits))

    before, after = request.prompt.split("{}")
    kept = short(request.text)
    subject = request.subject[: max(0, len(kept) - len(before))]
    if not subject.strip():
        raise RequestError(
            f"Of {before!r} and its subject, {min(limits)} tokens hold no part of the subject: "
            "give a larger max_tokens."
        )
    template = before + "{}" + after[: max(0, len(kept) - len(before) - len(subject))]
    others = request.with_prompts(lambda text: text if "{}" in text else short(text))
    return others.model_copy(update={"prompt": template, "subject": subject})
