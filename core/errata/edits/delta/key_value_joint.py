"""The joint solution of several key-value edits, kept so that the next one costs little.

What is kept never decides what comes out: `JointSolve` gives the same bits for the same list of
keys however the list came about, and the list is that of the active edits in ledger order.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol

import torch

from errata.edits.delta.joint_solve import JointSolve, KeyRows

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta.key_values import KeyValues


class JointMember(Protocol):
    """What a solution knows of an edit that is part of it."""

    pairs: dict[str, KeyValues]
    joints: dict[tuple[str, str], Joint]


class Joint:
    """The solution for one parameter, and the edits it is for."""

    def __init__(self, name: str, first: JointMember, device: torch.device) -> None:
        pair = first.pairs[name]
        self._name, self._device = name, device
        self._solve = JointSolve(pair.k.shape[1], pair.r.shape[1], device)
        self._members: list[JointMember] = []

    @classmethod
    def of(cls, name: str, deltas: Sequence[JointMember], device: torch.device | str) -> Joint:
        """Return the solution for these deltas, going on from one that some of them share."""
        home = torch.device(device)
        home = torch.device("cpu") if home.type == "mps" else home  # it has no fp64
        key = (name, str(home))
        known = (delta.joints[key] for delta in reversed(deltas) if key in delta.joints)
        joint = next(known, None) or cls(name, deltas[0], home)
        joint._move(deltas)
        for delta in deltas:
            delta.joints[key] = joint
        return joint

    @property
    def total(self) -> Tensor:
        """Δ, (d, D) fp64, formed anew: at a large model's size it is not kept twice."""
        return self._solve.change

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return U (d, r) and V (D, r), fp64, with U Vᵀ = Δ and r the lesser of keys and d."""
        factors = self._solve.factors
        height = self._members[0].pairs[self._name].r.shape[1]
        if factors is not None and factors[0].shape[1] < height:
            return factors
        total = self.total
        return torch.eye(height).to(total), total.T.contiguous()

    def _move(self, deltas: Sequence[JointMember]) -> None:
        """Make this the solution for `deltas`."""
        pairs = zip(self._members, deltas, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], pairs))
        if self._members and same == len(self._members) == len(deltas):
            return
        counts = [len(delta.pairs[self._name].k) for delta in deltas]
        try:
            self._members = []
            self._solve.truncate(sum(counts[:same]))
            self._solve.extend(self._rows(deltas, counts))
            self._members = list(deltas)
        except BaseException:
            self._solve.truncate(0)
            raise

    def _rows(self, deltas: Sequence[JointMember], counts: Sequence[int]) -> KeyRows:
        """Return the keys that the solver does not hold, stacked."""
        skip, index = self._solve.count, 0
        while skip and skip >= counts[index]:
            skip -= counts[index]
            index += 1
        rows = [delta.pairs[self._name].rows(self._device) for delta in deltas[index:]]
        if not rows:
            pair = deltas[0].pairs[self._name].rows(self._device)
            return KeyRows(*(part[:0] for part in pair))
        return KeyRows(*(torch.cat(parts)[skip:] for parts in zip(*rows, strict=True)))
