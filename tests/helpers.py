"""What several test files share: the recorded data folder and tiny random models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_path(*parts: str) -> Path:
    """Return a path in the folder of recorded data, or skip the test where it is absent."""
    folder = Path(os.environ.get("ERRATA_SHARED", ROOT.parent / "shared"))
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data {'/'.join(parts)} not found: set ERRATA_SHARED to its folder")
    return path
