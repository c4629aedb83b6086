"""How much memory a block of code needed at its peak, on GPUs or in the process."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import Self

if TYPE_CHECKING:
    import torch

    from errata.model.model import Model

_STATM = Path("/proc/self/statm")
_EVERY = 0.01  # seconds between two looks


class PeakMemory:
    """Measures how far memory grew in the block, from its start to its peak.

    On CUDA: what PyTorch's allocator handed out on all devices of the model, exactly; its peak
    counters are reset. On the CPU: resident memory of the whole process, read every 10 ms where
    the system shows it (Linux), and exactly where the block went beyond all that was before. Then
    it holds what other threads and lazily loaded files take, and it does not hold what the
    process had freed before but kept: the same work done again may show a growth of 0.

    >>> with PeakMemory(model) as peak:  # doctest: +SKIP
    ...     compute()
    >>> peak.nbytes, peak.how  # doctest: +SKIP
    (81788928, 'resident memory of the process, sampled')

    Attributes:
        nbytes: the growth; None where the system says nothing.
        how: what was read.
    """

    nbytes: int | None = None
    how: str = ""

    def __init__(self, model: Model) -> None:
        devices = {parameter.device for parameter in model.parameters.values()}
        self._devices = sorted((d for d in devices if d.type == "cuda"), key=str)
        self._stop = threading.Event()
        self._highest = 0

    def __enter__(self) -> Self:
        if self._devices:
            self._before = _allocated(self._devices, peak=False)
            return self
        self._resident = resident()
        self._mark = high_water()
        if self._resident is not None:
            self._highest = self._resident
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._devices:
            self.nbytes = _allocated(self._devices, peak=True) - self._before
            self.how = "PyTorch's CUDA allocator"
            return
        mark = high_water()
        if self._resident is not None:
            self._stop.set()
            self._thread.join()
            self._highest = max(self._highest, resident() or 0)
            if mark is not None and self._mark is not None and mark > self._mark:
                self._highest = max(self._highest, mark)
            self.nbytes = self._highest - self._resident
            self.how = "resident memory of the process, sampled"
        elif mark is not None and self._mark is not None:
            self.nbytes = mark - self._mark
            self.how = "growth of the process's largest resident memory"

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY):
            self._highest = max(self._highest, resident() or 0)


def resident() -> int | None:
    """Return the bytes of physical memory that the process holds; None where nobody says."""
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    import resource

    return pages * resource.getpagesize()


def high_water() -> int | None:
    """Return the most bytes of physical memory that the process has held; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def _allocated(devices: list[torch.device], peak: bool) -> int:
    """Return what is allocated on the devices now (and count the peak from here), or the peak."""
    import torch

    total = 0
    for device in devices:
        torch.cuda.synchronize(device)
        if peak:
            total += torch.cuda.max_memory_allocated(device)
        else:
            torch.cuda.reset_peak_memory_stats(device)
            total += torch.cuda.memory_allocated(device)
    return total
