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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from errata.contract.measurement import RESAMPLES
from errata.errors import ConfigError, UnknownNameError
from errata.locate.neurons import attribute
from errata.locate.related_prompts import paraphrase_sets
from errata.locate.screening import gradient_times_activation, screen

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from errata.edits.request import Request
    from errata.locate.trace_result import CausalTrace
    from errata.model.model import Model

Located = Any
"""What a locator gives for one prompt: a set of places, or a row of numbers."""


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


def overlap(a: Collection[Any], b: Collection[Any]) -> float:
    """Return |A ∩ B| / |A ∪ B| of two sets of places; 1 for two empty ones."""
    one, other = set(a), set(b)
    return len(one & other) / len(one | other) if one | other else 1.0


def cosine(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the cosine of two rows of numbers; 0 where one has no length."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norm if norm else 0.0


def rsim(
    sets: Sequence[Sequence[Located]],
    similarity: Callable[[Located, Located], float],
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
    draws = np.random.default_rng(seed).integers(0, len(inside), size=(RESAMPLES, len(inside)))
    values = [_relative(float(mean), overall) for mean in inner[draws].mean(axis=1)]
    low, high = np.quantile(values, (0.025, 0.975))
    within = float(inner.mean())
    found = RelativeSimilarity(
        _relative(within, overall), (float(low), float(high)), within, overall, len(inside),
        len(owner), protocol,
    )  # fmt: skip
    return found, inner


def _relative(within: float, overall: float) -> float:
    if overall >= 1:
        return 0.0  # every location is the same: nothing is told apart
    return max((within - overall) / (1 - overall), 0.0)


def _pairs(table: NDArray[np.float64]) -> float:
    rows, columns = np.triu_indices(len(table), 1)
    return float(table[rows, columns].mean())


# -- locators for it -------------------------------------------------------------------------------

Similarity = Callable[[Located, Located], float]


class PromptLocation(NamedTuple):
    """What a locator gives for one prompt.

    Attributes:
        place: what the locator's similarity compares: a profile, or a set of neurons.
        profile: the score of each layer.
    """

    place: Located
    profile: list[float]


def _by_trace(model: Model, request: Request, **options: Any) -> PromptLocation:
    from errata.locate.causal_trace import trace

    return _traced(trace(model, request, answer=request.target_true, **options))


def _by_screening(model: Model, request: Request, **options: Any) -> PromptLocation:
    return _traced(screen(model, request, answer=request.target_true, **options))


def _traced(found: CausalTrace) -> PromptLocation:
    """Return a trace as a row: the effect of each layer at the best of the corrupted tokens."""
    return _profiled(found.effects[list(found.corrupted)])


def _by_gradient(model: Model, request: Request, **options: Any) -> PromptLocation:
    _, scores = gradient_times_activation(
        model, request, answer=request.target_true, **{"kind": "mlp", **options}
    )
    return _profiled(scores.abs())


def _profiled(scores: Tensor) -> PromptLocation:
    """Return scores (tokens, layers) as a row: each layer's at its best token."""
    row: list[float] = scores.max(dim=0).values.tolist()
    return PromptLocation(row, row)


def _by_neurons(model: Model, request: Request, **options: Any) -> PromptLocation:
    threshold = float(options.pop("threshold", 0.2))
    found = attribute(model, request, answer=request.target_true, **options)
    # A layer's score is what all its neurons add, as where a fact's neurons are said to lie.
    return PromptLocation(set(found.coarse(threshold)), found.scores.sum(dim=1).tolist())


MEASURED: Mapping[str, tuple[Callable[..., PromptLocation], Similarity, str]] = {
    "trace": (_by_trace, cosine, "cosine of the effects by layer at the best corrupted token"),
    "attribution": (_by_screening, cosine, "cosine of the estimated effects by layer"),
    "gradient": (_by_gradient, cosine, "cosine of |gradient x activation| of MLPs by layer"),
    "neurons": (_by_neurons, overlap, "shared part of the coarse sets of knowledge neurons"),
}
"""Locator → (what it gives for a prompt, how two are compared, that in words)."""


def located_sets(
    model: Model, sets: Sequence[Sequence[Request]], locator: str = "trace", **options: Any
) -> list[list[PromptLocation]]:
    """Return where a locator finds every prompt of every set.

    Args:
        model: the model as it stands.
        sets: requests that belong together, as `errata.locate.related_prompts` makes them.
        locator: one of `MEASURED`; it follows each request's `target_true`, or the model's own
            first token where it has none.
        **options: of the locator.

    Raises:
        UnknownNameError, ConfigError, RequestError: an argument that is not allowed.
    """
    if locator not in MEASURED:
        raise UnknownNameError("locator", locator, MEASURED)
    find = MEASURED[locator][0]
    text = f"locating by {locator}"
    return [
        [find(model, request, **options) for request in group]
        for group in model.progress.track(list(sets), text, len(sets))
    ]


def similarity_of(
    model: Model,
    sets: Sequence[Sequence[Request]],
    locator: str = "trace",
    *,
    seed: int = 0,
    **options: Any,
) -> RelativeSimilarity:
    """Locate every prompt of every set and return the relative similarity.

    The arguments are those of `located_sets`, and the bootstrap's `seed`.
    """
    return place_similarity(located_sets(model, sets, locator, **options), locator, seed=seed)


def place_similarity(
    located: Sequence[Sequence[PromptLocation]], locator: str, *, seed: int = 0
) -> RelativeSimilarity:
    """Return the relative similarity of what `located_sets` found by a locator.

    Raises as `rsim` does.
    """
    _, compare, words = MEASURED[locator]
    places = [[one.place for one in group] for group in located]
    return rsim(places, compare, protocol=f"rsim: {words}", seed=seed)


def consistency(
    model: Model, request: Request, locator: str = "trace", **options: Any
) -> tuple[float, int]:
    """Return the mean similarity of a fact's location over its phrasings, and their number.

    NaN where it has one phrasing only.
    """
    if locator not in MEASURED:
        raise UnknownNameError("locator", locator, MEASURED)
    find, compare, _ = MEASURED[locator]
    groups = paraphrase_sets([request], size=1000)
    located = [find(model, one, **options).place for one in groups[0]] if groups else []
    pairs = [compare(a, b) for i, a in enumerate(located) for b in located[:i]]
    return (math.fsum(pairs) / len(pairs) if pairs else math.nan), max(len(located), 1)
