"""What callers pass, checked at the door: names, texts, paths, mappings, numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from errata.errors import ConfigError, RequestError, UnknownNameError


def check_name(what: str, name: object, known: Iterable[str], hint: str = "") -> None:
    """Raise `UnknownNameError` for what is no name, or not among the known ones."""
    names = list(known)
    if not isinstance(name, str) or name not in names:
        raise UnknownNameError(what, name if isinstance(name, str) else repr(name), names, hint)


def path_of(value: object, what: str) -> Path:
    """Return a path; raise `ConfigError` for what is none."""
    if not isinstance(value, (str, os.PathLike)) or not str(value).strip():
        raise ConfigError(f"{what}: {value!r} is no path: give text or a pathlib.Path.")
    return Path(value)


def is_file(text: str) -> bool:
    """Say whether a text names a file that is there; a text that cannot be a path does not."""
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than a path may be, or with a NUL in it
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
