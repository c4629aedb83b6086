"""What a model is asked, and what answers: the model itself, or something in its place.

Everything that scores or generates in errata goes through `errata.model.scoring`,
`errata.model.generation` and `errata.model.next_token`. They let the active edits rewrite the
prompts, and then ask, row by row, who answers (`errata.model.active_edits.ask`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.sampling import GenerationSettings


ENDINGS = ("final", "format", "rounds", "length")
"""How a loop that answers in the model's place ends (`ending` in its part of `Generated.details`).

With an answer; because the model left the format; after as many rounds as are allowed; with the
context full. Another loop may have endings of its own.
"""

Watch = Callable[[int, int, str], bool]
"""Told the prompt's place, its newest token and its text so far; True ends that text."""


@dataclass(frozen=True)
class TargetScore:
    """How probable a target is after its prompt, token by token, gold tokens before each.

    A sequence classifier's target is one class, which counts as one token.

    Attributes:
        token_ids: the target's tokens.
        logprobs: log-probability of each, in nats.
        predicted: the most probable token at each place.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    predicted: tuple[int, ...]

    @property
    def greedy(self) -> list[bool]:
        """For each token, whether it is the most probable one."""
        return [a == b for a, b in zip(self.token_ids, self.predicted, strict=True)]

    @property
    def exact(self) -> bool:
        """Whether every token is the most probable one."""
        return self.token_ids == self.predicted

    @property
    def mean_nll(self) -> float:
        """Negative log-probability per token, in nats."""
        return -math.fsum(self.logprobs) / len(self.logprobs)

    @property
    def logprob(self) -> float:
        """Log-probability of the whole target, in nats."""
        return math.fsum(self.logprobs)

    @property
    def probability(self) -> float:
        """Length-normalised probability exp(-mean_nll), as the ROME paper compares it."""
        return math.exp(-self.mean_nll)


@dataclass(frozen=True)
class Generated:
    """A continuation.

    Attributes:
        text: the new text.
        ids: its tokens, end tokens left out; empty where what answers has other tokens.
        details: what else is known of how it came about, by the name of what answered (a loop's
            trace); plain JSON.
    """

    text: str
    ids: tuple[int, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)


def ending_of(details: Mapping[str, Any]) -> str:
    """Return how a loop ended, from the details of its answer; "" where no loop answered."""
    parts = (part for part in details.values() if isinstance(part, dict))
    return next((str(part["ending"]) for part in parts if part.get("ending")), "")


@runtime_checkable
class Answers(Protocol):
    """Something that answers prompts: the model itself, or what an edit puts in its place.

    `errata.model.model_answers.ModelAnswers` is the model itself, which whatever answers in its
    place may ask. A question that makes no sense for it raises `CapabilityError`.
    """

    def scores(self, prompts: Sequence[str], targets: Sequence[str]) -> Sequence[TargetScore]:
        """Return the teacher-forced score of each target after its prompt."""

    def texts(self, prompts: Sequence[str], settings: GenerationSettings) -> Sequence[Generated]:
        """Continue each prompt."""

    def next_logits(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, vocabulary) of the first token after each prompt."""

    def class_scores(self, prompts: Sequence[str]) -> Tensor:
        """Return the logits (B, classes) of a sequence classifier."""


@runtime_checkable
class WatchedAnswers(Answers, Protocol):
    """Answers that are written token by token: each row can be read meanwhile, and ended."""

    def watched_texts(
        self, prompts: Sequence[str], settings: GenerationSettings, watch: Watch
    ) -> Sequence[Generated]:
        """Continue each prompt as `texts` does, with `watch` told of every token."""
