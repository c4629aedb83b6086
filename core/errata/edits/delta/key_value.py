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

Edits about one subject have nearly one key. What they ask for together is stored with the later one
and stands in for what each asks for alone (`errata.edits.delta.shared_values`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from errata.edits.delta.base import Delta, relative_norms, require
from errata.edits.delta.key_value_joint import Joint
from errata.edits.delta.key_values import PARTS, KeyValues
from errata.edits.delta.shared_values import SharedValues, in_force
from errata.errors import IntegrityError

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.model.model import Model


class KeyValueDelta(Delta):
    """Keys and residuals per parameter name; folds as one least-squares solve over all edits.

    Args:
        pairs: what the edit asks for alone.
        fact: names what it is about, the same for whoever asks for the same at the same place; ""
            where it shares nothing.
        shared: facts, this one among them → what these ask for together, at the same parameters.
    """

    kind: ClassVar[str] = "key_value"

    def __init__(
        self,
        pairs: Mapping[str, KeyValues],
        fact: str = "",
        shared: Mapping[frozenset[str], Mapping[str, KeyValues]] | None = None,
    ) -> None:
        require(bool(pairs), "A key_value delta needs at least one parameter.")
        for name, pair in pairs.items():
            _check_shapes(name, pair)
        for facts, together in (shared or {}).items():
            _check_shared(fact, facts, pairs, together)
        self.pairs = dict(pairs)
        self.fact = fact
        self.shared = {f: SharedValues(dict(together)) for f, together in (shared or {}).items()}
        # Joint solutions this delta is part of, shared with the others in them: a cache.
        self.joints: dict[tuple[str, str], Joint] = {}

    def tensors(self) -> dict[str, Tensor]:
        every = [("", self.pairs)]
        every += [(_mark(index), one.pairs) for index, one in enumerate(self.shared.values())]
        return {
            f"{mark}{name}:{part}": getattr(pair, part).contiguous()
            for mark, pairs in every
            for name, pair in pairs.items()
            for part in PARTS
        }

    def metadata(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "transposed": {name: pair.transposed for name, pair in self.pairs.items()},
            "metric": {name: dict(pair.metric) for name, pair in self.pairs.items()},
        }
        if self.fact:
            found |= {"fact": self.fact, "shared": [sorted(facts) for facts in self.shared]}
        return found

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
        fact, sets = metadata.get("fact", ""), metadata.get("shared", [])
        require(
            isinstance(fact, str) and isinstance(sets, list) and len(sets) <= _MOST_SETS
            and all(isinstance(facts, list) and all(isinstance(f, str) for f in facts)
                    for facts in sets),
            "A key_value delta must name its facts by texts.",
        )  # fmt: skip
        marks = ["", *map(_mark, range(len(sets)))]
        wanted = {f"{mark}{name}:{part}" for mark in marks for name in transposed for part in PARTS}
        require(
            wanted == set(tensors),
            f"A key_value delta must hold the tensors {sorted(wanted)}, not {sorted(tensors)}.",
        )
        own, *others = (
            {
                name: KeyValues(
                    **{part: tensors[f"{mark}{name}:{part}"] for part in PARTS},
                    transposed=bool(flag),
                    metric=metric[name],
                )
                for name, flag in transposed.items()
            }
            for mark in marks
        )
        return cls(own, fact, dict(zip(map(frozenset, sets), others, strict=True)))

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
        return relative_norms(model, {n: pair.alone().norm() for n, pair in self.pairs.items()})

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
        return [Joint.of(name, in_force(groups[group]), device) for group in sorted(groups)]

    def cosines(self, others: Sequence[KeyValueDelta]) -> list[float]:
        """Return for each other delta the largest cosine, in their metric, of a key of both.

        Two keys that only keep what was there ask for the same, and do not count. -1.0 for a delta
        that has no parameter and metric in common with this, or shares its values.
        """
        found = [-1.0] * len(others)
        sharing = frozenset().union(*self.shared)
        for name, own in self.pairs.items():
            theirs = [
                (index, other.pairs[name])
                for index, other in enumerate(others)
                if name in other.pairs and other.pairs[name].group == own.group
                and other.fact not in sharing
            ]  # fmt: skip
            if not theirs:
                continue
            keys = torch.cat([pair.k.float() for _, pair in theirs])
            norms = torch.cat([pair.norms for _, pair in theirs])
            written = torch.cat([pair.written for _, pair in theirs])
            cosines = own.w.float() @ keys.T / torch.outer(own.norms, norms)
            cosines[~torch.logical_or(own.written[:, None], written)] = -1.0
            parts = torch.split(cosines.amax(0), [len(pair.k) for _, pair in theirs])
            for (index, _), part in zip(theirs, parts, strict=True):
                found[index] = max(found[index], float(part.max()))
        return found


_MOST_SETS = 1024


def _mark(index: int) -> str:
    """Return what the names of a set's tensors begin with."""
    return f"shared {index}:"


def _check_shared(
    fact: str,
    facts: frozenset[str],
    pairs: Mapping[str, KeyValues],
    together: Mapping[str, KeyValues],
) -> None:
    require(
        fact in facts and len(facts) > 1 and bool(fact),
        "A key_value delta must be one of the facts that share a value with it.",
    )
    require(
        set(together) == set(pairs)
        and all(
            together[name].k.shape[1:] == pair.k.shape[1:]
            and together[name].r.shape[1:] == pair.r.shape[1:]
            and (together[name].group, together[name].transposed) == (pair.group, pair.transposed)
            for name, pair in pairs.items()
        ),
        "What facts ask for together must be of the parameters and metrics of each alone.",
    )
    for name, pair in together.items():
        _check_shapes(name, pair)


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
