"""What the unedited model says after a prompt: what KnowledgeEditor reads, and what must stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from errata.model.generation import own_texts
from errata.model.next_token import own_next_logits, predicted_classes
from errata.model.sampling import GenerationSettings

if TYPE_CHECKING:
    from errata.model.model import Model

_TOKENS = 8  # of a prediction, at most, up to the end of its line


class Predictions(dict[str, str]):
    """Prompt → what the model says after it, asked when it is first looked up.

    Args:
        model: the model, with every edit off when it is asked.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, text: str) -> str:
        # Each by itself: what it is asked with must not matter.
        said = self[text] = prediction(self._model, text)
        return said


@torch.no_grad()
def prediction(model: Model, text: str) -> str:
    """Return what the model says by itself: its class, its next word, or how it goes on.

    A continuation is greedy, and ends with its line; a full stop at its end is taken off, as
    KnowledgeEditor's authors do.
    """
    if model.task == "classify":
        return predicted_classes(model, [text])[0]
    if not model.generates:
        token = int(own_next_logits(model, [text]).argmax(-1))
        return str(model.tokenizer.decode([token])).strip()
    settings = GenerationSettings(max_new_tokens=_TOKENS, stop=("\n",))
    return own_texts(model, [text], settings)[0].text.strip().removesuffix(".")
