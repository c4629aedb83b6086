"""Which part of a worker carries out a unit of work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from errata.bench.sequential import run_stream

if TYPE_CHECKING:
    from errata.bench.results import Line
    from errata.bench.work_units import WorkUnit
    from errata.bench.worker import Worker


def carry_out(worker: Worker, unit: WorkUnit) -> Iterator[Line]:
    """Yield the lines of a unit of work that are not written yet."""
    if unit.work == "describe":
        yield {"kind": "model", **worker.description()}
    elif unit.work == "prepare":
        worker.prepare(unit.variant, unit.seed)
    elif unit.work == "base":
        yield from worker.base(unit)
    elif unit.work == "base-state":
        yield from worker.base_state(unit)
    elif unit.work == "stream":
        yield from run_stream(worker, unit)
    else:
        yield from worker.together(unit)
