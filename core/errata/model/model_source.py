"""Where a model is to come from: a folder, or the hub. Read before anything is loaded.

Nothing here imports torch or transformers.
"""

from __future__ import annotations

import difflib
import os
import re
import socket
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from errata.errors import ConfigError, UnknownNameError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_LONGEST = 200
"""Characters; the hub's own limit for a name is 96, and a file system's 255."""
PATIENCE = 0.8
"""Seconds that the hub's host gets to say whether it is there; no answer counts as yes."""


def check_model_source(source: str, known: Collection[str] = ()) -> None:
    """Refuse a folder that is not there, and a hub name that cannot be had offline.

    A hub name that is in the hub's cache, or whose host answers, is left to transformers.

    Args:
        source: what was given as model.
        known: names of models that come from elsewhere, for the suggestion.

    Raises:
        ConfigError: a path where nothing is.
        UnknownNameError: no folder, not among `known`, not in the cache, and the hub is not within
            reach.
    """
    where = Path(source).expanduser()
    if source in known or os.path.exists(where):
        return
    if _is_path(source):
        raise ConfigError(f"There is no folder {source[:_LONGEST]!r}.{_nearby(where)}")
    if _cached(source) or _hub_answers():
        return
    offline = _offline()
    why = f"{offline} is set" if offline else "the hub cannot be reached from here"
    raise UnknownNameError(
        "model", source, known,
        f"It is no folder here{_nearby(where)} and not in the hub's cache, and {why}.",
    )  # fmt: skip


def local_checkpoint(name: str, revision: str | None = None) -> Path | None:
    """Return the folder that holds a model's files: a folder, or a snapshot in the hub's cache.

    None where neither is here; the hub is not asked.

    Args:
        name: folder or hub name, as a configuration's `_name_or_path` says it.
        revision: commit of the snapshot; None: the one that the cache calls main.
    """
    if not name or os.path.isdir(name):
        return Path(name) if name else None
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import constants, try_to_load_from_cache

    with suppress(ValueError):  # no name that a hub could have: "a--b"
        found = try_to_load_from_cache(
            name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision
        )
        return Path(found).parent if isinstance(found, str) else None
    return None


def _is_path(source: str) -> bool:
    """Say whether a name can only mean a path: hubs have NAME and OWNER/NAME."""
    separators = {os.sep, os.altsep or os.sep}
    if source.startswith((".", "~", *separators)) or source.endswith(tuple(separators)):
        return True
    if len(source) > _LONGEST or not _HUB_NAME.fullmatch(source):
        return True
    owner = Path(source).parent
    return owner != Path() and owner.is_dir()


def _nearby(where: Path) -> str:
    """Return a suggestion: an entry beside it with a similar name, or how far the path leads."""
    parent = where.parent
    if not os.path.isdir(parent):
        return ""
    try:
        names = [entry.name for entry in parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(where.name, names, n=1, cutoff=0.6)
    return f" Did you mean {str(parent / close[0])!r}?" if close else ""


def _cached(name: str) -> bool:
    """Say whether the hub's cache holds anything of a model."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return any(folder.glob("snapshots/*/*"))


def _offline() -> str:
    """Return the name of the variable that forbids asking the hub; "" if none does."""
    return next(
        (name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
         if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")), "",
    )  # fmt: skip


def _hub_answers() -> bool:
    """Say whether the hub may be within reach; behind a proxy and in doubt, yes."""
    if _offline():
        return False
    if getproxies():
        return True
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT)
    failed = threading.Event()

    def connect() -> None:
        try:
            port = host.port or (80 if host.scheme == "http" else 443)
            socket.create_connection((host.hostname or "", port), timeout=PATIENCE).close()
        except TimeoutError:
            pass
        except OSError:  # no such host, no route, nobody listens
            failed.set()

    # Looking a name up has no time limit of its own.
    asking = threading.Thread(target=connect, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return not failed.is_set()
