"""The loss of a value, L(δ): what it is computed from, and the form in which a method writes it.

A method's file holds the formula, as a `ValueObjective`; the optimiser (`errata.kit.values`) runs
the model and hands over an `Evaluation`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from torch import Tensor


class ValueLoss(NamedTuple):
    """The terms of L(δ), each with its factor, (N,) in nats.

    Attributes:
        nll: the new target should be said, and what is to go no longer.
        kl: what the subject is should stay.
        decay: δ should be small.
    """

    nll: Tensor
    kl: Tensor
    decay: Tensor

    @property
    def total(self) -> Tensor:
        """L(δ), the sum of the terms."""
        return self.nll + self.kl + self.decay


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What the model says of N requests with δ in place: what a loss is computed from.

    Attributes:
        log_p: (n,) log P(o_j | context, prompt, o_<j) of every target token, in every context of
            every request.
        unlikelihood: (N,) −log(1 − P̄) of the answers that should no longer be said (see
            `errata.kit.aims`), the mean over answers and contexts; 0 where there are none.
        gone: (N,) all of them are at the floor, in all contexts; true where there are none.
        essence: (m, V) log P at the edited token of the KL prompt, one row per request; none
            without a KL prompt.
        essence_before: (m, V) the same for δ = 0.
        δ_norm: (P, N) ‖δ‖ at each of P places.
        v0_norm: (P, N) ‖v0‖ there.
        first_before: (N,) at how many evaluations in a row, this one not counted, every target
            token was the most probable one in all contexts, and what is to go was gone.
        first: (N,) the same with this one counted; 0 where it is not so now.
    """

    log_p: Tensor
    unlikelihood: Tensor
    gone: Tensor
    essence: Tensor
    essence_before: Tensor
    δ_norm: Tensor
    v0_norm: Tensor
    first_before: Tensor
    first: Tensor
    _owner: Tensor  # (n,) request of each entry of `log_p`
    _essence_owner: Tensor  # (m,)
    _share: Tensor  # (N,) one over the target tokens of a request in all contexts, 0 for none

    @property
    def kl(self) -> Tensor:
        """KL(P_δ ‖ P) at the edited token of the KL prompt, (N,); 0 without a KL prompt."""
        log_P, log_P0 = self.essence, self.essence_before
        kl = (log_P.exp() * (log_P - log_P0)).sum(1)
        return torch.zeros_like(self._share).index_add(0, self._essence_owner, kl)

    def mean_over_contexts(self, values: Tensor) -> Tensor:
        """Return the means (N,) over target tokens and contexts of values (n,)."""
        # The target has as many tokens in every context, so one mean over all of them is the mean
        # over contexts of the means over target tokens.
        return torch.zeros_like(self._share).index_add(0, self._owner, values) * self._share


class ValueObjective(Protocol):
    """What a method's paper asks of a value: the optimiser calls both at every evaluation."""

    def loss(self, at: Evaluation) -> ValueLoss:
        """Return L(δ) of each request."""

    def done(self, at: Evaluation, loss: ValueLoss) -> Tensor:
        """Return which requests have reached what they were to reach, (N,) bool."""
