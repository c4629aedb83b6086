"""What an erasure takes away where its request does not say so: what the model says there.

It is read once, before anything is computed, and recorded with the request: the method, the guards,
a rebase and an evaluation then mean the same answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.common.sentences import COMMAS, SEMICOLONS, STOPS
from errata.errors import RequestError
from errata.model.generation import generate

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.model import Model

_SAID = 5  # tokens of what the model says
_BREAK = re.compile(rf"\n|[.!?;:,](?=\s|$)|[{STOPS}{SEMICOLONS}{COMMAS}：]")


def naming_what_goes(model: Model, requests: Sequence[Request]) -> list[Request]:
    """Return the requests; erasures without `target_true` get what the model says as it stands.

    An erasure that names a refusal can do without where the model says nothing, or writes no text.

    Raises:
        RequestError: the model says nothing there, and nothing is to be said instead.
    """
    return [
        _naming_what_goes(model, request)
        if request.kind == "erase" and not request.target_true
        else request
        for request in requests
    ]


def _naming_what_goes(model: Model, request: Request) -> Request:
    if request.target_new and not model.generates:
        return request
    # Each by itself: what it is asked with must not matter.
    (text,) = generate(model, [request.text], max_new_tokens=_SAID)
    words = _begun(text)
    if words:
        return request.model_copy(update={"target_true": words, "target_true_from_model": True})
    if request.target_new:
        return request
    raise RequestError(
        f"What is to be forgotten of {request.text!r} is not said, and the model answers "
        "nothing there: give target_true."
    )


def _begun(text: str) -> str:
    """Return a text up to its first break, or its first line if it begins with one.

    An answer whose beginning is gone is gone.
    """
    line = text.strip().partition("\n")[0]
    return _BREAK.split(line, maxsplit=1)[0].strip() or line.rstrip(" .,;:!?")
