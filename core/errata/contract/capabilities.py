"""What is checked before anything is computed: what a method declares, and that prompts fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.errors import CapabilityError, RequestError
from errata.model.tokens import encode_targets, subject_span

if TYPE_CHECKING:
    from errata.contract.stanzas import MethodEntry
    from errata.edits.request import Request
    from errata.model.model import Model


def check_capabilities(
    method: str,
    entry: MethodEntry,
    requests: Sequence[Request],
    model: Model,
    batch_size: int | None,
) -> None:
    """Raise `CapabilityError` naming what the method does not declare."""
    can = entry.capabilities
    if model.anatomy.kind not in can.architectures:
        raise CapabilityError(
            f"{method} edits {', '.join(can.architectures)} models; {model.name} is an "
            f"{model.anatomy.kind} ({model.anatomy.model_type})."
        )
    for request in requests:
        if request.kind not in can.kinds:
            raise CapabilityError(
                f"{method} carries out requests of kind {', '.join(can.kinds)}; "
                f"{request.text!r} is of kind {request.kind!r}."
            )
    if batch_size is not None and batch_size < 1:
        raise CapabilityError(f"batch_size={batch_size} makes no sense: give 1 or more.")
    if batch_size is not None and batch_size > 1 and not can.batch:
        raise CapabilityError(
            f"{method} takes one request at a time, not {batch_size}: leave batch_size out."
        )
    if not can.sequential and (model.stack.ids or len(requests) > (batch_size or len(requests))):
        raise CapabilityError(
            f"{method} cannot edit a model that is already edited "
            f"(active: {', '.join(model.stack.ids)}): revert those first."
        )


def check_prompts(model: Model, requests: Sequence[Request]) -> None:
    """Raise `RequestError` for a subject or target that the tokenizer cannot place."""
    limit = model.anatomy.context or 10**9
    for request in requests:
        subject_span(model.tokenizer, request.prompt, request.subject)
        batch = encode_targets(model.tokenizer, [request.text], [request.target_new])
        start, end = batch.target_spans[0]
        if end <= start:
            raise RequestError(
                f"The target {request.target_new!r} of {request.text!r} gives no token with this "
                "model's tokenizer."
            )
        if batch.lengths[0] > limit:
            raise RequestError(
                f"{request.text[:60]!r}… with its target has {batch.lengths[0]} tokens; this "
                f"model reads {limit}."
            )
