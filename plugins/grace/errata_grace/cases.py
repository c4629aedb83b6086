"""What one edit is trained on: a prompt with its target, or a text with its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from errata.errors import RequestError
from errata.model import tokens
from errata.model.forward import logits_at
from errata.model.forward.resume import accepted
from errata.model.scoring import decoder_start, prepare, takes_positions

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model


@dataclass(frozen=True, eq=False)
class Case:
    """One row ready to run, and where the model is wanted to say what.

    Attributes:
        inputs: keyword tensors of the forward, one row without padding.
        end: column of the last prompt token (of the encoder, where there are two sequences).
        labels: (n,) wanted token ids; for a classifier one class index.
        columns: (n,) columns whose logits predict them; None for a classifier.
        ignored: number of positions of the training sequence without a label.
        text: the target for people.
    """

    inputs: dict[str, Tensor]
    end: int
    labels: Tensor
    columns: Tensor | None
    ignored: int
    text: str

    @property
    def rows(self) -> Tensor:
        """(n,) the row of each label: there is one only."""
        return torch.zeros_like(self.labels)

    def logits(self, model: Model) -> Tensor:
        """Return the logits (n, vocabulary), or (1, classes), of one plain run."""
        if self.columns is None:
            output: Tensor = model.module(**accepted(model.module, self.inputs)).logits
            return output
        return logits_at(model, self.inputs, self.rows, self.columns)


def case_of(model: Model, request: Request) -> Case:
    """Return what a request is trained on.

    A sequence classifier learns the class that `target_new` names; any other model the target's
    tokens after the prompt (in an encoder: in the place of mask tokens).

    Raises:
        RequestError: a classifier has no such class.
    """
    if is_classifier(model):
        return _class_case(model, request)
    if model.anatomy.kind == "encoder-decoder":
        return _seq2seq_case(model, request)
    scored = prepare(model, [request.text], [request.target_new])
    return Case(
        scored.inputs,
        scored.ends[0],
        scored.labels,
        scored.columns,
        scored.inputs["input_ids"].shape[1] - len(scored.labels),
        request.target_new,
    )


def _seq2seq_case(model: Model, request: Request) -> Case:
    """Return prompt and target with the closing token, which is part of the published label."""
    batch = tokens.encode_seq2seq(
        model.tokenizer,
        [request.text],
        [request.target_new],
        device=model.device,
        decoder_start=decoder_start(model),
    )
    end = batch.source.column(0, -1)
    labels = batch.labels[0]
    columns = torch.arange(len(labels), device=labels.device)
    return Case(batch.inputs(), end, labels, columns, 0, request.target_new)


def is_classifier(model: Model) -> bool:
    """Say whether the module gives one row of class scores per text."""
    return type(model.module).__name__.endswith("ForSequenceClassification")


def _class_case(model: Model, request: Request) -> Case:
    config = model.config
    names = {str(name): int(index) for name, index in (config.label2id or {}).items()}
    names |= {str(name): int(index) for index, name in (config.id2label or {}).items()}
    wanted = request.target_new.strip()
    index = names.get(wanted, int(wanted) if wanted.isdecimal() else -1)
    if not 0 <= index < config.num_labels:
        raise RequestError(
            f"The class {wanted!r} was asked for; {model.name} has "
            f"{', '.join(names) or f'0 to {config.num_labels - 1}'}."
        )
    batch = tokens.encode(model.tokenizer, [request.text], device=model.device)
    label = torch.tensor([index], device=model.device)
    inputs = batch.inputs(positions=takes_positions(model))
    return Case(inputs, batch.lengths[0] - 1, label, None, 0, wanted)
