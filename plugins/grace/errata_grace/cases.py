"""What one edit is trained on: a prompt with its target, or a text with its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from errata.model.running import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata.model.prompts import PreparedPrompts


@dataclass(frozen=True, eq=False)
class Case:
    """One row ready to run, and where the model is wanted to say what.

    Attributes:
        prompt: the row, without padding; its labels are the wanted tokens, or one class.
        ignored: number of positions of the training sequence without a label.
        text: the target for people.
    """

    prompt: PreparedPrompts
    ignored: int
    text: str

    @property
    def end(self) -> int:
        """Column of the last prompt token (of the encoder, where there are two sequences)."""
        return self.prompt.ends[0]

    @property
    def labels(self) -> Tensor:
        """(n,) wanted token ids; for a classifier one class."""
        return self.prompt.labels


def case_of(model: Model, request: Request) -> Case:
    """Return what a request is trained on.

    A sequence classifier learns the class that `target_new` names; any other model the target's
    tokens after the prompt (in an encoder: in the place of mask tokens). An encoder-decoder also
    learns to close the target, as in the published code.

    Raises:
        RequestError: a classifier has no such class.
    """
    prompt = prepare(model, [request.text], [request.target], closing=True)
    labelled = model.task in ("seq2seq", "classify")
    ignored = 0 if labelled else prompt.input_ids.shape[1] - len(prompt.labels)
    return Case(prompt, ignored, request.target_new)
