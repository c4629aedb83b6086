"""What one edit is trained on: a prompt with its target, or a text with its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from errata.kit.aims import aims_of
from errata.kit.training import TrainingBatch, aim_batch
from errata.kit.training.training_batches import batch_loss, settled
from errata.model.joining import bare
from errata.model.running import prepare

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata.model.prompts import PreparedPrompts


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt ready to run, and what the model should say there, or no longer.

    Attributes:
        prompt: a row for each answer, all with the same prompt; its labels are their tokens, or
            one class.
        labels: (n,) token ids that the entry is filed under; for a classifier one class. A token
            t of what should no longer be said stands there as −1 − t: it is no answer.
        ignored: number of positions of the training sequence without a label.
        text: the target, or what is to be forgotten, for people.
        batch: the rows with their senses, where something should no longer be said.
        says: something should be said.
        kept: prompts of other active edits that must go on being answered as they are.
    """

    prompt: PreparedPrompts
    labels: Tensor
    ignored: int
    text: str
    batch: TrainingBatch | None = None
    says: bool = True
    kept: tuple[Case, ...] = ()

    @property
    def end(self) -> int:
        """Column of the last prompt token (of the encoder, where there are two sequences)."""
        return self.prompt.ends[0]

    def loss(self, logits: Tensor) -> Tensor:
        """Return the loss in nats, in fp32: −log P of what should be said, a mean over tokens."""
        if self.batch is not None:
            return batch_loss(self.batch, logits)[0]
        return functional.cross_entropy(logits.float(), self.prompt.labels.to(logits.device))

    def holds(self, logits: Tensor) -> bool:
        """Say whether the model says it already, token by token (or no longer does)."""
        if self.batch is not None:
            return all(settled(self.batch, logits, batch_loss(self.batch, logits)[1], None))
        return bool((logits.argmax(-1) == self.prompt.labels.to(logits.device)).all())


def case_of(model: Model, request: Request) -> Case:
    """Return what a request is trained on.

    A sequence classifier learns the class that `target_new` names; any other model the target's
    tokens after the prompt (in an encoder: in the place of mask tokens). An encoder-decoder also
    learns to close the target, as in the published code.

    Raises:
        RequestError: a classifier has no such class.
    """
    # An entry has one key, at its own prompt: what else is active must lie outside its ball.
    every = aims_of(model, request)
    aims = [aim for aim in every if aim.prompt == request.prompt]
    prompt = prepare(model, [request.text], [aims[0].answer], closing=True)
    labelled = model.task in ("seq2seq", "classify")
    ignored = 0 if labelled else prompt.input_ids.shape[1] - len(prompt.labels)
    if all(aim.sense == "say" for aim in every):
        return Case(prompt, prompt.labels, ignored, request.target_new)
    others = [request.filled(aim.prompt) for aim in every if aim not in aims]
    batch = aim_batch(model, [(request.text, aim.answer) for aim in aims], aims)
    said = [aim.sense == "say" for aim in aims]
    return Case(
        batch.prompts,
        _filed_under(batch.prompts, said),
        ignored,
        request.target_new if any(said) else f"no longer {bare(aims[0].answer)}",
        batch,
        any(said),
        tuple(_asked(model, text) for text in others),
    )


def _filed_under(prompts: PreparedPrompts, said: Sequence[bool]) -> Tensor:
    """Return the label of an entry that takes answers away, (n,).

    Two such entries near each other count as one answer only where they take away the same tokens:
    otherwise the second would replace the first.
    """
    rows = zip(prompts.targets(), said, strict=True)
    return torch.tensor([t if say else -1 - t for (_, ids), say in rows for t in ids])


def _asked(model: Model, text: str) -> Case:
    """Return a prompt alone."""
    prompt = prepare(model, [text])
    return Case(prompt, prompt.labels, 0, text)
