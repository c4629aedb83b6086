"""Numbers in plain JSON, which has no NaN and no infinity: they are null there."""

from __future__ import annotations

import math


def finite(value: float) -> float | None:
    """Return a number for JSON: None for one that is not finite."""
    return float(value) if math.isfinite(value) else None


def number(value: float | None) -> float:
    """Return a number from JSON: NaN for None."""
    return math.nan if value is None else float(value)
