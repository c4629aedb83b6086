"""Where a locator finds one prompt's answer, and how alike two such places are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np

Located = Any
"""What a locator gives for one prompt: a set of places, or a row of numbers."""
Similarity = Callable[[Located, Located], float]


class PromptLocation(NamedTuple):
    """What a locator gives for one prompt.

    Attributes:
        place: what the locator's similarity compares: a profile, or a set of neurons.
        profile: the score of each layer.
    """

    place: Located
    profile: list[float]


def overlap(a: Collection[Any], b: Collection[Any]) -> float:
    """Return |A ∩ B| / |A ∪ B| of two sets of places; 1 for two empty ones."""
    one, other = set(a), set(b)
    return len(one & other) / len(one | other) if one | other else 1.0


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of two rows of numbers; 0 where one has no length."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0
