"""Do locations mean anything? Relative similarity over sets of prompts, and consistency.

KLoB (Ju, Ma 2023) asks of a locating method that prompts which say the same are located alike
(consistency), and related facts more alike than unrelated ones (relevance). KnowEdit (Zhang et
al. 2024) measures both by

    RSim = max((Sim_cand − Sim_all) / (1 − Sim_all), 0)

where Sim_cand is the mean similarity of pairs from one set (paraphrases of one fact; facts of one
relation) and Sim_all that of pairs of all prompts: 0 means that belonging together makes no
difference, 1 that locations within a set are the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from errata.contract.measurement import RESAMPLES
from errata.errors import ConfigError, UnknownNameError
from errata.locate.neurons import attribute
from errata.locate.screening import gradient_times_activation, screen

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.edits.request import Request
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
    given = [list(group) for group in sets]
    inside = [g for g, group in enumerate(given) if len(group) > 1]
    if len(inside) < 2:
        raise ConfigError(
            f"{len(inside)} of {len(sets)} sets have two prompts or more: RSim needs at least two "
            "such sets."
        )
    everything = [(g, one) for g, group in enumerate(given) for one in group]
    count = len(everything)
    table: NDArray[np.float64] = np.eye(count)
    for i in range(count):
        for j in range(i):
            table[i, j] = table[j, i] = similarity(everything[i][1], everything[j][1])
    owner = np.array([g for g, _ in everything])
    inner = np.array([_pairs(table[np.ix_(owner == g, owner == g)]) for g in inside])
    overall = _pairs(table)
    draws = np.random.default_rng(seed).integers(0, len(inside), size=(RESAMPLES, len(inside)))
    values = [_relative(float(inner[row].mean()), overall) for row in draws]
    low, high = np.quantile(values, (0.025, 0.975))
    within = float(inner.mean())
    return RelativeSimilarity(
        _relative(within, overall), (float(low), float(high)), within, overall, len(inside),
        count, protocol,
    )  # fmt: skip


def _relative(within: float, overall: float) -> float:
    if overall >= 1:
        return 0.0  # every location is the same: nothing is told apart
    return max((within - overall) / (1 - overall), 0.0)


def _pairs(table: NDArray[np.float64]) -> float:
    rows, columns = np.triu_indices(len(table), 1)
    return float(table[rows, columns].mean())


# -- locators for it -------------------------------------------------------------------------------

Similarity = Callable[[Located, Located], float]


def _by_trace(model: Model, request: Request, **options: Any) -> list[float]:
    from errata.locate.causal_trace import trace

    return _profile(trace(model, request, answer=request.target_true, **options))


def _by_screening(model: Model, request: Request, **options: Any) -> list[float]:
    return _profile(screen(model, request, answer=request.target_true, **options))


def _profile(found: Any) -> list[float]:
    """Return a trace as a row: the effect of each layer at the best of the corrupted tokens."""
    effects = found.effects[list(found.corrupted)]
    row: list[float] = effects.max(dim=0).values.tolist()
    return row


def _by_gradient(model: Model, request: Request, **options: Any) -> list[float]:
    _, scores = gradient_times_activation(
        model, request, answer=request.target_true, **{"kind": "mlp", **options}
    )
    row: list[float] = scores.abs().max(dim=0).values.tolist()
    return row


def _by_neurons(model: Model, request: Request, **options: Any) -> set[tuple[int, int]]:
    threshold = float(options.pop("threshold", 0.2))
    found = attribute(model, request, answer=request.target_true, **options)
    return set(found.coarse(threshold))


MEASURED: Mapping[str, tuple[Callable[..., Located], Similarity, str]] = {
    "trace": (_by_trace, cosine, "cosine of the effects by layer at the best corrupted token"),
    "attribution": (_by_screening, cosine, "cosine of the estimated effects by layer"),
    "gradient": (_by_gradient, cosine, "cosine of |gradient x activation| of MLPs by layer"),
    "neurons": (_by_neurons, overlap, "shared part of the coarse sets of knowledge neurons"),
}
"""Locator → (what it gives for a prompt, how two are compared, that in words)."""


def similarity_of(
    model: Model,
    sets: Sequence[Sequence[Request]],
    locator: str = "trace",
    *,
    seed: int = 0,
    **options: Any,
) -> RelativeSimilarity:
    """Locate every prompt of every set and return the relative similarity.

    Args:
        model: the model as it stands.
        sets: requests that belong together: paraphrases of one fact (`paraphrase_sets`), or
            facts of one relation (`relation_sets`).
        locator: one of `MEASURED`.
        seed: of the bootstrap.
        **options: of the locator.
    """
    if locator not in MEASURED:
        raise UnknownNameError("locator", locator, MEASURED)
    find, compare, words = MEASURED[locator]
    text = f"locating by {locator}"
    located = [
        [find(model, request, **options) for request in group]
        for group in model.progress.track(list(sets), text, len(sets))
    ]
    return rsim(located, compare, protocol=f"rsim: {words}", seed=seed)


def paraphrase_sets(requests: Sequence[Request], size: int = 5) -> list[list[Request]]:
    """Return each fact with its own rephrasings as one set: consistency.

    Only phrasings that name the subject exactly once can be located by it.
    """
    sets = []
    for request in requests:
        group = [request]
        for text in dict.fromkeys(request.paraphrases):
            if text.count(request.subject) == 1 and "{}" not in text and len(group) < size:
                prompt = text.replace(request.subject, "{}")
                group.append(request.model_copy(update={"prompt": prompt}))
        sets.append(group)
    return [group for group in sets if len(group) > 1]


def relation_sets(requests: Sequence[Request], size: int = 5) -> list[list[Request]]:
    """Return facts of one relation and different subjects as one set each: relevance."""
    groups: dict[str, dict[str, Request]] = {}
    for request in requests:
        if request.relation is not None:
            group = groups.setdefault(request.relation, {})
            if len(group) < size:
                group.setdefault(request.subject, request)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


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
    located = [find(model, one, **options) for one in groups[0]] if groups else []
    pairs = [compare(a, b) for i, a in enumerate(located) for b in located[:i]]
    return (math.fsum(pairs) / len(pairs) if pairs else math.nan), max(len(located), 1)
