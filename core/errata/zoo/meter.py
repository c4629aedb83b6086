"""How far a training of the zoo is, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from errata.common.progress import Progress

SAID = 100
"""Steps between two notes of the loss."""


class TrainedModel(NamedTuple):
    """A model that was trained.

    Attributes:
        folder: its Hugging Face directory.
        steps: of the whole training.
        loss: of the last step, in nats; NaN where no step was left to do.
    """

    folder: Path
    steps: int
    loss: float


@dataclass
class TrainingMeter:
    """Steps of a training, reported as they are done.

    Attributes:
        progress: where it reports to.
        text: what is trained.
        steps: of the whole training.
        loss: of the last step; who trains sets it.
    """

    progress: Progress
    text: str
    steps: int
    loss: float = math.nan

    def left(self, done: int) -> Iterator[int]:
        """Yield the steps that are left after so many, from 0; note the loss now and then."""
        for step in self.progress.track(range(done, self.steps), self.text, self.steps - done):
            yield step
            if (step + 1) % SAID == 0 or step + 1 == self.steps:
                self.progress.note(f"step {step + 1} of {self.steps}, loss {self.loss:.3f}")
