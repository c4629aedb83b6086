"""The time and memory that computing edits takes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from typing_extensions import Self

from errata.edits.outcome import PeakMemoryReading
from errata.model.memory import PeakMemory

if TYPE_CHECKING:
    from errata.model.model import Model


class Meter:
    """Measures wall time and the peak of memory of a block, as `errata.model.memory` defines it.

    Attributes:
        seconds: the time.
        peak: the growth of memory; None where the system says nothing.
    """

    seconds: float = 0.0
    peak: PeakMemoryReading | None = None

    def __init__(self, model: Model) -> None:
        self._memory = PeakMemory(model)

    def __enter__(self) -> Self:
        self._memory.__enter__()
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._started
        self._memory.__exit__(*error)
        if self._memory.nbytes is not None:
            self.peak = PeakMemoryReading(bytes=self._memory.nbytes, how=self._memory.how)
