"""Which beginnings of texts are worth running once, and which texts need no run of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from errata.model.model import Model

_CUTS = 2  # beginnings of beginnings: a template, a prompt, its targets

Path = tuple[int, ...]
"""A beginning of a text: its tokens from the first on."""


class RunRow(NamedTuple):
    """One text to be run. Equal rows are run once.

    Attributes:
        ids: its tokens as the model reads them (the decoder's, where there are two sequences).
        end: index of the last prompt token (in `source`, where there is one).
        source: tokens of the encoder of an encoder-decoder.
    """

    ids: Path
    end: int
    source: Path = ()


Place = tuple[RunRow, int]
"""A row and the column whose logits are wanted."""


def covering(model: Model, rows: Sequence[RunRow]) -> dict[RunRow, RunRow]:
    """Return for each row one that starts with it and has the same prompt: run that instead."""
    if model.anatomy.kind == "encoder":
        return {row: row for row in rows}
    covered: dict[RunRow, RunRow] = {}
    following: RunRow | None = None
    # Backwards: what a row is the beginning of stands right behind it.
    for row in sorted(set(rows), key=lambda row: (row.source, row.end, row.ids), reverse=True):
        if (
            following is not None
            and (row.source, row.end) == (following.source, following.end)
            and following.ids[: len(row.ids)] == row.ids
        ):
            covered[row] = following
        else:
            covered[row] = following = row
    return covered


def beginnings(texts: Sequence[Path], cost: int) -> dict[Path, Path]:
    """Return which beginnings are run once: from a text (or a beginning) to what it starts with.

    Empty where less than `cost` tokens would be saved, which a further forward costs.
    """
    parents: dict[Path, Path] = {}
    current = sorted(set(texts))
    for _ in range(_CUTS):
        lengths, saved = shared_lengths(current)
        if saved < cost:
            break
        heads = [text[:length] or text for text, length in zip(current, lengths, strict=True)]
        parents.update({t: h for t, h in zip(current, heads, strict=True) if h != t})
        current = sorted(set(heads))
    return parents


def shared_lengths(texts: Sequence[Path]) -> tuple[list[int], int]:
    """Choose a beginning of each text to share, none the start of another, so that most is saved.

    Args:
        texts: distinct, sorted.

    Returns:
        The length of each text's beginning, 0 where none is shared; and the tokens saved.

    >>> shared_lengths([(1, 2, 3), (1, 2, 4), (1, 5, 6), (7,)])
    ([2, 2, 0, 0], 2)
    """
    lengths = [0] * len(texts)
    common = [_common(a, b) for a, b in pairwise(texts)]

    def best(low: int, high: int) -> tuple[int, list[tuple[int, int, int]]]:
        """Return (tokens saved, [(first, last + 1, length)]) for some neighbouring texts."""
        if high - low < 2:
            return 0, []
        length = min(common[low : high - 1])
        edges = [i + 1 for i in range(low, high - 1) if common[i] == length]
        inner = [best(a, b) for a, b in zip([low, *edges], [*edges, high], strict=True)]
        saved = sum(part for part, _ in inner)
        together = length * (high - low - 1)
        if together >= saved:
            return together, [(low, high, length)] if length else []
        return saved, [group for _, groups in inner for group in groups]

    saved, groups = best(0, len(texts))
    for low, high, length in groups:
        lengths[low:high] = [length] * (high - low)
    return lengths, saved


def level(tree: Mapping[Path, Path], path: Path) -> int:
    """Return how many beginnings a path stands behind."""
    return 1 + level(tree, tree[path]) if path in tree else 0


def _common(a: Path, b: Path) -> int:
    """Return how many first tokens two texts share."""
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))
