"""Where computed things are kept between runs: statistics, projectors, trained networks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errata.errors import IntegrityError
from errata.model.arguments import path_of
from errata.model.scratch import default_directory
from errata.model.storage import (
    make_folder,
    read_bytes,
    read_tensors,
    sha256,
    write_bytes,
    write_tensors,
)

if TYPE_CHECKING:
    from torch import Tensor


class Artifacts:
    """A folder of safetensors files, each named by a key that says what it belongs to.

    A key is a tuple of strings, for instance ("second_moment", fingerprint, layer, text hash,
    tokens); it becomes a path and is repeated inside the file, so a file that was moved or
    damaged is recomputed instead of believed. Pass `directory=None` to use the default folder.
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
        """Return (tensors, metadata) of a key, or None when absent or not readable as written."""
        path = self.path(key)
        if not path.is_file():
            return None
        try:
            tensors, metadata = read_tensors(path)
        except IntegrityError:
            return None
        if metadata.get("key") != list(key):
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
        write_tensors(path, tensors, {**metadata, "key": list(key)})
        return path

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

    def take(self, files: Mapping[str, bytes]) -> None:
        """Store files by name that came from elsewhere, but for those that are there already."""
        for name, data in files.items():
            path = self._inside(name)
            if not path.is_file():
                make_folder(path.parent)
                write_bytes(path, data)

    def _inside(self, name: str) -> Path:
        parts = name.split("/")
        if not name.endswith(".safetensors") or any(
            p in ("", ".", "..") or "\\" in p for p in parts
        ):
            raise IntegrityError(f"{name!r} is no name of an artifact.")
        return self.directory.joinpath(*parts)
