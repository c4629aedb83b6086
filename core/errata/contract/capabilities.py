"""Checks before anything is computed: what the method declares, and whether prompts fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract import plugins
from errata.edits.aims import Aim, aims_of_request, says_something
from errata.edits.request_problems import naming_place
from errata.errors import CapabilityError, RequestError
from errata.model.running import class_index, prepare
from errata.model.tokens import subject_span

if TYPE_CHECKING:
    from errata.contract.registry import Registry
    from errata.contract.stanzas import Capabilities, MethodEntry
    from errata.edits.request import Request
    from errata.model.model import Model

logger = logging.getLogger("errata")

DENSE_MLP = "dense_mlp"
"""The need of a method that writes into an MLP's down projection."""


def check_requests(method: str, can: Capabilities, requests: Sequence[Request]) -> None:
    """Raise `CapabilityError` for a request that the method does not carry out on any model."""
    for request in requests:
        if request.kind not in can.kinds:
            raise CapabilityError(
                f"{method} carries out requests of kind {', '.join(can.kinds)}; "
                f"{request.text!r} is of kind {request.kind!r}."
            )
        operation = request.operation or "add"
        if request.kind == "relation" and operation not in can.operations:
            apart = " Give each operation as a request of its own."
            raise CapabilityError(
                f"{method} carries out {', '.join(can.operations)} on a relation; "
                f"{request.text!r} asks for {operation!r}."
                f"{apart if operation == 'both' else ''}"
            )


def check_capabilities(
    method: str,
    entry: MethodEntry,
    requests: Sequence[Request],
    model: Model,
    batch_size: int | None,
) -> None:
    """Raise `CapabilityError` naming what the method does not declare."""
    can = entry.capabilities
    check_requests(method, can, requests)
    if model.anatomy.kind not in can.architectures:
        raise CapabilityError(
            f"{method} edits {', '.join(can.architectures)} models; {model.name} is an "
            f"{model.anatomy.kind} ({model.anatomy.model_type})."
        )
    if model.task not in can.tasks:
        raise CapabilityError(
            f"{method} edits models for {', '.join(can.tasks)}; {model.name} is one for "
            f"{model.task} ({type(model.module).__name__})."
        )
    if batch_size is not None and (type(batch_size) is not int or batch_size < 1):
        raise CapabilityError(f"batch_size={batch_size!r} is not allowed: give 1 or more.")
    if batch_size is not None and batch_size > 1 and not can.batch:
        raise CapabilityError(
            f"{method} takes one request at a time, not {batch_size}: leave batch_size out."
        )
    if not can.sequential and model.stack.ids:
        raise CapabilityError(
            f"{method} cannot edit a model that is already edited "
            f"(active: {', '.join(model.stack.ids)}): revert those first."
        )


def check_sequence(method: str, can: Capabilities, batches: Sequence[Sequence[Request]]) -> None:
    """Raise `CapabilityError` where a call's batches would follow one another and may not."""
    if can.sequential or len(batches) <= 1:
        return
    n = sum(map(len, batches))
    advice = f"batch_size={n} gives it all at once" if can.batch else "give one request"
    raise CapabilityError(
        f"{method} cannot edit a model that is already edited, and this call has {n} requests for "
        f"it in {len(batches)} batches, one on top of the other: {advice}."
    )


def check_parts(method: str, registry: Registry, model: Model) -> None:
    """Raise `CapabilityError` where a method writes into MLPs and no layer has one to write into.

    A mixture of experts has none: which weights a token passes through differs from text to text.
    """
    entry = registry.methods.get(method)
    if entry is None or DENSE_MLP not in entry.capabilities.needs:
        return
    if model.anatomy.layers_with("mlp"):
        return
    others = [
        name
        for name in plugins.installed()
        if (other := registry.methods.get(name)) is not None
        and DENSE_MLP not in other.capabilities.needs
        and model.anatomy.kind in other.capabilities.architectures
        and model.task in other.capabilities.tasks
    ]
    raise CapabilityError(
        f"{method} edits at the projections of an MLP, and no layer of {model.name} "
        f"({model.anatomy.model_type}) has an MLP that every token passes through: its MLPs are "
        f"mixtures of experts. Methods that need none: {', '.join(others) or 'none is installed'}."
    )


def warn_of_neighbours(method: str, registry: Registry, model: Model) -> None:
    """Warn where edits of a method were measured to change what such a model says of others.

    That is a model with a norm behind its MLPs.
    """
    reader, methods = model.anatomy.reader, registry.methods
    behind = (reader.norm_behind_mlp(model.module, i) for i in reader.layers_with("mlp"))
    if methods[method].capabilities.spares_behind_norm is not False or not any(behind):
        return
    sparing = [name for name, one in methods.items() if one.capabilities.spares_behind_norm]
    logger.warning(
        "Behind the MLPs of %s (%s) stands a norm: with no setting that was tried did edits of %s "
        "spare what such a model says of other subjects. Measured to spare it: %s.",
        model.name, model.anatomy.model_type, method, ", ".join(sorted(sparing)),
    )  # fmt: skip


def check_prompts(model: Model, requests: Sequence[Request]) -> None:
    """Raise `RequestError` for a subject or answer that the model cannot be asked about.

    The tokenizer must place both. An answer must fit behind its prompt, or be one of the classes.
    Of several requests the message says which one it is.
    """
    for index, request in enumerate(requests):
        with naming_place(index, len(requests), request):
            _check_prompts_of(model, request)


def _check_classes(model: Model, request: Request) -> None:
    """Raise `RequestError` where a request's answers are not the model's: classes or texts."""
    if model.task != "classify":
        if request.kind == "label":
            raise RequestError(
                f"{request.text!r} is of kind 'label', which changes a class; {model.name} is no "
                f"sequence classifier ({type(model.module).__name__})."
            )
        return
    named = [("target_true", answer) for answer in (request.target_true,) if answer is not None]
    for field in ("neighbourhood", "locality", "portability", "attribute"):
        named += [(field, answer) for probe in getattr(request, field) for answer in probe.answers]
    for field, answer in named:
        try:
            class_index(model, answer)
        except RequestError as error:
            raise RequestError(f"{field}: {error}") from None


def _check_prompts_of(model: Model, request: Request) -> None:
    if request.subject.strip() in set(model.tokenizer.all_special_tokens):
        raise RequestError(
            f"The subject {request.subject!r} is a special token of {model.name}'s tokenizer, "
            "not a name: give the name that the fact is about."
        )
    if request.target_new and not says_something(request):
        raise RequestError(
            f"target_new is {request.target_new!r}, and operation {request.operation!r} puts "
            "nothing in the place of what it takes away: leave target_new out."
        )
    _check_classes(model, request)
    asked = [Aim(request.prompt, request.target), *aims_of_request(request)]
    for prompt in dict.fromkeys(aim.prompt for aim in asked):
        subject_span(model.tokenizer, prompt, request.subject)
    for prompt, answer in dict.fromkeys(aim[:2] for aim in asked if aim.answer):
        prepare(model, [request.filled(prompt)], [answer], device="cpu")
