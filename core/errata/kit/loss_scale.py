"""By what a loss is multiplied before its gradient is taken, where fp16 gradients underflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from errata.model.model import Model


def loss_scale(model: Model) -> float:
    """Return the factor for a loss of the model; whoever uses it divides the gradient by it."""
    return 1024.0 if model.dtype == torch.float16 else 1.0
