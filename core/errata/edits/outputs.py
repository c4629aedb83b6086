"""Where errata writes for its users: it replaces what it wrote itself, and nothing else.

A folder that errata writes holds a list of its files (`errata.json`); a file begins in a way that
tells it from others. What lacks that sign, and whatever belongs to a ledger, is never replaced.
"""

from __future__ import annotations

import json
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from errata.common.storage import write_bytes
from errata.edits.ledger.files import OWN
from errata.edits.ledger.schema import DATABASE
from errata.errors import ConfigError, disk

LISTING = "errata.json"
"""In a folder that errata wrote: the names of its files."""
HEAD = 2**16
"""Bytes of a file that are looked at."""


class OwnSign(NamedTuple):
    """How files of one kind begin when errata wrote them.

    Attributes:
        start: what stands at the beginning.
        within: what stands soon after.
        skip: bytes before the beginning.
    """

    start: bytes
    within: bytes = b""
    skip: int = 0


EXPORT = OwnSign(b'{"__metadata__":{"errata":', b"errata.export", skip=8)  # behind its length
PNG = OwnSign(b"\x89PNG", b"Software\0errata")
SVG = OwnSign(b"<?xml", b"<dc:title>errata</dc:title>")
BASELINE = OwnSign(b'{"kind": "errata-baseline"')


def check_file(path: Path, sign: OwnSign) -> None:
    """Refuse a place where a file may not be written; call it before long work, too.

    Args:
        path: of the file.
        sign: how errata's own files of this kind begin.

    Raises:
        ConfigError: something is there that errata did not write, or it belongs to a ledger.
        StorageError: what is there cannot be read.
    """
    _spare_ledgers(path)
    with disk(f"write {path}"):
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: give the name of a file.")
        if not path.is_file():
            return
        with path.open("rb") as handle:
            head = handle.read(HEAD)
    if head and not (head[sign.skip :].startswith(sign.start) and sign.within in head):
        raise ConfigError(
            f"{path} was not written by errata and is not replaced: give another name, or move it "
            "away."
        )


def write_file(path: Path, data: bytes, sign: OwnSign) -> Path:
    """Write a file whole or not at all, over nothing but an earlier one of its kind.

    Raises as `check_file` does, and `StorageError` when the disk refuses.
    """
    check_file(path, sign)
    with disk(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a pipe, a device
            path.write_bytes(data)
            return path
        target = path.resolve()
    write_bytes(target, data)
    return path


def check_folder(path: Path, overwrite: bool) -> None:
    """Refuse a place where a folder may not be written.

    Raises `ConfigError` for what is there, unless `overwrite` is given and all of it was written
    by errata.
    """
    _spare_ledgers(path)
    if not path.exists():
        return
    if not overwrite:
        raise ConfigError(f"{path} exists already: choose another place, or pass overwrite=True.")
    if not path.is_dir():
        raise ConfigError(f"{path} is a file, which no folder replaces: give another name.")
    listed = _listed(path)
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if name not in listed and (file.is_symlink() or not file.is_dir()):
            raise ConfigError(
                f"{path} holds what errata did not write ({name}) and is not replaced: give "
                "another name, or move it away."
            )


def list_files(folder: Path) -> None:
    """Write the list of a folder's files into it: they are errata's."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    listing = {"written_by": "errata", "files": sorted(names | {LISTING})}
    write_bytes(folder / LISTING, (json.dumps(listing, indent=1) + "\n").encode())


def _listed(folder: Path) -> set[str]:
    """Return the names that a folder's list holds; none where it has no list of errata's."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        listing = json.loads((folder / LISTING).read_bytes())
        if listing["written_by"] == "errata":
            return {str(name) for name in listing["files"]}
    return set()


def _spare_ledgers(path: Path) -> None:
    """Refuse a ledger and its own files; in a folder that only holds one, they are unlisted."""
    with disk(f"write {path}"):
        place = path.resolve()
        inside = [place, *place.parents]
        own = any(
            (above / DATABASE).is_file() and below.name.startswith(tuple(OWN))
            for below, above in pairwise(inside)
        )
        own = own or (place / DATABASE).is_file()
    if own:
        raise ConfigError(f"{path} belongs to a ledger and is never replaced: give another name.")
