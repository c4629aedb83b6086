"""Suspends the caller's autograd mode, autocast and default dtype while edits are made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICES = ("cpu", "cuda")


@contextmanager
def recording() -> Iterator[None]:
    """Suspend the caller's `torch.inference_mode`, `no_grad` or `torch.autocast` in the block.

    Methods optimise, and what they and the stack make outlives the caller's block: tensors of
    inference mode cannot be written to, nor take part in a gradient, ever after, and statistics
    that are kept must be in the model's own precision. What they make in torch's default dtype is
    float32.
    """
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as plain:
        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                plain.enter_context(torch.autocast(device, enabled=False))
                # autocast keeps its casts of weights for its whole block; here weights change.
                plain.callback(torch.clear_autocast_cache)
        if torch.get_default_dtype() is not torch.float32:
            plain.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        yield
