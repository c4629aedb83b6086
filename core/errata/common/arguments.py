"""What callers pass, checked at the door: names, texts, paths, mappings, numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from errata.errors import ConfigError, IntegrityError, RequestError, UnknownNameError, disk


def check_name(what: str, name: object, known: Iterable[str], hint: str = "") -> None:
    """Raise `UnknownNameError` for what is no name, or not among the known ones."""
    names = list(known)
    if not isinstance(name, str) or name not in names:
        raise UnknownNameError(what, name if isinstance(name, str) else repr(name), names, hint)


def check_options(what: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raise `ConfigError` for an option that there is not; it names the closest one."""
    names = list(known)
    for option in options:
        if option not in names:
            raise ConfigError(str(UnknownNameError(f"option of {what}", option, names)))


def path_of(value: object, what: str) -> Path:
    """Return a path; raise `ConfigError` for what is none."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise ConfigError(f"{what}: {value!r} is no path: give text or a pathlib.Path.")
    return Path(value)


def folder_of(value: object, what: str) -> Path:
    """Return the path of a folder that is there or can be made, and make nothing.

    Raises `ConfigError` for what is no path, `IntegrityError` for a file, `StorageError` where no
    folder can be made.
    """
    folder = path_of(value, what)
    with disk(f"open the {what} {str(folder)!r}"):
        missing = [part for part in (folder, *folder.parents) if not part.exists()]
        if missing:
            with suppress(FileExistsError):  # another process made it just now
                missing[-1].mkdir()  # only trying tells: /proc, a read-only disk, a full one
                missing[-1].rmdir()
        is_file = not missing and not folder.is_dir()
    if is_file:
        raise IntegrityError(f"{folder} is a file; a {what} is a folder. Give another path.")
    return folder


def names_file(text: str) -> bool:
    """Say whether a text names a file that is there, and is not an edit's id.

    Raises `ConfigError` for a text that looks like a path where no file is.
    """
    path = Path(text)
    try:
        if path.is_file():
            return True
    except (OSError, ValueError):  # longer than a path may be, or with a NUL in it
        pass
    if len(path.parts) > 1 or path.suffix:
        raise ConfigError(f"There is no file {text!r}, and an id looks like 3f2a9c01d7e4.")
    return False


def texts_of(value: object, what: str) -> list[str]:
    """Return texts from one or many; raise `RequestError` for what is no whole text."""
    texts: list[Any] = list(value) if isinstance(value, Iterable) and is_list(value) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise RequestError(f"{what}: {text!r} is no text.")
        if not is_whole(text):
            raise RequestError(f"{what}: {text[:200]!r} holds half a character (a lone surrogate).")
    return texts


def is_list(value: object) -> bool:
    """Say whether something holds several things: it can be gone through, and is no text."""
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def is_whole(text: str) -> bool:
    """Say whether a text can be written as UTF-8: it holds no half of a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def mapping_of(value: object, what: str) -> dict[str, Any]:
    """Return a mapping of names; None gives an empty one. Raise `ConfigError` for anything else."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what} maps names to values; {value!r} does not.")
    return dict(value)
