"""What KnowledgeEditor's network reads of an edit: "{prediction} >> {alternative} || {input}"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.kit.hypernetworks.predictions import Predictions

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model


class Conditions:
    """The texts that the network reads, with what the unedited model predicts.

    Args:
        model: the model, with every edit off when it is asked.
    """

    def __init__(self, model: Model) -> None:
        self._said = Predictions(model)

    def of(self, requests: Sequence[Request]) -> list[str]:
        """Return one text per request; the model is asked where `target_true` is not given."""
        return [
            f"{request.target_true or self._said[request.text]} >> {request.target_new} || "
            f"{request.text}"
            for request in requests
        ]
