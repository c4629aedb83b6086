"""The outcome of an edit: what was measured on the state that the user gets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from errata.common.display import Described, plural, shortened


class _OutcomePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Efficacy(_OutcomePart):
    """Whether the edit's own requests take effect."""

    value: float = Field(description="Share of requests that take effect")
    n: int = Field(description="Number of requests")
    probability: tuple[float, ...] = Field(
        default=(), description="Length-normalised probability of each target"
    )
    missed: tuple[str, ...] = Field(default=(), description="Which answers are not as asked")
    protocol: str = Field(
        default="teacher-forced: every target token is the most probable one",
        description="How it was measured",
    )


class TextPerplexity(_OutcomePart):
    """Perplexity on the guards' canary text."""

    value: float = Field(description="With all edits of the call on the model")
    ratio_to_base: float = Field(description="Divided by that of the base")


class RelativeNorm(_OutcomePart):
    """The largest change of a parameter."""

    value: float = Field(description="‖Δ‖ / ‖W‖ (Frobenius)")
    parameter: str = Field(description="Name of the parameter")


class PeakMemoryReading(_OutcomePart):
    """The memory that computing the edit took."""

    bytes: int = Field(description="Growth of memory to its peak")
    how: str = Field(description="What was read")


class Outcome(Described, _OutcomePart):
    """What was measured when an edit was made, and which other edits it has to do with.

    Fields that were not measured are None or empty, and are left out of stored records.
    """

    efficacy: Efficacy | None = None
    perplexity: TextPerplexity | None = None
    relative_norm: RelativeNorm | None = None
    peak_memory: PeakMemoryReading | None = None
    warnings: tuple[str, ...] = Field(
        default=(), description="What guards warned about, and whose keys it moves"
    )
    conflicts: tuple[str, ...] = Field(
        default=(), description="Ids of active edits that say something else about the same fact"
    )
    overlaps: dict[str, float] = Field(
        default_factory=dict,
        description="Ids of active edits with nearly the same key → whitened cosine",
    )
    supersedes: tuple[str, ...] = Field(
        default=(), description="Ids of edits that were taken off for this one"
    )
    rebases: str | None = Field(default=None, description="Id of the edit that this one replaces")

    def _facts(self) -> Iterable[tuple[str, str]]:
        if self.efficacy:
            one = self.efficacy
            yield "takes effect", f"{round(one.value * one.n)} of {one.n}"
        if self.relative_norm:
            yield "norm", f"{self.relative_norm.value:.3g}"
        if self.perplexity:
            yield "perplexity", f"× {self.perplexity.ratio_to_base:.3f}"
        for name, found in (("conflict", self.conflicts), ("overlap", self.overlaps)):
            if found:
                yield "", plural(len(found), name)
        if self.supersedes:
            yield "supersedes", shortened(" ".join(self.supersedes), 40)
        if self.rebases:
            yield "rebases", self.rebases
        if self.warnings:
            yield plural(len(self.warnings), "warning"), repr(shortened(self.warnings[0]))

    @model_serializer(mode="wrap")
    def _only_what_is_known(self, handler: Any) -> dict[str, Any]:
        return {
            name: value for name, value in handler(self).items() if value not in (None, (), [], {})
        }
