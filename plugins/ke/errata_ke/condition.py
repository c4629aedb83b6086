"""What KnowledgeEditor's network reads of an edit: "{prediction} >> {alternative} || {input}"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.model.generation import own_texts
from errata.model.next_token import own_next_logits, predicted_classes
from errata.model.sampling import GenerationSettings

if TYPE_CHECKING:
    from errata.edits.request import Request
    from errata.model import Model

_TOKENS = 8  # of a prediction, at most, up to the end of its line


class Conditions:
    """The texts that the network reads, with what the unedited model predicts.

    Args:
        model: the model, with every edit off when it is asked.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._said: dict[str, str] = {}

    def of(self, requests: Sequence[Request]) -> list[str]:
        """Return one text per request; the model is asked where `target_true` is not given."""
        asked = dict.fromkeys(
            request.text
            for request in requests
            if not request.target_true and request.text not in self._said
        )
        for text in asked:  # each by itself: what it is asked with must not matter
            self._said[text] = prediction(self._model, text)
        return [
            f"{request.target_true or self._said[request.text]} >> {request.target_new} || "
            f"{request.text}"
            for request in requests
        ]


@torch.no_grad()
def prediction(model: Model, text: str) -> str:
    """Return what the model says by itself: its class, its next word, or how it goes on.

    A continuation is greedy, and ends with its line; a full stop at its end is taken off, as the
    authors do.
    """
    if model.task == "classify":
        return predicted_classes(model, [text])[0]
    if not model.generates:
        token = int(own_next_logits(model, [text]).argmax(-1))
        return str(model.tokenizer.decode([token])).strip()
    settings = GenerationSettings(max_new_tokens=_TOKENS, stop=("\n",))
    return own_texts(model, [text], settings)[0].text.strip().removesuffix(".")
