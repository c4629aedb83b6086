"""Which requests a model can be asked about: found once, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.common.display import shortened
from errata.contract.capabilities import check_prompts
from errata.edits.rendering import rendered
from errata.errors import ConfigError, RequestError
from errata.model.running import check_length

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model

NAMED = 3
"""Requests that a message names."""
_SPECIAL = 16
"""Tokens that a tokenizer may put around a text, and more."""


def unaskable(model: Model, requests: Sequence[Request]) -> dict[int, str]:
    """Return why a model cannot be asked about some of the requests, by their places.

    A chat needs a chat template. The tokenizer must place subject and answer. Every prompt, those
    to test with too, must fit into what the model reads at once.
    """
    found: dict[int, str] = {}
    for place, request in enumerate(requests):
        try:
            asked = rendered(model, [request])
            check_prompts(model, asked)
            _check_lengths(model, asked[0])
        except (ConfigError, RequestError) as error:
            found[place] = str(error)
    return found


def named(found: Sequence[tuple[Request, str]]) -> str:
    """Return the first of some requests, each with what is wrong with it, and how many follow."""
    parts = [
        f"{f'case {request.case_id!r}, ' if request.case_id else ''}"
        f"{shortened(request.text, 40)!r}: {why.removesuffix('.')}"
        for request, why in found[:NAMED]
    ]
    more = len(found) - NAMED
    return "; ".join([*parts, f"and {more} more"] if more > 0 else parts)


def _check_lengths(model: Model, request: Request) -> None:
    limit = model.anatomy.context
    for prompt in request.every_prompt() if limit is not None else ():
        text = request.filled(prompt)
        # A token has a byte at least: of most texts it need not be known how many they are.
        if len(text.encode()) + _SPECIAL > (limit or 0):
            check_length(model, len(model.tokenizer(text, verbose=False)["input_ids"]))
