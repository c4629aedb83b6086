"""Do locations mean anything? Relative similarity over sets of prompts, and consistency.

KLoB (Ju, Ma 2023) asks of a locating method that prompts which say the same are located alike
(consistency), and related facts more alike than unrelated ones (relevance). KnowEdit (Zhang et
al. 2024) measures both by

    RSim = max((Sim_cand − Sim_all) / (1 − Sim_all), 0)

where Sim_cand is the mean similarity of pairs from one set (paraphrases of one fact; facts of one
relation, or of one chain) and Sim_all that of pairs of all prompts: 0 means that belonging together
makes no difference, 1 that locations within a set are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.contract.measurement import bootstrap
from errata.errors import ConfigError, UnknownNameError
from errata.locate.locator import LOCATORS
from errata.locate.related_prompts import paraphrase_sets
from errata.locate.trace_settings import parse_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.edits.request import Request
    from errata.locate.locator import LocatorComparison
    from errata.locate.prompt_location import Located, PromptLocation, Similarity
    from errata.model.model import Model


@dataclass(frozen=True, eq=False)
class RelativeSimilarity:
    """RSim of one locator on one kind of sets.

    Attributes:
        value: RSim.
        interval: 95 % bootstrap interval over sets.
        within: Sim_cand, mean over sets of the mean similarity of pairs in them.
        overall: Sim_all, mean similarity of all pairs of prompts.
        sets: number of sets with two prompts or more.
        prompts: number of prompts, those of other sets included.
        protocol: "rsim: how".
    """

    value: float
    interval: tuple[float, float]
    within: float
    overall: float
    sets: int
    prompts: int
    protocol: str

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "schema": 1, "result": "similarity", **vars(self), "interval": list(self.interval)
        }  # fmt: skip


def rsim(
    sets: Sequence[Sequence[Located]],
    similarity: Similarity,
    *,
    protocol: str = "rsim: given locations",
    seed: int = 0,
) -> RelativeSimilarity:
    """Return the relative similarity of locations.

    Args:
        sets: the locations of each set's prompts; sets with fewer than two have no pair for
            Sim_cand, but their prompts belong to all prompts of Sim_all.
        similarity: of two locations, symmetric, at most 1.
        protocol: how the locations were found, for the result.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two sets with at least two prompts.
    """
    everything = [one for group in sets for one in group]
    table: NDArray[np.float64] = np.eye(len(everything))
    for i, one in enumerate(everything):
        for j in range(i):
            table[i, j] = table[j, i] = similarity(one, everything[j])
    owner = np.array([g for g, group in enumerate(sets) for _ in group])
    return compared(table, owner, protocol, seed)[0]


def compared(
    table: NDArray[np.float64], owner: NDArray[np.int_], protocol: str, seed: int
) -> tuple[RelativeSimilarity, NDArray[np.float64]]:
    """Return the relative similarity, and the mean similarity of pairs in each set.

    Args:
        table: (n, n), the similarity of each two prompts.
        owner: (n,), the number of each prompt's set.
        protocol: how the locations were found, for the result.
        seed: of the bootstrap.

    Raises:
        ConfigError: fewer than two sets with at least two prompts.
    """
    every, sizes = np.unique(owner, return_counts=True)
    inside = every[sizes > 1]
    if len(inside) < 2:
        raise ConfigError(
            f"{len(inside)} of {len(every)} sets have two prompts or more: RSim needs at least two "
            "such sets."
        )
    inner = np.array([_pairs(table[np.ix_(owner == g, owner == g)]) for g in inside])
    overall = _pairs(table)
    within = float(inner.mean())
    value = float(_relative(np.array([[within]]), overall)[0])
    interval = bootstrap(inner[:, None], lambda means: _relative(means, overall), seed=seed)
    found = RelativeSimilarity(
        value, interval or (value, value), within, overall, len(inside), len(owner), protocol
    )
    return found, inner


def _relative(within: NDArray[np.float64], overall: float) -> NDArray[np.float64]:
    """Return RSim (n,) of each Sim_cand (n, 1)."""
    if overall >= 1:
        return np.zeros(len(within))  # every location is the same: nothing is told apart
    found: NDArray[np.float64] = np.maximum((within[:, 0] - overall) / (1 - overall), 0.0)
    return found


def _pairs(table: NDArray[np.float64]) -> float:
    rows, columns = np.triu_indices(len(table), 1)
    return float(table[rows, columns].mean())


# -- locators for it -------------------------------------------------------------------------------


def located_sets(
    model: Model, sets: Sequence[Sequence[Request]], locator: str = "trace", **options: Any
) -> list[list[PromptLocation]]:
    """Return where a locator finds every prompt of every set.

    Args:
        model: the model as it stands.
        sets: requests that belong together, as `errata.locate.related_prompts` makes them.
        locator: one of `LOCATORS` with a `compare`; it follows each request's `target_true`, or
            the model's own first token where it has none.
        **options: of the locator; not its `answer`.

    Raises:
        UnknownNameError, ConfigError, RequestError: an argument that is not allowed.
    """
    find = _finder(locator, options)
    text = f"locating by {locator}"
    return [
        [find(model, request) for request in group]
        for group in model.progress.track(list(sets), text, len(sets))
    ]


def place_similarity(
    located: Sequence[Sequence[PromptLocation]], locator: str, *, seed: int = 0
) -> RelativeSimilarity:
    """Return the relative similarity of what `located_sets` found by a locator.

    Raises as `rsim` does.
    """
    compare = _compare(locator)
    places = [[one.place for one in group] for group in located]
    return rsim(places, compare.similarity, protocol=f"rsim: {compare.words}", seed=seed)


def consistency(
    model: Model, request: Request, locator: str = "trace", **options: Any
) -> tuple[float, int]:
    """Return the mean similarity of a fact's location over its phrasings, and their number.

    NaN where it has one phrasing only.
    """
    find, similarity = _finder(locator, options), _compare(locator).similarity
    groups = paraphrase_sets([request], size=1000)
    located = [find(model, one).place for one in groups[0]] if groups else []
    pairs = [similarity(a, b) for i, a in enumerate(located) for b in located[:i]]
    return (math.fsum(pairs) / len(pairs) if pairs else math.nan), max(len(located), 1)


def _compare(locator: str) -> LocatorComparison:
    comparable = {name: one.compare for name, one in LOCATORS.items() if one.compare is not None}
    if locator not in comparable:
        raise UnknownNameError("locator", locator, comparable)
    return comparable[locator]


def _finder(locator: str, options: dict[str, Any]) -> Callable[[Model, Request], PromptLocation]:
    """Return a locator with its settings; it follows each request's own answer."""
    compare = _compare(locator)
    if "answer" in options:
        raise ConfigError("Every prompt is compared by its own answer: leave the setting out.")
    settings = parse_settings(LOCATORS[locator].config, options, locator)

    def find(model: Model, request: Request) -> PromptLocation:
        return compare.find(
            model, request, settings.model_copy(update={"answer": request.target_true})
        )

    return find
