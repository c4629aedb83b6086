"""Where in a run a line of results belongs, and the key that says so."""

from __future__ import annotations

from dataclasses import dataclass

from errata.bench.config import BASE
from errata.bench.results import SCHEMA, Line
from errata.bench.run_spec import RunSpec


@dataclass(frozen=True)
class LinePlace:
    """Where in a run a line belongs.

    Attributes:
        variant, dataset: their numbers; variant -1 is the unedited model.
        seed: of the run.
        stage: "base", "single", "batch", "immediate" or "checkpoint".
        step: cases edited so far, 0 for the base.
        index: place of the case in its stream (dataset, where there is no stream); None for a
            state. A batch's state has the index of its first case.
        of_state: the line is about the model as a whole, not about a case.
    """

    variant: int
    dataset: int
    seed: int
    stage: str
    step: int
    index: int | None
    of_state: bool = False

    def key(self, spec: RunSpec) -> str:
        """Return the key of the line, unique in its run."""
        parts = [str(self.index)] if self.index is not None else []
        last = "-".join(["state", *parts] if self.of_state else parts)
        named = (spec.label(self.variant), spec.title(self.dataset))
        return "|".join([*named, str(self.seed), self.stage, str(self.step), last])

    def fields(self, spec: RunSpec, kind: str) -> Line:
        """Return what every line begins with."""
        method = BASE if self.variant < 0 else spec.config.methods[self.variant].method
        return {
            "schema": SCHEMA,
            "kind": kind,
            "key": self.key(spec),
            "method": method,
            "variant": spec.label(self.variant),
            "seed": self.seed,
            "regime": spec.config.regime,
            "stage": self.stage,
            "step": self.step,
            "index": self.index,
            "dataset": spec.title(self.dataset),
        }
