"""Where computed things are kept between runs: statistics, projectors, trained networks."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.common.arguments import path_of
from errata.common.scratch import default_directory
from errata.common.storage import (
    canonical,
    from_bytes,
    make_folder,
    read_bytes,
    sha256,
    to_bytes,
    write_bytes,
    write_tensors,
)
from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("errata")

_SEAL = "sha256"  # of a file's tensors and all else in its metadata


class Artifacts:
    """A folder of safetensors files, each named by a key that says what it belongs to.

    A key is a tuple of strings, for instance ("second_moment", fingerprint, layer, text hash,
    tokens); it becomes a path and is repeated inside the file, beside the SHA-256 of all else in
    it, so a file that was moved or damaged is recomputed instead of believed. Pass
    `directory=None` to use the default folder.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = (
            default_directory() if directory is None else path_of(directory, "artifacts")
        )

    def path(self, key: tuple[str, ...]) -> Path:
        """Return the file of a key."""
        safe = ["".join(c if c.isalnum() or c in "-_." else "_" for c in part) for part in key]
        return self.directory.joinpath(*safe[:-1], safe[-1] + ".safetensors")

    def load(self, key: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return (tensors, metadata) of a key; None where there is none, or it is damaged.

        Of a damaged file a warning says what to do.
        """
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            tensors, metadata = _checked(read_bytes(path), str(path))
            if metadata.get("key") != list(key):
                raise IntegrityError(f"{path} was moved there: it is filed under another name.")
        except IntegrityError as error:
            logger.warning(
                "%s It is not used. What is computed from the model is computed again; a network "
                "has to be trained again on its requests (errata prepare), or comes with an edit "
                "that is imported from its exported file.", error
            )  # fmt: skip
            return None
        return tensors, metadata

    def save(
        self, key: tuple[str, ...], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
    ) -> Path:
        """Store tensors and JSON metadata under a key, atomically.

        Raises `StorageError` when the disk refuses.
        """
        path = self.path(key)
        make_folder(path.parent)
        about = {**metadata, "key": list(key)}
        seal = _seal(to_bytes(tensors, about), about)
        write_tensors(path, tensors, {**about, _SEAL: seal})
        return path

    def under(self, key: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Return the keys that begin with this one and have one part more, as files name them."""
        folder = self.path((*key, "_")).parent
        return [(*key, path.stem) for path in sorted(folder.glob("*.safetensors"))]

    # -- as files, for edits that need them ------------------------------------------------------

    def name(self, key: tuple[str, ...]) -> str:
        """Return the name of a key's file within the folder, with "/" between its parts."""
        return self.path(key).relative_to(self.directory).as_posix()

    def digest(self, name: str) -> str | None:
        """Return the SHA-256 of a file's bytes; None where there is none."""
        path = self._inside(name)
        return sha256(read_bytes(path)) if path.is_file() else None

    def read(self, name: str) -> bytes:
        """Return a file's bytes; raise `StorageError` when it cannot be read."""
        return read_bytes(self._inside(name))

    def sound(self, name: str) -> bool:
        """Say whether a file is there and, as far as it can tell, what was written."""
        path = self._inside(name)
        if not path.is_file():
            return False
        try:
            _checked(read_bytes(path), str(path))
        except IntegrityError:
            return False
        return True

    def take(self, files: Mapping[str, bytes]) -> None:
        """Store files that came from elsewhere, by name; those here that are sound stay."""
        for name, data in files.items():
            path = self._inside(name)
            if not self.sound(name):
                make_folder(path.parent)
                write_bytes(path, data)

    def _inside(self, name: str) -> Path:
        parts = name.split("/")
        if not name.endswith(".safetensors") or any(
            p in ("", ".", "..") or "\\" in p for p in parts
        ):
            raise IntegrityError(f"{name!r} is no name of an artifact.")
        return self.directory.joinpath(*parts)


def _checked(data: bytes, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, metadata) of a file; raise `IntegrityError` unless it is as it was written.

    (A file without a seal, as earlier versions wrote it, is believed.)
    """
    tensors, metadata = from_bytes(data, source)
    seal = metadata.pop(_SEAL, None)
    if seal is not None and seal != _seal(data, metadata):
        raise IntegrityError(f"{source} is damaged: its content does not have its SHA-256.")
    return tensors, metadata


def _seal(data: bytes, metadata: Mapping[str, Any]) -> str:
    """Return the SHA-256 of metadata and of what comes after the header of a safetensors file."""
    (length,) = struct.unpack("<Q", data[:8])
    found = hashlib.sha256(canonical(metadata).encode())
    found.update(memoryview(data)[8 + length :])
    return found.hexdigest()
