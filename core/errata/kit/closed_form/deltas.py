"""How an edit is stored: as one low-rank change, or as keys and residuals of each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import torch

from errata.edits.delta import Factor, KeyValueDelta, KeyValues, LowRankDelta
from errata.kit.closed_form.kept_positions import KeptKeys, kept_positions
from errata.kit.closed_form.layer_updates import LayerUpdate
from errata.kit.closed_form.windows import by_owner, windows_of

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.metric import Metric
    from errata.model.model import Model


def deltas_of(
    model: Model,
    requests: Sequence[Request],
    updates: Sequence[LayerUpdate],
    config: ClosedFormConfig,
    *,
    metrics: Mapping[int, Metric],
    slack: Mapping[int, float],
) -> LowRankDelta | list[KeyValueDelta]:
    """Return what is stored: one change for the batch, or keys and residuals of each request.

    Args:
        model: the model that the updates were computed for.
        requests: what was asked for.
        updates: what each layer is asked for.
        config: its `history` says which of the two.
        metrics: M of each layer, and
        slack: s of each layer: what has been written is solved again with all other active
            edits, as Δ = R (s I + Kᵀ M K)⁻¹ Kᵀ M.
    """
    if config.history == "none":
        return low_rank(model, updates)
    owners = [window.owner for window in windows_of(model, requests, config.window)]
    layers = [update.layer for update in updates] if config.kept_positions else []
    kept = kept_positions(model, requests, layers, config.window) if layers else {}
    return key_values(
        model, updates, config, metrics=metrics, slack=slack, owners=owners, kept=kept
    )


def low_rank(model: Model, updates: Sequence[LayerUpdate]) -> LowRankDelta:
    """Return one delta for all requests, the two factors of each layer's Δ."""
    factors = {}
    for update in updates:
        path = model.anatomy.reader.mlp_out(update.layer)
        u, v = update.Δ.factors
        factors[model.anatomy.weight(path)] = Factor(
            u=u.float().cpu(), v=v.float().cpu(), transposed=model.anatomy.transposed(path)
        )
    return LowRankDelta(factors)


def key_values(
    model: Model,
    updates: Sequence[LayerUpdate],
    config: ClosedFormConfig,
    *,
    metrics: Mapping[int, Metric],
    slack: Mapping[int, float],
    owners: Sequence[int] | None = None,
    kept: Mapping[int, KeptKeys] = MappingProxyType({}),
) -> list[KeyValueDelta]:
    """Return one delta per request, to be solved with all others that are active.

    `owners` says which request each column of K and R belongs to, ascending from 0: a text has a
    pair for each of its windows. None: each has one. `kept` are further keys of a layer, at which
    nothing is written.

    A residual of the `replay` policy was read from the model as it stands; what the active edits
    of the kind already write at its key is added, so that it counts from the base like theirs.
    """
    owners = range(updates[0].K.flat.shape[1]) if owners is None else owners
    count = owners[-1] + 1
    pairs: list[dict[str, KeyValues]] = [{} for _ in range(count)]
    for update in updates:
        metric = metrics[update.layer]
        path = model.anatomy.reader.mlp_out(update.layer)
        name = model.anatomy.weight(path)
        keys = update.K.flat.float().cpu()  # what is stored is what is whitened
        others, whose = kept.get(update.layer), list(owners)
        if others is not None:
            keys, whose = torch.cat([keys, others.keys.float()], 1), [*whose, *others.owners]
        whitened = metric.whiten(keys.double()).cpu().to(getattr(torch, config.precision))
        residuals = update.R.flat.cpu()
        if others is not None:
            nothing = residuals.new_zeros(len(residuals), len(others.owners))
            residuals = torch.cat([residuals, nothing], 1)
        if not config.on_base:
            residuals = residuals + _written(model, name, metric, keys)
        residuals = residuals.float()
        columns = (by_owner(part, whose) for part in (keys, whitened, residuals))
        for pair, k, w, r in zip(pairs, *columns, strict=True):
            pair[name] = KeyValues(
                k=k,
                w=w,
                r=r,
                s=torch.full((len(k),), slack[update.layer], dtype=torch.float64),
                transposed=model.anatomy.transposed(path),
                metric=metric.reference,
            )
    return [KeyValueDelta(pair) for pair in pairs]


def solved_again(
    model: Model,
    delta: Delta,
    config: ClosedFormConfig,
    *,
    metrics: Mapping[int, Metric],
    slack: Mapping[int, float],
) -> KeyValueDelta | None:
    """Return a recorded edit with the same keys and residuals, another metric and slack.

    None for a delta of another kind. A key of more than one layer keeps the residual that it had
    with the lower layers as they were then.
    """
    if not isinstance(delta, KeyValueDelta):
        return None
    layers = {model.anatomy.weight(model.anatomy.reader.mlp_out(layer)): layer for layer in metrics}

    def again(pairs: Mapping[str, KeyValues]) -> dict[str, KeyValues]:
        found = {}
        for name, pair in pairs.items():
            metric = metrics[layers[name]]
            whitened = metric.whiten(pair.k.T.double()).cpu().T
            found[name] = replace(
                pair,
                w=whitened.to(getattr(torch, config.precision)).contiguous(),
                s=torch.full_like(pair.s, slack[layers[name]]),
                metric=metric.reference,
            )
        return found

    shared = {facts: again(together.pairs) for facts, together in delta.shared.items()}
    return KeyValueDelta(again(delta.pairs), delta.fact, shared)


def _written(model: Model, name: str, metric: Metric, keys: Tensor) -> Tensor:
    """Return what the active key-value edits of this metric write at the keys, (d, N) fp64."""
    active = [
        delta
        for _, delta in cast("list[tuple[str, KeyValueDelta]]", model.active(KeyValueDelta.kind))
        if name in delta.pairs and delta.pairs[name].group == metric.reference["digest"]
    ]
    if not active:
        return torch.zeros((), dtype=torch.float64)
    device = model.parameter(name).device
    (total,) = KeyValueDelta.totals(name, active, device)
    return (total @ keys.to(total)).cpu()
