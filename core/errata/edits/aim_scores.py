"""How probable a model, as it stands, finds the answers that requests say something of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.edits.aims import Aim, aims_of_request
from errata.model.scoring import score_targets

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model.answers import TargetScore
    from errata.model.model import Model


def score_aims(
    model: Model, requests: Sequence[Request]
) -> list[tuple[list[Aim], list[TargetScore]]]:
    """Return each request's aims that name an answer, and how probable the model finds these."""
    asked = [[aim for aim in aims_of_request(request) if aim.answer] for request in requests]
    pairs = [
        (request.filled(aim.prompt), aim.answer)
        for request, aims in zip(requests, asked, strict=True)
        for aim in aims
    ]
    scores = iter(score_targets(model, [prompt for prompt, _ in pairs], [a for _, a in pairs]))
    return [(aims, [next(scores) for _ in aims]) for aims in asked]
