"""How a delta becomes bytes and comes back: its kind, its metadata and its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from errata.common.storage import canonical, from_bytes, to_bytes
from errata.errors import IntegrityError, UnknownNameError, in_short, turning

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.edit import Edit


class Parts(NamedTuple):
    """A delta taken apart: what is stored, and all that exporting one needs to know."""

    kind: str
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def take(delta: Delta) -> Parts:
    """Return the parts of a delta."""
    return Parts(delta.kind, delta.metadata(), delta.tensors())


def encode(parts: Parts, record: Mapping[str, Any]) -> bytes:
    """Return a delta's parts as one safetensors file; refuse NaN and infinite entries.

    The file also holds the edit's record, so that it can be taken back in (`Ledger.recover`)
    when the database is lost.
    """
    _require_finite(parts.tensors, f"A {parts.kind} delta")
    header = {"kind": parts.kind, "metadata": parts.metadata, "record": record}
    return to_bytes(parts.tensors, header)


def decode(data: bytes, kind: str, source: str) -> Parts:
    """Return the parts that `encode` wrote, of the kind that the record says, all finite."""
    tensors, header = from_bytes(data, source)
    if header.keys() - {"record"} != {"kind", "metadata"} or header["kind"] != kind:
        raise IntegrityError(
            f"{source} holds a delta of kind {header.get('kind')!r}; its record says {kind!r}."
        )
    return checked(kind, header["metadata"], tensors, source)


def record_of(data: bytes, source: str) -> Any:
    """Return the record that `encode` put beside a delta, not validated; None for none."""
    return from_bytes(data, source)[1].get("record")


def checked(kind: str, metadata: Any, tensors: Mapping[str, Tensor], source: str) -> Parts:
    """Return parts from outside, or raise `IntegrityError` for those that no delta can have."""
    if not isinstance(metadata, dict):
        raise IntegrityError(f"{source} is damaged: its metadata is no object.")
    _require_finite(tensors, source)
    return Parts(kind, metadata, tensors)


def build(parts: Parts, kinds: Mapping[str, type[Delta]], source: str, made_by: str) -> Delta:
    """Return a delta from its parts, or raise `IntegrityError` for anything that does not fit.

    Raises `UnknownNameError` for a kind that is not installed; it says by what it was `made_by`.
    """
    check_kind(parts.kind, kinds, f"{source} was made by {made_by}: install that package.")
    # A kind's own code, maybe a stranger's, on data we cannot trust.
    damaged = f"{source} is no sound {parts.kind} delta"
    with turning(Exception, lambda error: IntegrityError(f"{damaged}: {in_short(error)}")):
        return kinds[parts.kind].from_parts(dict(parts.tensors), parts.metadata)


def delta_of(edit: Edit, parts: Parts, kinds: Mapping[str, type[Delta]], source: str) -> Delta:
    """Return the delta of a record from its parts; raise `IntegrityError` where they differ."""
    delta = build(parts, kinds, source, edit.made_by)
    if delta.nbytes != edit.nbytes:
        raise IntegrityError(f"{source} has {delta.nbytes} bytes; its record says {edit.nbytes}.")
    return delta


def check_kind(
    kind: str,
    kinds: Mapping[str, type[Delta]],
    hint: str = "Install the method that brings this kind.",
) -> None:
    """Raise `UnknownNameError`, which ends with the hint, unless the kind can be built."""
    if kind not in kinds:
        raise UnknownNameError("delta kind", kind, kinds, hint)


def digest(parts: Parts) -> str:
    """SHA-256 of what a delta holds, whatever version of safetensors writes it."""
    from errata.model.pristine import digest as tensor_digest

    tensors = {name: tensor_digest(tensor) for name, tensor in parts.tensors.items()}
    return hashlib.sha256(canonical([parts.kind, parts.metadata, tensors]).encode()).hexdigest()


def _require_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    from errata.edits.delta.base import first_not_finite

    name = first_not_finite(tensors)
    if name is not None:
        raise IntegrityError(f"{source} has NaN or infinite entries in tensor {name!r}.")
