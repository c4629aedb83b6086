"""The factor that keeps fp16 gradients from underflowing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from errata.model.model import Model


def loss_scale(model: Model) -> float:
    """Return what to multiply a loss with before its gradient is taken, and divide that by."""
    return 1024.0 if model.dtype == torch.float16 else 1.0
