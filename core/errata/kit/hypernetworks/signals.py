"""What an edit asks of each matrix at the unedited model: its gradient, as factors.

For y = W x and the loss L of one request, ∂L/∂W = Σ_t δ_t x_tᵀ over the tokens t that W sees, with
δ = ∂L/∂y. Neither x nor δ depends on the network that is trained on them: they are computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

from errata.edits.aims import says_something
from errata.errors import CapabilityError, EditFailed
from errata.kit.loss_scale import loss_scale
from errata.kit.training.training_batches import TrainingBatch, batch_loss
from errata.model.forward import frozen, patched, trace
from errata.model.running import prepare, run

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from errata.edits.request import Request
    from errata.model.model import Model

_BATCH = 16


@dataclass(frozen=True, eq=False)
class Signals:
    """The gradients of B requests, rows padded with zeros.

    All on one device: edited modules may be spread over several, the network is on one.

    Attributes:
        requests: the B requests.
        inputs: module path → x (B, R, d_in).
        errors: module path → δ (B, R, d_out), of each request's own mean negative log-likelihood.
        kept: module path → (B, R), which rows are real: x and δ are both not zero there.
    """

    requests: tuple[Request, ...]
    inputs: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def join(cls, parts: Sequence[Signals]) -> Self:
        """Return several as one, padded to the longest."""
        requests = tuple(request for part in parts for request in part.requests)
        inputs, errors, kept = (
            {
                path: _stacked([getattr(part, name)[path] for part in parts])
                for path in parts[0].inputs
            }
            for name in ("inputs", "errors", "kept")
        )
        return cls(requests, inputs, errors, kept)

    def to(self, dtype: torch.dtype) -> Signals:
        """Return them in another floating point type."""
        return Signals(
            self.requests,
            {path: value.to(dtype) for path, value in self.inputs.items()},
            {path: value.to(dtype) for path, value in self.errors.items()},
            self.kept,
        )

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        held = (self.inputs, self.errors, self.kept)
        return sum(tensor.nbytes for part in held for tensor in part.values())

    def each(self) -> list[Signals]:
        """Return every request's by itself, without padding."""
        found = []
        for index, request in enumerate(self.requests):
            rows = {path: kept[index] for path, kept in self.kept.items()}
            found.append(
                Signals(
                    (request,),
                    {path: self.inputs[path][index, row][None] for path, row in rows.items()},
                    {path: self.errors[path][index, row][None] for path, row in rows.items()},
                    {path: row[row][None] for path, row in rows.items()},
                )
            )
        return found


def signals_of(model: Model, requests: Sequence[Request], modules: Sequence[str]) -> list[Signals]:
    """Return each request's gradient at the model as it stands, fp32, without padding.

    They are on the model's device (`Model.device`), wherever the modules are.

    Args:
        model: the model, with every edit off.
        requests: the requests; the gradient is of `target` after `text` (a class, in a classifier;
            an encoder-decoder also learns to close the target).
        modules: paths of the linear modules.

    Raises:
        CapabilityError: a request asks only for an answer to be taken away.
        EditFailed: a request's gradient is zero or not finite in every module.
    """
    for request in requests:
        check_says_something(request)
    found: dict[int, Signals] = {}
    # Of one length each, so that little is computed on padding.
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].text))
    steps = range(0, len(order), _BATCH)
    for begin in model.progress.track(steps, "Gradients of the requests"):
        places = order[begin : begin + _BATCH]
        each = _each(model, [requests[place] for place in places], modules)
        found.update(zip(places, each, strict=True))
    return [found[place] for place in range(len(requests))]


def joined_signals(model: Model, requests: Sequence[Request], modules: Sequence[str]) -> Signals:
    """Return the gradients of requests that are run together, as `signals_of` does, padded.

    Their numbers do not depend on other requests than these.

    Args:
        model: the model, with every edit off.
        requests: the requests, few enough for one pass.
        modules: paths of the linear modules.

    Raises `EditFailed` as `signals_of` does.
    """
    return Signals.join(_each(model, requests, modules))


def _each(model: Model, requests: Sequence[Request], modules: Sequence[str]) -> list[Signals]:
    """Return the gradients of requests that are run together, each one's without padding."""
    prompts = prepare(model, [r.text for r in requests], [r.target for r in requests], closing=True)
    counts = torch.tensor(prompts.counts, device=prompts.rows.device)
    # The sum over the requests of each one's mean: what stands in a row is its request's alone.
    batch = TrainingBatch(
        prompts, 1.0 / counts[prompts.rows], torch.ones_like(prompts.rows, dtype=torch.bool)
    )
    probes: dict[str, Tensor] = {}

    def probe(path: str) -> Callable[[Tensor], Tensor]:
        def change(output: Tensor) -> Tensor:
            probes[path] = torch.zeros_like(output, requires_grad=True)
            return output + probes[path]

        return change

    scale = loss_scale(model)
    with (
        torch.enable_grad(),
        frozen(model.module),
        trace(model.module, modules, inputs=True, outputs=False, detach=True) as seen,
        patched(model.module, {path: probe(path) for path in modules}),
    ):
        loss, _ = batch_loss(batch, run(model, prompts))
        gradients = torch.autograd.grad(loss * scale, [probes[path] for path in modules])
    device = model.device
    inputs, errors, kept = {}, {}, {}
    for path, gradient in zip(modules, gradients, strict=True):
        x = seen[path].input
        assert x is not None
        inputs[path], gradients_there = (
            part.to(device).float().reshape(len(requests), -1, part.shape[-1])
            for part in (x, gradient)
        )
        errors[path] = gradients_there / scale
        kept[path] = inputs[path].any(-1) & errors[path].any(-1)
    found = Signals(tuple(requests), inputs, errors, kept).each()
    for signals in found:
        _check(signals)
    return found


def check_says_something(request: Request) -> None:
    """Raise `CapabilityError` where a request asks only for an answer to be taken away."""
    if not says_something(request):
        raise CapabilityError(
            f"{request.text!r} is to be erased, and nothing is to be said instead. A trained "
            "network turns the gradient of a target into a change; it never learnt to take an "
            'answer away. Give a refusal as target_new, such as "I don\'t know.", or a method '
            "that needs no training."
        )


def _check(signals: Signals) -> None:
    (request,) = signals.requests
    problem = ""
    if not any(bool(kept.any()) for kept in signals.kept.values()):
        problem = (
            "zero in every module: the model says the target with certainty already, or nothing "
            "that is edited reaches it"
        )
    elif not all(bool(error.isfinite().all()) for error in signals.errors.values()):
        problem = "not finite: load the model in bf16 or fp32"
    if problem:
        raise EditFailed(f"The gradient of {request.text!r} → {request.target_new!r} is {problem}.")


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return (1, R_i, …) tensors as one (B, R, …), padded with zeros."""
    return pad_sequence([part[0] for part in parts], batch_first=True)
