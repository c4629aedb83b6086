"""Tensors on disk: safetensors with JSON metadata, written atomically, read with suspicion."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from errata.common.scratch import noted, unfinished
from errata.errors import IntegrityError, StorageError, disk, reason_of

if TYPE_CHECKING:
    from torch import Tensor

FIELD = "errata"  # the one key of the safetensors header's __metadata__ that errata writes
MAX_HEADER = 32 * 2**20  # bytes; an honest header of 10,000 tensors has about 1 MB


# -- JSON ------------------------------------------------------------------------------------------


def canonical(value: Any) -> str:
    """Return JSON text, the same for equal values; raise `IntegrityError` for NaN and non-JSON.

    A number of numpy's or torch's counts as the plain one that it holds.
    """
    try:
        return json.dumps(
            value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=_plain
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise IntegrityError(f"Not storable as JSON: {error}") from None


def _plain(value: Any) -> Any:
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    raise TypeError(f"an object of type {type(value).__name__} is no JSON")


def parse_json(text: str | bytes, source: str = "data") -> Any:
    """Parse JSON from outside: finite numbers only; raise `IntegrityError` for anything else."""
    try:
        return _DECODER.decode(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, TypeError, RecursionError) as error:
        raise IntegrityError(f"{source} is not sound JSON: {error}") from None


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"the number {text} is not finite")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        _refuse_number(text)
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite)


# -- bytes -----------------------------------------------------------------------------------------


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bytes:
    """Return one safetensors file as bytes; equal content gives equal bytes.

    Raises `IntegrityError` for metadata that is no JSON or does not fit into a header.
    """
    from safetensors.torch import save

    text = canonical(dict(metadata))
    ordered: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors refuses tensors that overlap in memory; a copy each is what is meant here.
        ordered[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    try:
        data: bytes = save(ordered, metadata={FIELD: text})
    except Exception as error:  # its own type, and built-in ones for names and dtypes
        raise IntegrityError(f"These tensors cannot be stored as safetensors: {error}") from None
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER:
        raise IntegrityError(
            f"The names and metadata of {len(ordered)} tensors take {length} bytes; a file holds "
            f"at most {MAX_HEADER}. Store them in several files."
        )
    return data


def from_bytes(data: bytes, source: str = "data") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, metadata); raise `IntegrityError` for anything that is no such file."""
    from safetensors.torch import load

    metadata = _check_header(data, source)
    try:
        tensors: dict[str, Tensor] = load(data)
    except Exception as error:  # safetensors raises its own and several built-in types
        raise IntegrityError(f"{source} is not a sound safetensors file: {error}") from None
    return tensors, metadata


def _check_header(data: bytes, source: str) -> dict[str, Any]:
    """Validate length and metadata of the header before anything else looks at the bytes."""
    if len(data) < 8:
        raise IntegrityError(f"{source} is too short for a safetensors file ({len(data)} bytes).")
    (length,) = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER:
        raise IntegrityError(
            f"{source} is no file of edits, nor other data of errata: it begins with "
            f"{data[:8]!r}, not as a safetensors file does."
        )
    if length > len(data) - 8:
        raise IntegrityError(
            f"{source} is not a sound safetensors file: its header claims {length} bytes."
        )
    try:
        header = json.loads(data[8 : 8 + length])
        text = header["__metadata__"][FIELD]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise IntegrityError(f"{source} was not written by errata (no readable header).") from None
    metadata = parse_json(text, f"The metadata of {source}")
    if not isinstance(metadata, dict):
        raise IntegrityError(f"{source} was not written by errata (its metadata is no object).")
    return metadata


# -- files -----------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename, fsync of the folder.

    Raises `StorageError` when the disk refuses; no partial file stays behind, or where the
    process is killed only until the next `sweep`.
    """
    temporary = unfinished(path)
    with noted(temporary, path):
        replace_whole(path, data, temporary)


def replace_whole(
    path: Path, data: bytes, temporary: Path, *, sync_parent: bool = True, mode: int = 0o666
) -> None:
    """Write a file whole or not at all by way of `temporary`, on the same file system.

    With `sync_parent=False` the rename is durable only after the caller's `sync_folder`. `mode`
    is what the file may be used for, the umask taken off.
    """
    try:
        with open(temporary, "xb", opener=lambda name, how: os.open(name, how, mode)) as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        if sync_parent:
            sync_folder(path.parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise StorageError(
            f"Cannot write {path}: {reason_of(error)}. Nothing was written."
        ) from error
    finally:
        with suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write a safetensors file atomically; return the SHA-256 of its bytes."""
    data = to_bytes(tensors, metadata)
    write_bytes(path, data)
    return sha256(data)


def read_bytes(path: Path, digest: str | None = None) -> bytes:
    """Read a file, verifying its SHA-256 when given.

    Raises `IntegrityError` when the content is another and `StorageError` when it cannot be read.
    """
    with disk(f"read {path}"):
        data = path.read_bytes()
    if digest is not None and sha256(data) != digest:
        raise IntegrityError(
            f"{path} does not have the content it was written with (its SHA-256 differs): "
            "the file is damaged or was replaced."
        )
    return data


def read_whole(path: Path) -> bytes:
    """Read a safetensors file of errata after its header said that it is as long as it should be.

    What is no such file is refused unread, however long it is. Raises `IntegrityError` for it, and
    `StorageError` when it cannot be read.
    """
    check_length(path)
    return read_bytes(path)


def check_length(path: Path) -> None:
    """Raise `IntegrityError` unless a file of errata is as long as its own header says.

    Only the header is read. Raises `StorageError` when it cannot be.
    """
    with disk(f"read {path}"), path.open("rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        (length,) = struct.unpack("<Q", handle.read(8).ljust(8, b"\0"))
        head = handle.read(min(length, MAX_HEADER))
    _check_header(struct.pack("<Q", length) + head, str(path))
    try:
        header = json.loads(head)
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise IntegrityError(f"{path} is not a sound safetensors file: its header.") from None
    if size != whole:
        raise IntegrityError(
            f"{path} is damaged: it has {size} bytes, its header speaks of {whole}."
        )


def sha256(data: bytes) -> str:
    """Return the SHA-256 of bytes as hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits; raise `OSError`."""
    found = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Create a folder durably unless it exists; raise `StorageError` when the disk refuses."""
    with disk(f"create the folder {path}"):
        if not path.is_dir():
            path.mkdir(mode=mode, parents=True, exist_ok=True)
            sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within a folder durable; raise `OSError` when the disk refuses."""
    if os.name == "nt":  # Windows cannot open folders; there the rename itself must do
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
