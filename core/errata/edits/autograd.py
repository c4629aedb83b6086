"""The caller's autograd mode, which edits must not be made in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def recording() -> Iterator[None]:
    """Leave the caller's `torch.inference_mode` or `no_grad` for the block.

    Methods optimise, and what they and the stack make outlives the caller's block: tensors of
    inference mode cannot be written to, nor take part in a gradient, ever after.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield
