"""The loop: Adam over batches, in breadth-first or depth-first order, until the requests hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Literal

import torch

from errata.errors import EditFailed
from errata.kit.loss_scale import loss_scale
from errata.kit.training.training_batches import TrainingBatch, batch_loss, settled
from errata.model.forward import Resumed
from errata.model.forward.inputs import pads
from errata.model.running import run

if TYPE_CHECKING:
    from torch import Tensor

    from errata.contract.config import MethodConfig
    from errata.model.model import Model
    from errata.model.prompts import PreparedPrompts

logger = logging.getLogger("errata")

Order = Literal["breadth-first", "depth-first"]

_RECORDED = 2**30  # bytes of recorded states, at most; batches beyond that run whole each time


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How something is trained.

    Attributes:
        lr: Adam's learning rate.
        steps: passes over the batches, at most; in depth-first order over each by itself.
        weight_decay: Adam's weight decay, on what is trained.
        early_stop: stop once every request holds, and take no step on a batch that does.
        stop_loss: to hold, a target's mean negative log-likelihood (nats) must also be below it.
        order: breadth-first: every pass goes through all batches, in a new random order;
            depth-first: each batch is trained until it holds, then the next, and none again.
        seed: of the random order.
    """

    lr: float
    steps: int
    weight_decay: float = 0.0
    early_stop: bool = True
    stop_loss: float | None = None
    order: Order = "breadth-first"
    seed: int = 0

    @classmethod
    def of(cls, config: MethodConfig) -> TrainerSettings:
        """Return those of a method whose hyper-parameters have these names."""
        names = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names})


@dataclass
class Objective:
    """What one forward pass over a batch shows. PEFT adds to `.loss` in place.

    Attributes:
        loss: see `errata.kit.training.training_batches`.
        holds: for each request, whether it held in this pass.
    """

    loss: Tensor
    holds: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Above:
    """From where on a forward pass can differ while training: only that part is run each step.

    Attributes:
        layer: the lowest block (of the decoder) that holds something trained.
        known: modules of that block that stand before it, whose output stays what it was.
    """

    layer: int
    known: tuple[str, ...] = ()


def above(model: Model, modules: Sequence[str]) -> Above | None:
    """Return what has to be run again when these modules change: all from the lowest one on."""
    anatomy = model.anatomy
    if (lowest := anatomy.lowest_block(modules)) is None:
        return None
    here = {path for path in modules if path.startswith(f"{anatomy.block(lowest)}.")}
    known: tuple[str, ...] = ()
    if lowest in anatomy.layers_with("mlp"):
        if here <= {anatomy.mlp_out(lowest), *anatomy.mlp_in(lowest)}:
            known = (anatomy.attention(lowest),)
        if here == {anatomy.mlp_out(lowest)}:
            known = (*known, *anatomy.mlp_in(lowest))
    return Above(lowest, known)


class Trainer:
    """Fits parameters to batches; a subclass says what happens around a step.

    Args:
        model: the model; nothing of it is trained, it only has to carry what is.
        batches: what is learnt from; in depth-first order they are taken as they come.
        settings: see `TrainerSettings`.
        above: what has to be run again in each step; None: everything.
        text: what progress says.

    Attributes:
        losses: the loss of every step that was computed, before the step.
        certain: a pass shows what holds (no dropout), so that no other one has to confirm it.
        optimiser: there while `fit` runs.
    """

    certain = True
    optimiser: torch.optim.Optimizer

    def __init__(
        self,
        model: Model,
        batches: Sequence[TrainingBatch],
        settings: TrainerSettings,
        *,
        above: Above | None = None,
        text: str = "Training",
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.settings = settings
        self.losses: list[float] = []
        self._above, self._text = above, text
        self._current = self.batches[0]
        self._resumed: dict[int, Resumed] = {}
        self._room = _RECORDED

    # -- for subclasses --------------------------------------------------------------------------

    def compute(self) -> Objective:
        """Compute the loss of the current batch, with whatever belongs to it."""
        return self.objective()

    def optimiser_for(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return a new optimiser; by default Adam."""
        settings = self.settings
        return torch.optim.Adam(parameters, lr=settings.lr, weight_decay=settings.weight_decay)

    def updated(self, step: int) -> None:
        """Act after each update, gradients still in place."""

    def finished(self, step: int) -> bool:
        """Say whether to stop once every batch held in its last pass; asked where not `certain`."""
        del step
        return self.holds()

    # -- what they stand on ----------------------------------------------------------------------

    def objective(self) -> Objective:
        """Compute loss and judgement of the current batch."""
        logits = self.logits(self._current)
        loss, nll = batch_loss(self._current, logits)
        with torch.no_grad():
            holds = settled(self._current, logits, nll.detach(), self.settings.stop_loss)
        return Objective(loss, holds)

    def logits(self, batch: TrainingBatch) -> Tensor:
        """Return the logits (n, vocabulary) at a batch's positions, as the model stands."""
        resumed = self._resumed.get(id(batch))
        if resumed is None:
            return run(self.model, batch.prompts)
        with self.model.prompts(batch.prompts.ends):
            return resumed.logits()

    def record(self, batches: Sequence[TrainingBatch]) -> None:
        """Run batches once, so that later passes run only what lies above; before any step."""
        if self._above is None or (self._above.layer == 0 and not self._above.known):
            return
        if not pads(self.model):  # one row at a time: nothing to resume together
            return
        for batch in batches:
            size = self._bytes(batch.prompts)
            if id(batch) in self._resumed or size > self._room:
                continue
            self._room -= size
            prompts = batch.prompts
            with self.model.prompts(prompts.ends):
                self._resumed[id(batch)] = Resumed(
                    self.model,
                    prompts.inputs,
                    layer=self._above.layer,
                    rows=prompts.rows,
                    columns=prompts.columns,
                    known=self._above.known,
                )

    @torch.no_grad()
    def holding(self) -> list[bool]:
        """Say for each request of all batches, in order, whether it holds as the model stands."""
        found = []
        for batch in self.batches:
            logits = self.logits(batch)
            _, nll = batch_loss(batch, logits)
            found += settled(batch, logits, nll, self.settings.stop_loss)
        return found

    def holds(self) -> bool:
        """Say whether every request holds as the model stands."""
        return all(self.holding())

    # -- the loop --------------------------------------------------------------------------------

    def fit(self, parameters: Sequence[Tensor]) -> None:
        """Train leaves of the graph until the requests hold, or for the steps that were set.

        Raises `EditFailed` when the loss is no longer finite.
        """
        self.record(self.batches)
        deep = self.settings.order == "depth-first"
        groups = [[batch] for batch in self.batches] if deep else [self.batches]
        generator = torch.Generator().manual_seed(self.settings.seed)
        for number, group in enumerate(groups, 1):
            which = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
            self._fit(group, parameters, generator, f"{self._text}{which}")

    def _fit(
        self,
        group: Sequence[TrainingBatch],
        parameters: Sequence[Tensor],
        generator: torch.Generator,
        text: str,
    ) -> None:
        settings = self.settings
        optimiser = self.optimiser = self.optimiser_for(parameters)
        scale = loss_scale(self.model)
        passed, idle = [False] * len(group), 0
        total = settings.steps * len(group)
        order: list[int] = []
        for step in self.model.progress.track(range(1, total + 1), text, total):
            order = order or torch.randperm(len(group), generator=generator).tolist()
            index = order.pop()
            self._current = group[index]
            found = self.compute()
            self._check(found.loss, step)
            passed[index] = all(found.holds)
            if settings.early_stop and self.certain and passed[index]:
                idle += 1
                if not order and idle >= len(group):  # a whole pass, and nothing to be learnt
                    break
                continue
            idle = 0
            gradients = torch.autograd.grad(found.loss * scale, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = None if gradient is None else gradient / scale
            optimiser.step()
            self.updated(step)
            optimiser.zero_grad()
            if settings.early_stop and not self.certain and all(passed) and self.finished(step):
                break
        logger.debug("%s: %d steps, last loss %.4g", text, len(self.losses), self.losses[-1])

    def _check(self, loss: Tensor, step: int) -> None:
        value = float(loss.detach())
        self.losses.append(value)
        if not math.isfinite(value):
            half = self.model.dtype == torch.float16
            narrow = (
                ", or load the model in bf16 or fp32 (fp16's gradients overflow)" if half else ""
            )
            raise EditFailed(
                f"The training loss is {value} at step {step} with lr={self.settings.lr:g}: give "
                f"a smaller lr{narrow}."
            )

    def _bytes(self, prompts: PreparedPrompts) -> int:
        """Return about how much memory recording a batch takes."""
        assert self._above is not None
        anatomy, module = self.model.anatomy, self.model.module
        widths = [anatomy.hidden_size]
        for name in self._above.known:
            try:
                widths.append(anatomy.shape(module, name)[0])
            except (AttributeError, TypeError, ValueError):  # a container, such as attention
                widths.append(anatomy.hidden_size)
        tokens = max(value.numel() for value in prompts.inputs.values())
        return tokens * sum(widths) * self.model.dtype.itemsize
