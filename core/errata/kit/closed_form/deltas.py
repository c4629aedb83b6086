"""How an edit is stored: as one low-rank change, or as keys and residuals of each request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from errata.edits.delta import Factor, KeyValueDelta, KeyValues, LowRankDelta
from errata.kit.closed_form.kept_positions import KeptKeys, kept_positions
from errata.kit.closed_form.layer_updates import LayerUpdate
from errata.kit.closed_form.windows import by_owner, windows_of
from errata.kit.same_subject import sharing

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import Delta
    from errata.edits.request import Request
    from errata.kit.closed_form.config import ClosedFormConfig
    from errata.kit.closed_form.matrices import NormalMatrix
    from errata.kit.metric import Metric
    from errata.model.model import Model


class JointProblem(NamedTuple):
    """The least-squares problem of all active edits: Δ = R (s I + Kᵀ M K)⁻¹ Kᵀ M per layer.

    Attributes:
        M: the metric of each layer, which prices a change of its weights.
        s: the slack of each layer: the larger, the more a residual may be missed.
    """

    M: Mapping[int, Metric]
    s: Mapping[int, float]

    @classmethod
    def whitened(cls, C: Mapping[int, NormalMatrix], s: Mapping[int, float]) -> JointProblem:
        """Return the problem with M = C⁻¹: what the layers give on ordinary text stays."""
        return cls({layer: matrix.metric for layer, matrix in C.items()}, s)


def deltas_of(
    model: Model,
    requests: Sequence[Request],
    config: ClosedFormConfig,
    solve: Callable[[Sequence[Request], bool], Sequence[LayerUpdate]],
    joint: JointProblem,
) -> LowRankDelta | list[KeyValueDelta]:
    """Return what is stored: one change for the batch, or keys and residuals of each request.

    Args:
        model: the model; it is not changed.
        requests: what to write.
        config: its `history` says which of the two.
        solve: the method. It returns what requests ask of each layer; with True they are facts of
            one subject that share a value.
        joint: how keys and residuals are solved, together with those of all other active edits.
    """

    def stored(
        facts: Sequence[Request], shared: bool = False
    ) -> LowRankDelta | list[KeyValueDelta]:
        updates = solve(facts, shared)
        if config.history == "none":
            return low_rank(model, updates)
        owners = [window.owner for window in windows_of(model, facts, config.window)]
        layers = [update.layer for update in updates] if config.kept_positions else []
        kept = kept_positions(model, facts, layers, config.window) if layers else {}
        return key_values(model, updates, config, joint, owners=owners, kept=kept)

    return sharing(model, requests, stored) if config.shares else stored(requests)


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
    joint: JointProblem,
    *,
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
        metric = joint.M[update.layer]
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
                s=torch.full((len(k),), joint.s[update.layer], dtype=torch.float64),
                transposed=model.anatomy.transposed(path),
                metric=metric.reference,
            )
    return [KeyValueDelta(pair) for pair in pairs]


def solved_again(
    model: Model, delta: Delta, config: ClosedFormConfig, joint: JointProblem
) -> KeyValueDelta | None:
    """Return a recorded edit with the same keys and residuals, for another metric or slack.

    None for a delta of another kind. A key of more than one layer keeps the residual that it had
    with the lower layers as they were then.
    """
    if not isinstance(delta, KeyValueDelta):
        return None
    layers = {model.anatomy.weight(model.anatomy.reader.mlp_out(layer)): layer for layer in joint.M}

    def again(pairs: Mapping[str, KeyValues]) -> dict[str, KeyValues]:
        found = {}
        for name, pair in pairs.items():
            metric = joint.M[layers[name]]
            whitened = metric.whiten(pair.k.T.double()).cpu().T
            found[name] = replace(
                pair,
                w=whitened.to(getattr(torch, config.precision)).contiguous(),
                s=torch.full_like(pair.s, joint.s[layers[name]]),
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
