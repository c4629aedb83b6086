"""MEND's network g, its training objective, and an edit.

For each matrix W_k of one shape (m × n), with x the input and δ the gradient at the output,

    u = (x − μ_x)/(σ_x + ε)    v = (δ − μ_δ)/(σ_δ + ε)    c = [u; v]
    c ← c + max(0, s_k ⊙ (U V c + b) + t_k)               n_hidden + 1 times
    [x̃; δ̃] = c                ΔW_k = ± η_k Σ_t δ̃_t x̃_tᵀ

U starts at zero, so that g starts as the identity. Matrices of one shape share U, V, b and the
statistics; s_k, t_k and η_k are each one's own. The loss of an edit is

    c_edit · −log P'(o | x')  +  c_loc · KL(P ‖ P')  +  c_reverse · KL(P' ‖ P)

The last term is errata's own, 0 as published: KL(P ‖ P') weighs by what the base says, so that a
new object that rises from nothing among neighbours hardly counts there.

Against the authors' code: the rectifier passes gradient at zero (as `clamp` does there); statistics
are those of all training requests, taken before the first step, instead of running along; each edit
is computed by itself with its own mean over its target's tokens, at the unedited model; a claim is
always taught its other class, where theirs, by a coin, teaches the one that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from errata.kit.hypernetworks import (
    EditingNetwork,
    Factors,
    Signals,
    edited_modules,
    low_rank_deltas,
    signals_of,
    trained_network,
)

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.delta import LowRankDelta
    from errata.edits.request import Request
    from errata.kit.hypernetworks.lessons import Answered
    from errata.model import Model
    from errata_mend.config import MendConfig

EPS = 1e-7
LINE = (0.03, 0.1, 0.3, 1.0, 3.0)
"""Shares of ‖W x‖ that the line search tries as the size of a change."""
_SEARCHED = 16  # training requests, about, on which ‖W x‖ is measured


def trained(model: Model, config: MendConfig, training: Sequence[Request] = ()) -> MendNetwork:
    """Return the trained network."""
    modules = edited_modules(model, config.target_modules, config.layers)
    return trained_network(
        model, "mend", lambda: MendNetwork(model, modules, config), modules, config, training
    )


@torch.no_grad()
def edit(model: Model, requests: Sequence[Request], config: MendConfig) -> list[LowRankDelta]:
    """Return what the trained network makes of each request's gradient."""
    network = trained(model, config)
    deltas = []
    for signals in signals_of(model, requests, network.paths):
        deltas += low_rank_deltas(model, network(signals), signals, made_with=network.origin)
    return deltas


class Residual(nn.Module):
    """One layer of g for matrices of one shape: c + max(0, s_k ⊙ (U V c + b) + t_k).

    Args:
        size: n + m.
        rank: of U V.
        modes: number of matrices that share it.
        generator: draws V.
    """

    def __init__(self, size: int, rank: int, modes: int, generator: torch.Generator) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.zeros(size, rank))
        self.v = nn.Parameter(torch.randn(rank, size, generator=generator))
        self.b = nn.Parameter(torch.zeros(size))
        self.s = nn.Parameter(torch.ones(modes, size))
        self.t = nn.Parameter(torch.zeros(modes, size))

    def forward(self, c: Tensor, k: int) -> Tensor:
        """Return (…, size) for (…, size) of the k-th matrix."""
        inner = self.s[k] * (c @ self.v.T @ self.u.T + self.b) + self.t[k]
        return c + inner.clamp(min=0)


class Shape(nn.Module):
    """g for all edited matrices of one shape, with the statistics of x and δ.

    Args:
        n, m: width of the input and of the output.
        modes: number of matrices.
        config: the hyper-parameters.
        generator: draws the start.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, n: int, m: int, modes: int, config: MendConfig, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.n = n
        rank = min(config.rank, n + m)
        self.layers = nn.ModuleList(
            Residual(n + m, rank, modes, generator) for _ in range(config.n_hidden + 1)
        )
        self.register_buffer("mean", torch.full((n + m,), torch.nan))
        self.register_buffer("std", torch.full((n + m,), torch.nan))

    def forward(self, x: Tensor, delta: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return x̃ (…, n) and δ̃ (…, m)."""
        c = (torch.cat([x, delta], -1) - self.mean) / (self.std + EPS)
        for layer in self.layers:
            c = layer(c, k)
        return c[..., : self.n], c[..., self.n :]


class _Moments:
    """Sums over all tokens of all requests, from which a `Shape` takes its statistics."""

    def __init__(self, shape: nn.Module) -> None:
        assert isinstance(shape, Shape)
        self._shape, self._count = shape, 0
        self._total = torch.zeros_like(shape.mean).double()
        self._square = self._total.clone()

    def add(self, rows: Tensor) -> None:
        """Count rows (n, size), fp64."""
        self._count += len(rows)
        self._total += rows.sum(0)
        self._square += rows.square().sum(0)

    def settle(self) -> None:
        """Write mean and standard deviation into the shape."""
        mean = self._total / max(self._count, 1)
        spread = self._square - self._count * mean.square()
        self._shape.mean.copy_(mean)
        self._shape.std.copy_((spread / max(self._count - 1, 1)).clamp(0).sqrt())


class MendNetwork(EditingNetwork):
    """MEND's networks and rates for one model.

    Args:
        model: the model.
        modules: paths of the edited modules.
        config: the hyper-parameters.
    """

    unit: Tensor

    def __init__(self, model: Model, modules: Sequence[str], config: MendConfig) -> None:
        super().__init__()
        self.paths = list(modules)
        self._config = config
        self._model = model
        groups: dict[tuple[int, int], list[str]] = {}
        for path in modules:
            groups.setdefault(model.anatomy.shape(model.module, path), []).append(path)
        generator = torch.Generator().manual_seed(config.seed)
        self.shapes = nn.ModuleDict()
        self._place: dict[str, tuple[str, int]] = {}
        for (m, n), members in groups.items():
            name = f"{m}x{n}"
            self.shapes[name] = Shape(n, m, len(members), config, generator)
            self._place |= {path: (name, k) for k, path in enumerate(members)}
        start = 1.0 if config.edit_lr_start is None else config.edit_lr_start
        self.eta = nn.Parameter(torch.full((len(modules),), start))
        self.register_buffer("unit", torch.ones(len(modules)))  # what η counts in

    def forward(self, signals: Signals) -> dict[str, Factors]:
        """Return ± η Σ δ̃ x̃ᵀ as factors for each request."""
        sign = -1.0 if self._config.descent else 1.0
        found = {}
        for index, path in enumerate(self.paths):
            name, k = self._place[path]
            x, delta = self.shapes[name](signals.inputs[path], signals.errors[path], k)
            rate = sign * self.eta[index] * self.unit[index]
            found[path] = Factors(rate * delta * signals.kept[path].unsqueeze(-1), x)
        return found

    def objective(self, answered: Answered) -> Tensor:
        """Return c_edit · NLL + c_loc · KL(P ‖ P') + c_reverse · KL(P' ‖ P)."""
        config = self._config
        loss = config.c_edit * answered.edit.mean() + config.c_loc * answered.locality
        # As published there is no such term, and nothing to differentiate.
        return loss + config.c_reverse * answered.reverse if config.c_reverse else loss

    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Return one Adam for the networks and one for the rates."""
        return [
            torch.optim.Adam(self.shapes.parameters(), lr=self._config.lr),
            torch.optim.Adam([self.eta], lr=self._config.edit_lr),
        ]

    @torch.no_grad()
    def begin(self, signals: Iterable[Signals], trial: Callable[[], float]) -> None:
        """Take the statistics of x and δ, and find where η starts, if that is asked for."""
        moments = {name: _Moments(shape) for name, shape in self.shapes.items()}
        some: list[Signals] = []
        for several in signals:
            if sum(map(len, some)) < _SEARCHED:
                some.append(several)
            for path in self.paths:
                kept = several.kept[path]
                rows = torch.cat([several.inputs[path][kept], several.errors[path][kept]], -1)
                moments[self._place[path][0]].add(rows.double())
        for each in moments.values():
            each.settle()
        if self._config.edit_lr_start is None:
            self._search(some, trial)

    def _search(self, signals: Sequence[Signals], trial: Callable[[], float]) -> None:
        """Let a change be a share of ‖W x‖ in each matrix, the share that has the lowest loss."""
        anatomy = self._model.anatomy
        sizes, n = torch.zeros_like(self.unit), sum(map(len, signals))
        for several in signals:
            factors = self(several)
            for index, path in enumerate(self.paths):
                x = several.inputs[path]  # (B, R, d_in), padded with zeros
                weight = self._model.pristine[anatomy.weight(path)].float().to(x.device)
                before = (x @ (weight if anatomy.transposed(path) else weight.T)).norm(dim=(1, 2))
                change = factors[path]
                after = ((x @ change.v.mT) @ change.u).norm(dim=(1, 2))
                sizes[index] += (before / after.clamp_min(EPS)).sum() / n
        losses = {}
        for share in LINE:
            self.unit.copy_(share * sizes / len(self.paths))
            losses[share] = trial()
        self.unit.copy_(min(losses, key=losses.__getitem__) * sizes / len(self.paths))
