"""Unfinished files and folders: noted while they are made, swept when their maker was killed."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform != "win32":  # there nothing is noted, and nothing swept
    import fcntl

NAME = re.compile(r"\.(.{1,64})\.[0-9a-f]{12}\.tmp", re.DOTALL)
OLD = "old"
"""Within an unfinished folder: what stood in its place, moved here to be replaced."""


def default_directory() -> Path:
    """Return the cache directory: $ERRATA_CACHE, else the platform's cache folder."""
    given = os.environ.get("ERRATA_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "errata"


def unfinished(target: Path, folder: Path | None = None) -> Path:
    """Return a fresh name for what will become `target`, beside it or in `folder`."""
    name = f".{target.name[:64]}.{secrets.token_hex(6)}.tmp"
    return (target.parent if folder is None else folder) / name


@contextmanager
def noted(scratch: Path, target: Path) -> Iterator[None]:
    """Keep a note, while the block runs, that `scratch` is to become `target`.

    The note lies in the cache folder and is locked by this process. The system lets the lock go
    when the process ends in any way, so `sweep` knows whose maker is gone. Where no note can be
    kept the block runs without.
    """
    note, handle = None, None
    with suppress(OSError):
        note, handle = _keep_note(scratch, target)
    try:
        yield
    finally:
        if note is not None and handle is not None:
            with suppress(OSError):
                note.unlink(missing_ok=True)
            os.close(handle)


def fill_folder(target: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` write a new folder beside `target` and rename it there: it is whole or absent.

    What stood there is gone only once the new one is in place. What a killed process leaves is
    swept at the next `sweep`. Raises `OSError` when the disk refuses, and whatever `fill` raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = unfinished(target)
    with noted(scratch, target):
        new, old = scratch / "new", scratch / OLD
        try:
            new.mkdir(parents=True)
            fill(new)
            if target.exists():
                target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def sweep() -> list[Path]:
    """Delete what killed processes left unfinished, wherever it is; return what was deleted.

    Only what errata noted, under a name that errata gives, and only when no process holds the
    note. A folder that was just being replaced is put back first.
    """
    swept: list[Path] = []
    if sys.platform == "win32":
        return swept
    for note in sorted(_folder().glob("*.json")) + sorted(_folder().glob(".*.draft")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            handle = os.open(note, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: it lives
                text = note.read_text(encoding="utf-8")
                note.unlink()
                about = json.loads(text)
                swept += _clear(Path(about["scratch"]), Path(about["target"]))
            finally:
                os.close(handle)
    return swept


def _folder() -> Path:
    return default_directory() / "unfinished"


def _keep_note(scratch: Path, target: Path) -> tuple[Path | None, int | None]:
    if sys.platform == "win32":
        return None, None
    folder = _folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    number = secrets.token_hex(8)
    draft, note = folder / f".{number}.draft", folder / f"{number}.json"
    handle = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        text = json.dumps({"scratch": str(scratch.absolute()), "target": str(target.absolute())})
        os.write(handle, text.encode())
        draft.rename(note)  # only once it is locked and whole
    except BaseException:
        os.close(handle)
        raise
    return note, handle


def _clear(scratch: Path, target: Path) -> list[Path]:
    match = NAME.fullmatch(scratch.name)
    if match is None or match[1] != target.name[:64] or scratch.parent != target.parent:
        return []
    if scratch.is_symlink() or not scratch.exists():
        return []
    if scratch.is_dir():
        if (scratch / OLD).exists() and not target.exists():
            (scratch / OLD).rename(target)
        shutil.rmtree(scratch)
    else:
        scratch.unlink()
    return [scratch]
