"""Formats that edits leave in: entry points in "errata.exports" and "errata.merges".

Each names a function. One that exports takes (model, edits, path, overwrite); one that merges takes
(model, path, overwrite) and writes the base with all active edits. Both return the path. Their
keyword-only arguments are the options of the format.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from errata.common.arguments import check_name
from errata.common.installed import entry_points, loading, providers, the_one
from errata.errors import PluginError

EXPORTS, MERGES = "errata.exports", "errata.merges"
OWN = "errata"
"""The format of the ledger's own files; it has no options and no entry point."""


def names(group: str) -> list[str]:
    """Return the names of all formats of a group, `OWN` among those that edits leave in."""
    own = {OWN} if group == EXPORTS else set()
    return sorted(own | {point.name for point in entry_points(group)})


def writer(group: str, name: str, options: Mapping[str, Any]) -> Callable[..., Path]:
    """Return the function that writes a format; `OWN` is written by the ledger instead.

    Raises `UnknownNameError` for a format, or an option of it, that there is not, and
    `PluginError` for one that does not load or that two packages claim.
    """
    check_name(f"{group[7:-1]} format", name, names(group))
    function = _by_ledger if (group, name) == (EXPORTS, OWN) else _load(group, name)
    known = _options(function)
    for option in options:
        check_name(f"option of format {name!r}", option, known)
    return function


def _by_ledger(*_: Any) -> Path:
    raise NotImplementedError("Ledger.export writes files of errata's own format")


def _options(function: Callable[..., Path]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _load(group: str, name: str) -> Callable[..., Path]:
    point = the_one(providers(group)[name], f"format of {group!r}")
    where = f"The format {name!r} ({point.value})"
    with loading(point, where):
        function = point.load()
    if not callable(function):
        raise PluginError(f"{where} must be a function.")
    return function  # type: ignore[no-any-return]
