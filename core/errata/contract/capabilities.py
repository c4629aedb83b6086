"""What is checked before anything is computed or applied: capabilities, prompts, fingerprints."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from errata.contract import plugins
from errata.errors import CapabilityError, FingerprintError, LedgerError, RequestError
from errata.model.tokens import encode_targets, subject_span

if TYPE_CHECKING:
    from errata.contract.registry import MethodEntry
    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.edits.request import Request
    from errata.edits.stack import Entry
    from errata.model.model import Model

OVERLAP = 0.9
"""Whitened cosine of two keys from which on their edits are said to overlap."""


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
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
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


def check_fingerprint(model: Model, edit: Edit) -> None:
    """Raise `FingerprintError`, naming both, unless the edit was made for this base."""
    names = [name for name in edit.fingerprint if name != "config"]
    missing = [name for name in names if name not in model.pristine]
    if missing:
        raise FingerprintError(
            f"Edit {edit.id} was made for another model: it refers to {missing[0]!r}, which "
            f"{model.name} does not have."
        )
    here = model.fingerprint_of(names)
    for name, wanted in edit.fingerprint.items():
        if here[name] != wanted:
            what = "configuration" if name == "config" else f"base tensor {name}"
            raise FingerprintError(
                f"Edit {edit.id} was made for another model: its {what} has the fingerprint "
                f"{wanted[:16]}…, that of {model.name} is {here[name][:16]}…."
            )


def conflicts(
    requests: Sequence[Request], active: Sequence[Edit], same_target: bool = False
) -> list[str]:
    """Return the ids of active edits that say something else about the same fact.

    `same_target` also returns those that say the same about it.
    """
    clashing: list[str] = []
    for edit in active:
        for old in edit.requests:
            if any(
                _same_fact(old, new) and (same_target or old.target_new != new.target_new)
                for new in requests
            ):
                clashing.append(edit.id)
                break
    return clashing


def overlaps(
    delta: Delta, entries: Sequence[Entry], threshold: float = OVERLAP
) -> dict[str, float]:
    """Return the ids of active edits whose keys point the way of this delta's, with the cosine.

    The cosine is taken in the metric that the edits are solved in, kᵀ M k' / (|k| |k'|), the
    largest of any parameter and keys. Only for deltas that store keys, among those of one metric.
    """
    from errata.edits.delta import KeyValueDelta

    if not isinstance(delta, KeyValueDelta):
        return {}
    others = {
        entry.edit_id: entry.delta
        for entry in entries
        if isinstance(entry.delta, KeyValueDelta) and entry.delta is not delta
    }
    cosines = delta.cosines(list(others.values()))
    return {
        name: round(cosine, 4)
        for name, cosine in zip(others, cosines, strict=True)
        if cosine >= threshold
    }


def check_superseded(old: Sequence[Edit], requests: Sequence[Request]) -> None:
    """Raise `LedgerError` for an edit that would be superseded with only part of its requests."""
    for edit in old:
        kept = [r for r in edit.requests if not any(_same_fact(r, new) for new in requests)]
        if kept:
            raise LedgerError(
                f"Edit {edit.id} holds {len(edit.requests)} requests that come off together, and "
                f"only {len(edit.requests) - len(kept)} of them are superseded (not: "
                f"{kept[0].text!r}). Revert it yourself and make the others again, or leave "
                "supersede out."
            )


def library_versions(method: str) -> dict[str, str]:
    """Return the versions of what computed an edit."""
    found = {"method": plugins.version(method)}
    for name in ("errata", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _same_fact(one: Request, other: Request) -> bool:
    if one.subject != other.subject:
        return False
    if one.relation and other.relation:
        return one.relation == other.relation
    return one.prompt == other.prompt
