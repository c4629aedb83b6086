"""Aims, ready to be computed with: which answers, and the loss of one that should not be said.

    say     −(1/m) Σ_j log P(o_j | p, o_<j)
    unsay   −log(1 − P̄),  P̄ = exp((1/m) Σ_j log P(o_j | p, o_<j));  0 where P̄ ≤ FLOOR
    rival   −log σ(l⁺ − l⁻),  l the mean log-probability of a token of the two replies

Unlikelihood (Welleck et al. 2020), on the length-normalised probability that success is measured
with. The floor keeps a method from driving down what is gone already, and other things with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from errata.edits.aims import FLOOR, aims_of_request
from errata.edits.clashes import same_relation
from errata.edits.erasures import naming_what_goes

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.aims import Aim
    from errata.edits.request import Request
    from errata.model.model import Model

RIVAL = 0.9
"""Share of the probability, σ(l⁺ − l⁻), from which on a reply has the better of its rival."""


def aims_of(model: Model, request: Request) -> list[Aim]:
    """Return what a request asks for on the model as it stands.

    An answer to be forgotten that is not named is what the model says now; where it says nothing,
    there is none. A relation that is deleted from one object must stay with the others that active
    edits have joined it to: what those say is an aim of this request, too, where it is computed on
    top of them.
    """
    (request,) = naming_what_goes(model, [request])
    aims = [aim for aim in aims_of_request(request) if aim.answer]
    if request.kind == "relation" and any(aim.sense == "unsay" for aim in aims):
        active = [old for edit in model.stack.entries for old in edit.requests]
        joined = [r for r in active if r.kind == "relation" and same_relation(r, request)]
        here = {aim.prompt for aim in aims}
        others = (aim for old in joined for aim in aims_of_request(old) if aim.sense == "say")
        aims += [aim for aim in others if aim.prompt not in here]
    return list(dict.fromkeys(aims))


def unlikelihood(log_p: Tensor) -> Tensor:
    """Return −log(1 − P̄) of mean log-probabilities, any shape; 0, and flat, at the floor."""
    p = log_p.exp()
    return torch.where(p > FLOOR, -torch.log1p(-p.clamp(max=1 - 1e-6)), torch.zeros_like(p))


def rivalry(wished: Tensor, other: Tensor) -> Tensor:
    """Return −log σ(l⁺ − l⁻) of the mean log-probabilities of replies and their rivals."""
    return torch.nn.functional.softplus(other - wished)
