"""A stranger's format: the prompts of the edits, one a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from errata.edits.edit import Edit
from errata.model import Model


def write_list(
    model: Model, edits: Sequence[Edit], path: Path, overwrite: bool = False, *, mark: str = "-"
) -> Path:
    """Write one line for each request."""
    lines = [f"{mark} {request.text}" for edit in edits for request in edit.requests]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
