"""What several test files share: the recorded data folder and tiny random models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from safetensors.torch import load_file

from errata.common.progress import Progress
from errata.kit.metric import Whitening
from errata.kit.second_moments import SecondMoment
from errata.zoo.meter import TrainedModel

T = TypeVar("T")
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


class Interrupting(Progress):
    """Progress of a training that is interrupted after three steps."""

    def track(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        for count, item in enumerate(super().track(items, text, total)):
            if count == 3:
                raise KeyboardInterrupt
            yield item


def interrupted(train: Callable[..., TrainedModel], folder: Path) -> Path:
    """Train twice, once interrupted after step 3, and return the folder of the whole training.

    Asserts that both end with the same weights.

    Args:
        train: takes the folder to write, and `progress` and `save_every` of a zoo training.
        folder: where both are written.
    """

    whole, halves = train(folder / "whole"), folder / "halves"
    with pytest.raises(KeyboardInterrupt):
        train(halves, progress=Interrupting(), save_every=2)
    again = train(halves, save_every=2)
    assert (again.steps, again.loss) == (whole.steps, whole.loss)
    one, other = (load_file(path / "model.safetensors") for path in (whole.folder, halves))
    assert all(torch.equal(one[name], other[name]) for name in one)
    return whole.folder


def identity_metric(size: int) -> Whitening:
    """Return the metric M = I, as that of C = I."""
    return Whitening(SecondMoment(torch.eye(size, dtype=torch.float64), 1, 0))
