"""Which layers a locator names, and whether prompts that belong together get the same ones.

The k layers identified for a prompt are the k with the highest score. Two prompts agree by the
overlap |A ∩ B| / k, which two random choices of k among L layers reach on average at k / L: with
more layers identified agreement grows by itself, so it is read beside that line. RSim at each k
compares it with the overlap of all pairs, as KnowEdit does (Zhang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.errors import ConfigError
from errata.locate.rank_statistics import mean_intervals
from errata.locate.similarity import compared

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class LayerOverlap:
    """Overlap of the k layers identified, for k = 1 … L.

    Every row of numbers has one entry for each k.

    Attributes:
        within: mean over sets of the mean overlap of pairs in them.
        within_low, within_high: ends of its 95 % bootstrap interval over sets.
        across: mean overlap of pairs from different sets.
        rsim: RSim of the overlap; 0 at k = L, where every choice is the same.
        rsim_low, rsim_high: ends of its 95 % bootstrap interval over sets.
        sets: number of sets with two prompts or more.
        prompts: number of prompts.
        protocol: "layer overlap: how".
    """

    within: NDArray[np.float64]
    within_low: NDArray[np.float64]
    within_high: NDArray[np.float64]
    across: NDArray[np.float64]
    rsim: NDArray[np.float64]
    rsim_low: NDArray[np.float64]
    rsim_high: NDArray[np.float64]
    sets: int
    prompts: int
    protocol: str

    @property
    def layers(self) -> int:
        """L, the number of layers that there are to choose from."""
        return len(self.within)

    @property
    def chance(self) -> NDArray[np.float64]:
        """The expected overlap of two random choices: k / L."""
        found: NDArray[np.float64] = np.arange(1, self.layers + 1) / self.layers
        return found

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            name: value.tolist() if isinstance(value, np.ndarray) else value
            for name, value in {**vars(self), "chance": self.chance}.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerOverlap:
        """Return what `as_json` wrote."""
        own = {name: data[name] for name in ("sets", "prompts", "protocol")}
        rows = {name: np.array(data[name], dtype=np.float64) for name in _ROWS}
        return cls(**{**own, **rows})


_ROWS = (
    "within", "within_low", "within_high", "across", "rsim", "rsim_low", "rsim_high",
)  # fmt: skip


def identified(profile: Sequence[float], count: int) -> list[int]:
    """Return the layers with the highest scores, best first; of equal ones the lower.

    >>> identified([0.1, 0.9, 0.5], 2)
    [1, 2]
    """
    order: list[int] = np.argsort(-np.asarray(profile, dtype=np.float64), kind="stable").tolist()
    return order[:count]


def layer_overlap(
    sets: Sequence[Sequence[Sequence[float]]],
    *,
    protocol: str = "layer overlap: given profiles",
    seed: int = 0,
) -> LayerOverlap:
    """Return the overlap of the k layers identified within sets and across them, for every k.

    Args:
        sets: the profile of each set's prompts: a score for each layer, of one length.
        protocol: how the profiles were found, for the result.
        seed: of the bootstraps.

    Raises:
        ConfigError: profiles of different lengths, fewer than two sets with at least two prompts,
            or more prompts in one set only.
    """
    profiles = [profile for group in sets for profile in group]
    if len({len(profile) for profile in profiles}) > 1:
        raise ConfigError("The profiles have different numbers of layers: they cannot be compared.")
    layers = len(profiles[0]) if profiles else 0
    owner = np.array([g for g, group in enumerate(sets) for _ in group])
    # ranks[i, l]: how many layers score higher than layer l for prompt i
    ranks = np.array([np.argsort(identified(profile, layers)) for profile in profiles])
    found = []
    for k in range(1, layers + 1):
        chosen = (ranks < k).astype(np.float64)
        table = chosen @ chosen.T / k
        result, inner = compared(table, owner, protocol, seed)
        low, high = mean_intervals(inner[:, None], seed=seed)
        across = table[owner[:, None] != owner[None, :]].mean()
        found.append((result.within, low[0], high[0], across, result.value, *result.interval))
    if not found:
        raise ConfigError("There is no profile: no set holds a prompt.")
    rows = dict(zip(_ROWS, np.array(found, dtype=np.float64).T, strict=True))
    return LayerOverlap(**rows, sets=result.sets, prompts=result.prompts, protocol=protocol)
