"""How far a run is: cases done, of those planned, per variant."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from errata.bench.report.reading import RunResults

DONE_STAGES = ("single", "batch", "immediate")


@dataclass(frozen=True)
class RunProgress:
    """Cases done and planned.

    Attributes:
        run: its name.
        done: cases edited and measured, or failed, over all variants, regimes and seeds.
        planned: how many there will be; None where the run does not say.
    """

    run: str
    done: int
    planned: int | None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing, as far as one can tell."""
        return self.planned is None or self.done >= self.planned

    def __str__(self) -> str:
        if self.planned is None:
            return f"{self.done} cases"
        share = math.floor(100 * self.done / self.planned) if self.planned else 100
        return f"{self.done} of {self.planned} cases" + (
            "" if self.is_complete else f" ({share} %): the run is not finished"
        )


def progress(run: RunResults) -> RunProgress:
    """Return how far a run is."""
    done = {
        (entry.variant, entry.seed, entry.regime, entry.dataset, entry.case_id, entry.index)
        for entry in run.entries
        if not entry.is_base
        and entry.case_id is not None
        and (entry.kind == "failure" or entry.stage in DONE_STAGES)
    }
    return RunProgress(run.name, len(done), _planned(run))


def _planned(run: RunResults) -> int | None:
    info = run.info
    if isinstance(info.get("planned"), int):
        return int(info["planned"])
    try:
        cases = sum(int(one["cases"]) for one in info["datasets"])
    except (KeyError, TypeError, ValueError):
        return None
    config: dict[str, Any] = info.get("config") or {}
    seeds = config.get("seeds") or [config.get("seed", 0)]
    regimes = config.get("regimes") or [config.get("regime")]
    variants = info.get("variants") or ()
    return cases * len(variants) * len(seeds) * len(regimes) if variants else None
