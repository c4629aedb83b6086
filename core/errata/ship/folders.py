"""Folders that are shipped: whole or absent, and known again as errata's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from errata.common.scratch import fill_folder
from errata.edits.outputs import check_folder, list_files
from errata.errors import StorageError, reason_of, turning


def write_folder(path: Path, overwrite: bool, fill: Callable[[Path], object]) -> Path:
    """Fill a new folder beside `path` and rename it there, so that it is whole or absent.

    What it replaces is gone only once the new one is in place. Raises as `check_folder` does, and
    `StorageError` when the disk refuses.
    """
    check_folder(path, overwrite)

    def listed(folder: Path) -> None:
        try:
            fill(folder)
            list_files(folder)
        except StorageError as error:  # it names the folder that is being filled, which goes again
            raise StorageError(str(error).replace(str(folder), str(path))) from error

    # Those who save weights and tokenizers raise errors of their own.
    with turning(
        Exception, lambda error: StorageError(f"Cannot write {path}: {reason_of(error)}.")
    ):
        fill_folder(path, listed)
    return path
