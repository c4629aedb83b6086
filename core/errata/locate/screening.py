"""Screening: what every restoration would do, to first order, from one backward pass.

Attribution patching (Nanda 2023; Syed, Rager, Conmy 2023) replaces the effect of putting a clean
state h⁰ back into a corrupted run, p(h ← h⁰) − p(h), by the gradient of the corrupted run,
(h⁰ − h) · ∂p/∂h, for all states at once. It is exact where p is linear in between, which a
probability near 0 or 1 is not: read it as a ranking, and trace the cells that it puts on top.

The gradient × activation of the clean run, h⁰ · ∂p/∂h⁰, needs no corruption at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from errata.locate.causal_trace import Tracer, as_request
from errata.locate.corrupted_runs import CorruptedRuns
from errata.locate.trace_result import CausalTrace
from errata.locate.trace_settings import Kind, Score, ScreenSettings, Side, parse_settings
from errata.locate.traced_prompt import traced_prompt
from errata.model.forward import frozen, patched

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model.model import Model

HOW = "attribution patching (first order)"


class GradientProbes:
    """Zeros that are added to module outputs, so that gradients can be taken there.

    Adding leaves every number as it is and works whatever a model does with the output next
    (some write into it).
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        self.zeros: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def changes(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """Return the changes for `errata.model.forward.patched`."""
        return {path: self._adder(path) for path in self.paths}

    def _adder(self, path: str) -> Callable[[Tensor], Tensor]:
        def add(output: Tensor) -> Tensor:
            self.outputs[path] = output.detach()
            self.zeros[path] = torch.zeros_like(output, requires_grad=True)
            return output + self.zeros[path]

        return add

    def gradients(self, of: Tensor) -> dict[str, Tensor]:
        """Return the gradient of a scalar with respect to each output."""
        zeros = [self.zeros[path] for path in self.paths]
        found = torch.autograd.grad(of, zeros, allow_unused=True)
        return {
            path: torch.zeros_like(zero) if gradient is None else gradient
            for path, zero, gradient in zip(self.paths, zeros, found, strict=True)
        }


def screen(
    model: Model, request: Request | str, subject: str | None = None, **settings: Any
) -> CausalTrace:
    """Estimate the scores of `trace` for all tokens and layers with one backward pass.

    The arguments are those of `trace`, the settings those of `ScreenSettings`. A window's effect
    is the sum of its layers'. Estimated scores may lie outside 0 to 1.
    """
    asked = parse_settings(ScreenSettings, settings, "attribution")
    tracer = Tracer(model, as_request(model, request, subject), asked, reruns=False)
    return tracer.result(asked.kind, *screened(tracer, asked.kind, asked.window), how=HOW)


def screened(tracer: Tracer, kind: Kind, window: int) -> tuple[int, Tensor]:
    """Return the width of the windows and the estimated scores (tokens, layers)."""
    runs = tracer.runs
    paths = runs.paths(kind)
    probes = GradientProbes(paths)
    module = runs.model.module
    with torch.enable_grad(), frozen(module), patched(module, probes.changes()):
        scores = runs.log_probability(runs.run(tracer.corruption)).exp()
        gradients = probes.gradients(scores.sum())
    runs.low = float(scores.detach().double().mean())
    effects = torch.stack(
        [
            _along(runs, gradients[path], runs.clean[path] - runs.shaped(probes.outputs[path]))
            for path in paths
        ],
        dim=1,
    )  # (tokens, layers)
    width = 1 if kind == "hidden" else window
    if width > 1:
        half, count = width // 2, len(paths)
        columns = [
            effects[:, max(0, i - half) : min(count, i - half + width)] for i in range(count)
        ]
        effects = torch.stack([part.sum(dim=1) for part in columns], dim=1)
    return width, effects + runs.low


def _along(runs: CorruptedRuns, gradient: Tensor, difference: Tensor) -> Tensor:
    """Return (tokens,) mean over samples of difference · gradient."""
    product = (runs.shaped(gradient).double() * difference.double()).sum(dim=-1)
    return product.mean(dim=0)[: runs.length].cpu()


def gradient_times_activation(
    model: Model,
    request: Request | str,
    subject: str | None = None,
    *,
    kind: Kind = "hidden",
    answer: str | None = None,
    score: Score = "whole",
    side: Side = "encoder",
    of: Literal["log-probability", "probability"] = "log-probability",
) -> tuple[CorruptedRuns, Tensor]:
    """Return the prompt's run, and h · ∂/∂h of the answer's score for every token and layer.

    The arguments but the last are those of `trace`. `of` is what is differentiated: the gradient
    of a probability vanishes where the model is sure, that of its logarithm vanishes less.
    """
    request = as_request(model, request, subject)
    given = {"kind": kind, "score": score, "side": side}
    parse_settings(ScreenSettings, given, "gradient")
    runs = CorruptedRuns(model, traced_prompt(model, request, answer), side=side, score=score)
    probes = GradientProbes(runs.paths(kind))
    with torch.enable_grad(), frozen(model.module), patched(model.module, probes.changes()):
        value = runs.log_probability(runs.run(None))
        gradients: dict[str, Any] = probes.gradients(
            (value.exp() if of == "probability" else value).sum()
        )
    columns = [_along(runs, gradients[path], runs.clean[path]) for path in runs.paths(kind)]
    return runs, torch.stack(columns, dim=1)
