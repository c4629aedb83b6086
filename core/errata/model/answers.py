"""The questions that errata asks a model, and who answers: the model, or something else.

Everything that scores or generates in errata goes through `errata.model.scoring` and
`errata.model.generation`, which first let the active edits rewrite the prompts and then ask, row
by row, whoever answers: the model itself, or what an edit puts in its place (a counterfactual
model, an answer loop).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.scoring import TargetScore


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: the new text.
        ids: its tokens, end tokens left out; empty where what answers has other tokens.
        details: what else is known of how it came about (a loop's trace); plain JSON.
    """

    text: str
    ids: tuple[int, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


class Answers(Protocol):
    """Something that answers prompts: the model itself, or what an edit puts in its place."""

    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Return the teacher-forced score of each target after its prompt."""

    def texts(self, prompts: Sequence[str], **options: Any) -> Sequence[Generated]:
        """Continue each prompt; the options are those of `errata.model.generation.generate`."""

    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, vocabulary) of the first token after each prompt."""

    def class_scores(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, classes) of a sequence classifier."""
