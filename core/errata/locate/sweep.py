"""Which layer should be edited? Edit at each of them and measure; then compare with the trace.

Hase et al. 2023 found that where tracing peaks says little about where editing works. So the
layer is chosen by what it is for: the sweep edits the same facts at every layer, one at a time,
and takes the layer with the best score; the tracing effect stands beside it, with the rank
correlation of the two. A choice judged on the facts that it was made on looks better than it is:
`held_out` facts, edited at the same layers, say how far it is from the best for others.

The result is kept among the model's artifacts; `errata.kit.auto_layers` reads it for methods whose
layer is `auto`. Where a method has two layers, one is swept with the other as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from errata.contract import plugins
from errata.contract.capabilities import DENSE_MLP
from errata.contract.measurement import PRECISION, RESAMPLES, mean_interval, wilson
from errata.errors import CapabilityError, ConfigError, ErrataError, PluginError, RequestError
from errata.kit.layer_sweep import (
    MAIN,
    HeldOutResult,
    LayerResult,
    LayerSweep,
    is_layer,
    key_of,
    option_value,
)
from errata.locate.average import average
from errata.locate.rank_statistics import spearman

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from errata.contract.config import MethodConfig
    from errata.editor import Editor
    from errata.edits.edit import Edit
    from errata.edits.request import Request

logger = logging.getLogger("errata")

METRICS = ("ES", "PS", "NS")

BOTH_SIDES = ("E-ES", "E-PS", "E-NS", "R-EM", "R-PM")
"""What is measured where a method needs a relation view.

The relation's metrics are differences (M), not shares (S): of two probabilities near 0 it is
chance which is the larger.
"""

# Fields of a request that no metric of a sweep reads: sampling texts would take most of the time.
_UNASKED = {"generation": (), "attribute": (), "references": ()}


def sweep(
    editor: Editor,
    requests: Sequence[Request],
    method: str,
    *,
    option: str = "",
    layers: Sequence[int] | None = None,
    depths: Sequence[int] = (1,),
    held_out: Sequence[Request] = (),
    trace: bool = True,
    samples: int = 5,
    config: dict[str, Any] | None = None,
) -> LayerSweep:
    """Edit each request at each layer, measure and take the edit off; keep the result.

    Args:
        editor: with its ledger in memory and no edit on the model: a sweep makes many edits that
            nobody wants to keep.
        requests: facts; those that the model knows say most.
        method: a method with a hyper-parameter that is a layer.
        option: that hyper-parameter, for example "relation_layer"; default: `layer` or `layers`.
        layers: which; default: all that have what the method edits. One that the method's
            configuration refuses is left out, with a note.
        depths: how many layers in a row are edited together, each number a sweep of its own over
            the same facts; more than 1 needs a method with `layers`.
        held_out: further facts, to judge the choice by: they are edited at the same layers and
            count for nothing else. None of their subjects may be in `requests`.
        trace: also trace the requests, for the comparison (decoders and whatever tracing takes).
        samples: corrupted runs of each trace.
        config: other hyper-parameters of the method.

    Raises:
        CapabilityError: the method edits at no layer that could be named.
        ConfigError: edits on the model, a durable ledger, or settings that are refused at every
            layer.
        RequestError: no request, or subjects on both sides.
    """
    requests, held_out = list(requests), list(held_out)
    _check(editor, requests, held_out)
    option = layer_option(method, plugins.load(method).config, option)
    config = {name: value for name, value in (config or {}).items() if name != option}
    needs = editor.registry.method(method).capabilities.needs
    # The closed forms write where the prompt is read: in the encoder, if there is one.
    anatomy = editor.model.anatomy.reader if DENSE_MLP in needs else editor.model.anatomy
    every = anatomy.layers_with("mlp") if DENSE_MLP in needs else tuple(range(anatomy.n_layers))
    chosen = every if layers is None else sorted({anatomy.layer(i) for i in layers})
    places = _places(chosen, depths, option, method)
    # A bad hyper-parameter is refused before anything is traced.
    places = _possible(editor, method, config, option, places)
    protocol, metrics = (
        ("rake", BOTH_SIDES) if "relation_view" in needs else ("counterfact", METRICS)
    )
    found = None
    if trace and option in MAIN:
        found = average(editor.model, requests, variants=("hidden",), samples=samples)
    results, held = [], []
    for within in editor.model.progress.track(places, f"sweeping {method}", len(places)):
        settings = {**config, option: option_value(option, within)}
        edits = _computed(editor, [*requests, *held_out], method, settings)
        measured = _measured(editor, [*requests, *held_out], edits, protocol, metrics)
        results.append(measured[: len(requests)])
        held.append(measured[len(requests) :])
    rows = [_result(within, table, metrics) for within, table in zip(places, results, strict=True)]
    correlation = math.nan
    if found is not None:
        effects = found.effects["hidden"].of("last subject token")
        rows = [replace(one, effect=float(effects[one.layer])) for one in rows]
        least = [one for one in rows if one.depth == min(depths)]
        correlation = spearman([one.score for one in least], [one.effect for one in least])
    done = LayerSweep(
        editor.model.name, anatomy.model_type, anatomy.n_layers, method, option,
        config, len(requests), tuple(rows), correlation, judged_by=protocol,
    )  # fmt: skip
    if held_out:
        done = replace(done, held_out=_held_out(done, places, held, metrics))
    key = key_of(editor.model, method, option)
    editor.model.artifacts.save(key, {"_": torch.zeros(1)}, done.as_json())
    return done


def layer_option(method: str, settings: type[MethodConfig], option: str = "") -> str:
    """Return the hyper-parameter that names a method's layer: `option`, or "layer" or "layers"."""
    fields = settings.model_fields
    for name in (option,) if option else MAIN:
        if name in fields and is_layer(name):
            return name
    wanted = repr(option) if option else "'layer' or 'layers'"
    raise CapabilityError(
        f"The method {method!r} has no hyper-parameter {wanted} that is a layer: there is nothing "
        f"to sweep. It has: {', '.join(fields)}."
    )


def split_by_subject(
    requests: Iterable[Request], held_out: int
) -> tuple[list[Request], list[Request]]:
    """Return requests to choose by and the last `held_out` to judge by, each subject once.

    Of the requests about one subject the first is taken.
    """
    once: dict[str, Request] = {}
    for request in requests:
        once.setdefault(request.subject, request)
    kept = list(once.values())
    if not 0 < held_out < len(kept):
        raise RequestError(
            f"held_out={held_out!r}: the requests are about {len(kept)} subjects; hold out at "
            "least one and leave at least one to choose the layer by."
        )
    return kept[:-held_out], kept[-held_out:]


def _check(editor: Editor, requests: Sequence[Request], held_out: Sequence[Request]) -> None:
    if not requests:
        raise RequestError("A sweep needs at least one request.")
    bare = sum(request.target_true is None for request in (*requests, *held_out))
    if bare:
        raise RequestError(
            f"{bare} of {len(requests) + len(held_out)} requests have no target_true: ES compares "
            "the new answer with the old one. Add it, or leave these requests out."
        )
    shared = {r.subject for r in requests} & {r.subject for r in held_out}
    if shared:
        raise RequestError(
            f"{len(shared)} subjects are in the requests and in the held-out ones, "
            f"{min(shared)!r} for one: a layer chosen on a subject cannot be judged on it."
        )
    if editor.model.stack.ids:
        raise ConfigError("A sweep starts from the base model: revert the active edits first.")
    if editor.ledger.path is not None:
        raise ConfigError(
            "A sweep makes many edits that nobody wants to keep: open the editor without a ledger."
        )


def _places(
    layers: Sequence[int], depths: Sequence[int], option: str, method: str
) -> list[tuple[int, ...]]:
    """Return the runs of layers to be edited, by depth, then ascending."""
    if not depths or min(depths) < 1:
        raise ConfigError(f"depths={list(depths)!r}: each must be at least 1.")
    if option != "layers" and set(depths) != {1}:
        raise ConfigError(f"{method} edits one layer: there are no depths to compare.")
    places = [
        tuple(range(last - depth + 1, last + 1))
        for depth in sorted(set(depths)) for last in layers
        if all(layer in layers for layer in range(last - depth + 1, last + 1))
    ]  # fmt: skip
    missing = [d for d in depths if not any(len(place) == d for place in places)]
    if missing:
        raise ConfigError(f"No {missing[0]} layers in a row are among {list(layers)}.")
    return places


def _possible(
    editor: Editor,
    method: str,
    config: dict[str, Any],
    option: str,
    places: Sequence[tuple[int, ...]],
) -> list[tuple[int, ...]]:
    """Return the places that the method's configuration takes, and say which it does not.

    Raises its `ConfigError` where it takes none.
    """
    taken: list[tuple[int, ...]] = []
    refused: list[ConfigError] = []
    for within in places:
        try:
            editor.configure(method, {**config, option: option_value(option, within)})
        except ConfigError as error:
            refused.append(error)
        else:
            taken.append(within)
    if not taken:
        raise refused[0]
    if refused:
        editor.model.progress.note(
            f"{len(refused)} of {len(places)} places are left out: {method} does not take them. "
            f"The first: {refused[0]}"
        )
    return taken


# -- measuring -------------------------------------------------------------------------------------


def _measured(
    editor: Editor,
    requests: Sequence[Request],
    edits: Sequence[Edit | None],
    protocol: str,
    metrics: Sequence[str],
) -> NDArray[np.float64]:
    """Return (requests, metrics): NaN where one has no such prompts, -1 where the edit failed."""
    table = np.full((len(requests), len(metrics)), math.nan)
    for row, (request, edit) in enumerate(zip(requests, edits, strict=True)):
        if edit is not None:
            try:
                editor.apply(edit)
            except ErrataError as error:  # a guard, or numbers that are not finite
                logger.debug("%s", error)
                edit = None
        if edit is None:
            table[row] = -1
            continue
        asked = request.model_copy(update=_UNASKED)
        if (view := asked.relation_view) is not None:
            view = view.model_copy(update={"specificity": ()})
            asked = asked.model_copy(update={"relation_view": view})
        found = {one.metric: one.value for one in editor.evaluate(asked, (protocol,))}
        editor.revert(edit)
        # A difference below 0 is no success.
        table[row] = np.maximum([found.get(name, math.nan) for name in metrics], 0)
    return table


def _computed(
    editor: Editor, requests: Sequence[Request], method: str, config: dict[str, Any]
) -> list[Edit | None]:
    """Return one edit per request, all from the base: together where the method can, else singly.

    None stands for a request that the method could not edit.
    """
    if editor.registry.method(method).capabilities.batch and len(requests) > 1:
        try:
            edits = editor.edit(
                requests, method=method, config=config, batch_size=len(requests), apply=False
            )
        except (ConfigError, PluginError):
            raise
        except ErrataError as error:  # one request spoils the batch
            logger.debug("%s", error)
        else:
            if len(edits) == len(requests):
                return list(edits)
    found: list[Edit | None] = []
    for request in requests:
        try:
            found.append(editor.edit(request, method=method, config=config, apply=False))
        except (ConfigError, PluginError):
            raise
        except ErrataError as error:  # a vanishing division factor, for one
            logger.debug("%s", error)
            found.append(None)
    return found


def _result(layers: Sequence[int], table: NDArray[np.float64], names: Sequence[str]) -> LayerResult:
    failed = int((table < 0).any(axis=1).sum())
    metrics = {}
    measured = np.where(table < 0, math.nan, table)
    there = [bool(np.isfinite(column).any()) for column in measured.T]
    for name, column, found in zip(names, table.T, there, strict=True):
        values = np.maximum(column[~np.isnan(column)], 0).tolist()
        if not values or not (found or failed == len(table)):
            continue  # no request has such prompts
        mean = math.fsum(values) / len(values)
        # One share between 0 and 1 has no interval of its own: it is taken as part of a success.
        low, high = mean_interval(values, shares=True) or wilson(mean * len(values), len(values))
        metrics[name] = (mean, low, high)
    return LayerResult(
        layers[-1], _harmonic([mean for mean, _, _ in metrics.values()]), metrics, failed,
        depth=len(layers),
    )  # fmt: skip


def _harmonic(values: Sequence[float]) -> float:
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / math.fsum(1 / value for value in values)


def _held_out(
    done: LayerSweep,
    places: Sequence[tuple[int, ...]],
    held: Sequence[NDArray[np.float64]],
    metrics: Sequence[str] = METRICS,
) -> HeldOutResult:
    """Return the scores of held-out facts, and the chosen place's share of the best one's."""
    results = tuple(
        _result(within, table, metrics) for within, table in zip(places, held, strict=True)
    )
    index = places.index(done.best.layers)
    scores = np.array([one.score for one in results])
    count = len(held[0])
    draws = np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count))
    # (places, draws): the score of each place on each draw of facts.
    drawn = np.stack([_scores(table, draws) for table in held])
    ratios = _ratio(drawn[index], drawn.max(axis=0))
    low, high = np.quantile(ratios, (0.025, 0.975))
    if np.ptp(ratios) <= PRECISION:  # facts that are all alike: the draws would claim certainty
        low, high = _ratio_of_ends(results[index], results[int(scores.argmax())])
    mean = float(_ratio(scores[index], scores.max()))
    return HeldOutResult(count, results, (mean, float(low), float(high)))


def _ratio_of_ends(chosen: LayerResult, best: LayerResult) -> tuple[float, float]:
    """Return the least and the greatest ratio of two scores that their metrics' intervals allow."""
    (least, most), (low, high) = (
        [_harmonic([ends[side] for ends in one.metrics.values()]) for side in (1, 2)]
        for one in (chosen, best)
    )
    return (least / high if high else 0.0), (min(1.0, most / low) if low else 1.0)


def _scores(table: NDArray[np.float64], draws: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the harmonic mean of the metrics for each draw of facts."""
    values = np.where(table < 0, 0.0, table)
    values = values[:, ~np.isnan(values).all(axis=0)]
    chosen = values[draws]  # (draws, facts, metrics)
    counts = (~np.isnan(chosen)).sum(axis=1)
    # A draw without a fact that has a metric's prompts says nothing about it: it counts as 1.
    means = np.where(counts, np.nansum(chosen, axis=1) / np.maximum(counts, 1), 1.0)
    inverse = (1 / np.maximum(means, 1e-12)).sum(axis=1)
    return np.where((means > 0).all(axis=1), means.shape[1] / inverse, 0.0)


def _ratio(part: Any, whole: Any) -> NDArray[np.float64]:
    """Return part / whole; 1 where no place has any success."""
    found: NDArray[np.float64] = np.where(whole > 0, part / np.where(whole > 0, whole, 1), 1.0)
    return found
