"""Key-value deltas: at these keys the layer should say so much more. All of them are solved as one.

An edit stores, per parameter, its keys k and the residuals r that it wants on top of the base,
W₀ k + r. What is folded is not the sum of what each edit would do alone but one least-squares
solution for all active edits of the kind (`JointSolve`):

    Δ = R (S + Kᵀ M K)⁻¹ (M K)ᵀ

So the order does not matter, editing one by one and all at once agree, and an edit that is taken
out is gone as if never made (OTE ≡ SE: 2605.26670; recursive least squares).

The metric M (C⁻¹, a projector) is not needed for that: each edit also stores its whitened keys
w = M k, and Kᵀ M K = Kᵀ [w_1 … w_N]. An edit is therefore complete in itself, in any ledger, file
or process, and C stays where it was measured; the delta names it by its digest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta.base import Delta, require
from errata.edits.delta.key_value_joint import Joint
from errata.edits.delta.key_values import PARTS, KeyValues
from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


class KeyValueDelta(Delta):
    """Keys and residuals per parameter name; folds as one least-squares solve over all edits."""

    kind: ClassVar[str] = "key_value"

    def __init__(self, pairs: Mapping[str, KeyValues]) -> None:
        require(bool(pairs), "A key_value delta needs at least one parameter.")
        for name, pair in pairs.items():
            _check_shapes(name, pair)
        self.pairs = dict(pairs)
        # Joint solutions this delta is part of, shared with the others in them: a cache.
        self.joints: dict[tuple[str, str], Joint] = {}

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}:{part}": getattr(pair, part).contiguous()
            for name, pair in self.pairs.items()
            for part in PARTS
        }

    def metadata(self) -> dict[str, Any]:
        return {
            "transposed": {name: pair.transposed for name, pair in self.pairs.items()},
            "metric": {name: dict(pair.metric) for name, pair in self.pairs.items()},
        }

    @classmethod
    def from_parts(cls, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Self:
        transposed, metric = metadata.get("transposed"), metadata.get("metric")
        sound = isinstance(transposed, dict) and isinstance(metric, dict)
        require(sound, "A key_value delta lacks its list of parameters or their metrics.")
        assert isinstance(transposed, dict)
        assert isinstance(metric, dict)
        require(
            set(transposed) == set(metric)
            and all(isinstance(m, dict) and isinstance(m.get("digest"), str)
                    for m in metric.values()),
            "A key_value delta must name the metric of each of its parameters by a digest.",
        )  # fmt: skip
        wanted = {f"{name}:{part}" for name in transposed for part in PARTS}
        require(
            wanted == set(tensors),
            f"A key_value delta must hold the tensors {sorted(wanted)}, not {sorted(tensors)}.",
        )
        return cls(
            {
                name: KeyValues(
                    **{part: tensors[f"{name}:{part}"] for part in PARTS},
                    transposed=bool(flag),
                    metric=metric[name],
                )
                for name, flag in transposed.items()
            }
        )

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.pairs)

    def check(self, model: Model) -> None:
        super().check(model)
        for name, pair in self.pairs.items():
            given = (pair.r.shape[1], pair.k.shape[1])
            expected = model.weight_shape(name, pair.transposed)
            require(
                given == expected,
                f"A key_value delta for {name!r} has shape {given}; this model's is {expected}.",
            )

    def norms(self, model: Model) -> dict[str, float]:
        """Return the norm of the change that this edit makes by itself."""
        return {
            name: pair.alone().norm() / max(model.weight_norm(name), 1e-30)
            for name, pair in self.pairs.items()
        }

    @classmethod
    def fold(cls, name: str, accumulator: Tensor, deltas: Sequence[Self]) -> None:
        for total in cls.totals(name, deltas, accumulator.device):
            change = total.T if deltas[0].pairs[name].transposed else total
            if change.device != accumulator.device:  # Apple's, which has no fp64
                change = change.to(accumulator)
            accumulator.add_(change)

    @classmethod
    def totals(
        cls, name: str, deltas: Sequence[Self], device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """Return the joint Δ (d, D), fp64, of each metric among `deltas` (ledger order).

        Edits that refer to different metrics (another C, another null space) have no common
        least-squares problem: each metric's edits are solved together, and the solutions add up.
        """
        return [joint.total for joint in cls._joints(name, deltas, device)]

    @classmethod
    def joint_factors(cls, name: str, deltas: Sequence[Self]) -> tuple[Tensor, Tensor]:
        factors = [joint.factors() for joint in cls._joints(name, deltas, "cpu")]
        u, v = (torch.cat(parts, dim=1).float() for parts in zip(*factors, strict=True))
        return u, v

    @classmethod
    def _joints(cls, name: str, deltas: Sequence[Self], device: torch.device | str) -> list[Joint]:
        groups: dict[str, list[Self]] = {}
        for delta in deltas:
            groups.setdefault(delta.pairs[name].group, []).append(delta)
        return [Joint.of(name, groups[group], device) for group in sorted(groups)]

    def cosines(self, others: Sequence[KeyValueDelta]) -> list[float]:
        """Return for each other delta the largest cosine, in their metric, of a key of both.

        -1.0 for one that has no parameter and metric in common with this.
        """
        found = [-1.0] * len(others)
        for name, own in self.pairs.items():
            theirs = [
                (index, other.pairs[name])
                for index, other in enumerate(others)
                if name in other.pairs and other.pairs[name].group == own.group
            ]
            if not theirs:
                continue
            keys = torch.cat([pair.k.float() for _, pair in theirs])
            norms = torch.cat([pair.norms for _, pair in theirs])
            cosines = (own.w.float() @ keys.T / torch.outer(own.norms, norms)).amax(0)
            parts = torch.split(cosines, [len(pair.k) for _, pair in theirs])
            for (index, _), part in zip(theirs, parts, strict=True):
                found[index] = max(found[index], float(part.max()))
        return found


def _check_shapes(name: str, pair: KeyValues) -> None:
    k, w, r, s = (getattr(pair, part) for part in PARTS)
    fits = k.ndim == r.ndim == 2 and w.shape == k.shape and s.shape == r.shape[:1] == k.shape[:1]
    if not fits or not k.shape[0]:
        shapes = [tuple(tensor.shape) for tensor in (k, w, r, s)]
        raise IntegrityError(
            f"Keys, whitened keys, residuals and slacks of {name!r} have shapes {shapes}; they "
            "must be (n, D), (n, D), (n, d) and (n,)."
        )
    require(
        all(tensor.is_floating_point() for tensor in (k, w, r, s)),
        f"Keys, whitened keys, residuals and slacks of {name!r} must be floating point.",
    )
    require(bool((s.double() >= 0).all()), f"A slack of {name!r} is negative or not a number.")
    own = (k.double() * w.double()).sum(1)
    # Not <=: what is not finite is named by `check`.
    if bool((own <= 0).any()):
        raise IntegrityError(
            f"A key of {name!r} has kᵀ M k = {float(own.min()):.3g}: it is zero, or lies outside "
            "what the metric lets be written, so that nothing can be written there."
        )
