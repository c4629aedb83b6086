"""One file that carries edits from one ledger to another: records, deltas, and their hashes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.storage import (
    canonical,
    from_bytes,
    parse_json,
    read_whole,
    sha256,
    to_bytes,
)
from errata.edits.ledger import content
from errata.edits.ledger.schema import parse_record, record_text
from errata.edits.outcome import Outcome
from errata.errors import IntegrityError, LedgerError

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.edit import Edit
    from errata.model.artifacts import Artifacts

FORMAT = "errata.export"
VERSION = 1
ARTIFACT = "artifact/"
"""What the names of carried artifacts begin with; their SHA-256 follows."""
RECORDS = "records"
"""Name of the byte tensor with the records: thousands of them do not fit into a header."""


def write_export(
    path: Path | str,
    pairs: Sequence[tuple[Edit, content.Parts]],
    artifacts: Artifacts,
    *,
    overwrite: bool = False,
) -> Path:
    """Write edits with their deltas and the artifacts they need to one file, whole or not at all.

    Tensors are named "<index>/<name>"; the records, with each delta's metadata and the SHA-256
    of its content, lie beside them as JSON; so does each artifact, as bytes under its SHA-256.
    Raises `LedgerError` when the file exists already, `ConfigError` for what errata did not write
    there (it is never replaced), `IntegrityError` for an artifact that is
    not what the record says, and `StorageError` when the disk refuses.
    """
    import torch

    from errata.edits.outputs import EXPORT, check_file, write_file  # it knows the ledger's names

    path = Path(path)
    if not pairs:
        raise LedgerError("No edits were given to export: name at least one.")
    check_file(path, EXPORT)
    if not overwrite and path.exists():
        raise LedgerError(f"{path} exists already: give another name, or pass overwrite=True.")
    tensors: dict[str, Tensor] = {}
    entries = []
    for index, (edit, parts) in enumerate(pairs):
        tensors.update({f"{index}/{name}": tensor for name, tensor in parts.tensors.items()})
        entries.append(
            {
                "record": parse_json(record_text(edit)),
                "metadata": parts.metadata,
                "tensors": sorted(parts.tensors),
                "content": content.digest(parts),
            }
        )
    for name, digest in sorted({item for edit, _ in pairs for item in edit.artifacts.items()}):
        data = artifacts.read(name)
        if sha256(data) != digest:
            raise IntegrityError(
                f"The artifact {name} is not the one that the edits were made with."
            )
        tensors[f"{ARTIFACT}{digest}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    text = canonical(entries).encode()
    tensors[RECORDS] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    header = {"format": FORMAT, "version": VERSION, "edits": len(pairs), "records": sha256(text)}
    return write_file(path, to_bytes(tensors, header), EXPORT)


def read_export(
    path: Path | str, kinds: Mapping[str, type[Delta]], carried: dict[str, bytes] | None = None
) -> list[tuple[Edit, Delta]]:
    """Return the edits of an exported file with their deltas, in order, all of it validated.

    The artifacts that the file carries are put into `carried`, by name; nothing is written.

    Raises `IntegrityError` for damage of any sort, `UnknownNameError` for a delta kind that is
    not installed, `LedgerError` for a file of a newer errata and `StorageError` when it cannot
    be read.
    """
    return _unpack(read_whole(Path(path)), kinds, str(path), {} if carried is None else carried)


def file_of(edit: Edit, parts: content.Parts) -> bytes:
    """Return the bytes of the file that a ledger keeps of an edit, by its record there."""
    return content.encode(parts, parse_json(record_text(edit.model_copy(update={"blob": ""}))))


def same(edit: Edit, parts: content.Parts, other: Edit, other_parts: content.Parts) -> bool:
    """Say whether two edits are one, whatever their place, file hash and measurements."""
    local = {"sequence": 0, "blob": "", "outcome": Outcome()}
    texts = {record_text(each.model_copy(update=local)) for each in (edit, other)}
    return len(texts) == 1 and content.digest(parts) == content.digest(other_parts)


def _unpack(
    data: bytes, kinds: Mapping[str, type[Delta]], source: str, artifacts: dict[str, bytes]
) -> list[tuple[Edit, Delta]]:
    tensors, header = from_bytes(data, source)
    if header.get("format") != FORMAT:
        raise IntegrityError(f"{source} is no exported edit.")
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise LedgerError(
            f"{source} has format {version}; this errata reads up to {VERSION}. Upgrade errata."
        )
    records = tensors.pop(RECORDS, None)
    if records is None or version != VERSION:
        raise IntegrityError(f"{source} is damaged: it lacks its records.")
    text = records.contiguous().numpy().tobytes() if str(records.dtype) == "torch.uint8" else b""
    if sha256(text) != header.get("records"):
        raise IntegrityError(f"{source} is damaged: its records do not have their SHA-256.")
    entries = parse_json(text, f"The records of {source}")
    if not isinstance(entries, list) or len(entries) != header.get("edits"):
        raise IntegrityError(f"{source} is damaged: it does not hold the edits it announces.")
    carried = {
        name.removeprefix(ARTIFACT): tensors.pop(name)
        for name in list(tensors)
        if name.startswith(ARTIFACT)
    }
    pairs = [
        _entry(index, entry, tensors, kinds, f"Edit {index + 1} of {source}")
        for index, entry in enumerate(entries)
    ]
    if tensors:
        raise IntegrityError(f"{source} has tensors that belong to no edit: {sorted(tensors)[:5]}.")
    if len({edit.id for edit, _ in pairs}) != len(pairs):
        raise IntegrityError(f"{source} holds one edit id more than once.")
    _take_artifacts([edit for edit, _ in pairs], carried, source, artifacts)
    return pairs


def _take_artifacts(
    edits: Sequence[Edit], carried: Mapping[str, Tensor], source: str, artifacts: dict[str, bytes]
) -> None:
    """Hold the carried artifacts against the records, and take their bytes."""
    wanted = {digest: name for edit in edits for name, digest in edit.artifacts.items()}
    if set(wanted) != set(carried):
        raise IntegrityError(
            f"{source} is damaged: it must carry the artifacts {sorted(wanted)}, not "
            f"{sorted(carried)}."
        )
    for digest, name in wanted.items():
        tensor = carried[digest]
        data = tensor.contiguous().numpy().tobytes() if str(tensor.dtype) == "torch.uint8" else b""
        if sha256(data) != digest:
            raise IntegrityError(f"{source} is damaged: an artifact does not have its SHA-256.")
        artifacts[name] = data


def _entry(
    index: int,
    entry: Any,
    tensors: dict[str, Tensor],
    kinds: Mapping[str, type[Delta]],
    source: str,
) -> tuple[Edit, Delta]:
    """Return one edit, taking its tensors out of `tensors`."""
    keys = {"record", "metadata", "tensors", "content"}
    if not isinstance(entry, dict) or set(entry) != keys or not isinstance(entry["tensors"], list):
        raise IntegrityError(f"{source} is damaged: it is not made of {sorted(keys)}.")
    edit = parse_record(entry["record"], source)
    named: dict[str, Tensor] = {}
    for name in entry["tensors"]:
        tensor = tensors.pop(f"{index}/{name}", None)
        if not isinstance(name, str) or tensor is None:
            raise IntegrityError(f"{source} is damaged: its tensor {name!r} is missing.")
        named[name] = tensor
    parts = content.checked(edit.delta_kind, entry["metadata"], named, source)
    if content.digest(parts) != entry["content"]:
        raise IntegrityError(f"{source} is damaged: its delta does not have its SHA-256.")
    return edit, content.delta_of(edit, parts, kinds, source)
