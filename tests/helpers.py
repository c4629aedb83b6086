"""What several test files share: the recorded data folder and tiny random models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from errata.kit.metric import Whitening
from errata.kit.second_moments import SecondMoment

ROOT = Path(__file__).resolve().parent.parent


GOLDEN = ROOT / "tests" / "golden"
"""What the authors' code of published methods and metrics gave on one small model."""


def shared_path(*parts: str) -> Path:
    """Return a path in the folder of recorded data, or skip the test where it is absent."""
    folder = Path(os.environ.get("ERRATA_SHARED", ROOT.parent / "shared"))
    path = folder.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"recorded data {'/'.join(parts)} not found: set ERRATA_SHARED to its folder")
    return path


def identity_metric(size: int) -> Whitening:
    """Return the metric M = I, as that of C = I."""
    return Whitening(SecondMoment(torch.eye(size, dtype=torch.float64), 1, 0))
