"""The model itself as something that answers prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.model.generation import own_texts
from errata.model.next_token import own_class_scores, own_next_logits
from errata.model.scoring import own_scores

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.answers import Generated, TargetScore
    from errata.model.model import Model
    from errata.model.sampling import GenerationSettings


@dataclass(frozen=True)
class ModelAnswers:
    """Asks a model as it stands: prompts are read as given, and no edit answers in its place.

    What an edit puts in the model's place may ask it without being asked again itself: a mixture
    of two models, a loop that writes, looks up and goes on.
    """

    model: Model

    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Return the teacher-forced score of each target after its prompt."""
        return own_scores(self.model, prompts, targets)

    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> Sequence[Generated]:
        """Continue each prompt."""
        return own_texts(self.model, prompts, settings)

    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, vocabulary) of the first token after each prompt."""
        return own_next_logits(self.model, prompts)

    def class_scores(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, classes) of a sequence classifier."""
        return own_class_scores(self.model, prompts)
