"""What a model's forward is given: its tensors, the decoder's start."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from errata.model.model import Model


def takes_positions(model: Model) -> bool:
    """Say whether position_ids are passed. Encoders count by themselves: from 2, in RoBERTa."""
    return model.anatomy.kind == "decoder" and model.anatomy.spec.position_ids


def pads(model: Model) -> bool:
    """Say whether rows of different length may run together.

    A decoder's sequence classifier finds the end of a padded row by the padding's id, and one with
    an encoder by the end token's, which must be another; without that they take one row at a time.
    """
    if model.task != "classify":
        return True
    padding, end = model.config.pad_token_id, model.config.eos_token_id
    return isinstance(padding, int) and (model.anatomy.encoder is None or padding != end)


def accepted(module: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those inputs that the module's forward has a parameter for.

    BLOOM, for one, has none for `position_ids`: it counts the mask.
    """
    known = inspect.signature(type(module).forward).parameters
    return {name: value for name, value in inputs.items() if name in known}


def inputs_of(model: Model, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that this model takes, and positions only where they count from zero.

    Tensors are moved to the model's device.
    """
    given = accepted(model.module, inputs)
    if not model.anatomy.spec.position_ids:
        given.pop("position_ids", None)
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in given.items()
    }


def decoder_start(model: Model) -> int | None:
    """Return the token that the decoder of an encoder-decoder starts from, None if unsaid."""
    for holder in (getattr(model.module, "generation_config", None), model.config):
        value: Any = getattr(holder, "decoder_start_token_id", None)
        if isinstance(value, int):
            return value
    return None


def decoder_prefix(model: Model) -> list[int]:
    """Return what the decoder of an encoder-decoder starts with before it writes anything."""
    start = decoder_start(model)
    settings: Any = getattr(model.module, "generation_config", None)
    forced = getattr(settings, "forced_bos_token_id", None)  # BART and mBART answer after it
    first = (model.tokenizer.pad_token_id or 0) if start is None else start
    return [first] if forced is None else [first, int(forced)]


def vocabulary_size(model: Model) -> int:
    """Return the width of the model's logits, as its configuration says."""
    return int(model.config.get_text_config().vocab_size)
