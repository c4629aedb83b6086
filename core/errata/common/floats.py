"""Numbers of half precision and less are computed with in fp32."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return floating point numbers in fp32 at least: a bf16 log-softmax has three digits.

    (`torch.promote_types`, `isfinite`, `cat` and comparisons lack the one-byte floats.)
    """
    return tensor.float() if tensor.element_size() < 4 else tensor


def frobenius(tensor: Tensor) -> float:
    """Return the Frobenius norm, finite where the entries are: their squares may overflow fp32."""
    entries = wide(tensor)
    norm = float(entries.norm())
    if math.isfinite(norm) or not entries.numel():
        return norm
    largest = entries.abs().max()  # not in fp64, which Apple's devices do not have
    return float(largest) * float((entries / largest).norm())
