"""The plain texts that ship with errata: for statistics, for canaries, held out."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from errata.errors import UnknownNameError

TEXTS = ("train", "heldout", "canary")


def text_path(name: str) -> Path:
    """Return a shipped text, one paragraph per line: `train`, `heldout` or `canary`.

    `train` is the default corpus of second moments; no model of the zoo was trained on `heldout`
    or `canary`. Raises `UnknownNameError`.
    """
    if name not in TEXTS:
        raise UnknownNameError("text", name, TEXTS)
    return Path(str(resources.files("errata.model") / "text" / f"{name}.txt"))


@cache
def canary_texts(n: int = 16) -> tuple[str, ...]:
    """Return the first n of the general sentences and paragraphs that ship with errata."""
    lines = text_path("canary").read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))[:n]
