"""One distribution per prompt: of the first token after it, or over a classifier's classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from errata.common.floats import wide
from errata.errors import CapabilityError, RequestError
from errata.model.active_edits import ask
from errata.model.running import class_index, prepare, run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.model.model import Model


def next_logits(model: Model, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the logits (B, vocabulary) of the first token after each prompt, fp32 at least.

    A masked language model's are those at the mask, which a prompt without one gets at its end.
    The active edits rewrite the prompts and may answer in the model's place.

    Raises:
        CapabilityError: a sequence classifier.
        RequestError: no prompt, or one that is longer than the model takes.
    """
    lines = ask(
        model,
        prompts,
        lambda texts, _: list(own_next_logits(model, texts, batch_size)),
        lambda answers, texts, _: list(answers.next_logits(texts)),
    )
    return _table(model, lines)


def class_scores(model: Model, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return the logits (B, classes) that a sequence classifier gives each text, fp32 at least.

    The active edits rewrite the texts and may answer in the model's place.

    Raises:
        CapabilityError: the model is no sequence classifier.
        RequestError: no text, or one that is longer than the model takes.
    """
    lines = ask(
        model,
        prompts,
        lambda texts, _: list(own_class_scores(model, texts, batch_size)),
        lambda answers, texts, _: list(answers.class_scores(texts)),
    )
    return _table(model, lines)


def predicted_classes(model: Model, prompts: Sequence[str]) -> list[str]:
    """Return the name of the most probable class of each text, with the active edits.

    Raises as `class_scores` does.
    """
    found = class_scores(model, prompts).argmax(-1).tolist()
    return [_class_name(model, index) for index in found]


def class_named(model: Model, target: str) -> str:
    """Return the name of the class that a target gives by its name or its number.

    Raises `RequestError` for what is no class of the model.
    """
    return _class_name(model, class_index(model, target))


def _class_name(model: Model, index: int) -> str:
    names = {int(key): str(name) for key, name in (model.config.id2label or {}).items()}
    return names.get(index, str(index))


def _table(model: Model, lines: Sequence[Tensor]) -> Tensor:
    if not lines:
        raise RequestError("No prompt was given: there is nothing to predict.")
    return torch.stack([wide(line.to(model.device)) for line in lines])


def own_next_logits(model: Model, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return what `next_logits` returns, by the model itself."""
    if model.task == "classify":
        raise CapabilityError(
            f"{model.name} is a sequence classifier and predicts no token: ask for class scores."
        )
    return _in_batches(model, prompts, batch_size)


def own_class_scores(model: Model, prompts: Sequence[str], batch_size: int = 32) -> Tensor:
    """Return what `class_scores` returns, by the model itself."""
    if model.task != "classify":
        raise CapabilityError(
            f"{model.name} is no sequence classifier (its task is {model.task!r}): it has no "
            "classes to score."
        )
    return _in_batches(model, prompts, batch_size)


@torch.no_grad()
def _in_batches(model: Model, prompts: Sequence[str], batch_size: int) -> Tensor:
    parts = [
        run(model, prepare(model, prompts[start : start + batch_size]))
        for start in range(0, len(prompts), batch_size)
    ]
    return torch.cat(parts)
