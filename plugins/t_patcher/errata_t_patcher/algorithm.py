"""The patch of one request: its neurons, the three losses, and when training stops.

As in the authors' code (Transformer-Patcher @93ff458): number and start of the neurons, losses on
pre-activations, optimiser, schedule, stop. What differs: the memory is plain text of the base,
where theirs is the task's training set; the example runs once and not as eight equal rows, so the
worst pairs are counted once; both margins count (their BART path never hands them on). A neuron
of a gated network (Llama) is act(k·h + b) without a second projection: no form was published.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from errata.edits.delta.neurons import Neurons, NeuronsDelta, Site, hang
from errata.errors import EditFailed
from errata.kit.feed_forward import site_of
from errata.kit.loss_scale import loss_scale
from errata.kit.training import Trainer, TrainerSettings, above, target_batches
from errata.model.forward import frozen, trace
from errata.model.running import run
from errata_t_patcher.memory import remembered_states

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_t_patcher.config import TPatcherConfig

logger = logging.getLogger("errata")

_IMPROVED = 1e-3  # the least fall of the validation loss that counts


def patch(model: Model, request: Request, config: TPatcherConfig) -> NeuronsDelta:
    """Return the neurons that put a request right; none where the model says it already.

    Raises:
        EditFailed: the loss is no longer finite.
    """
    site = _site(model, config)
    (batch,) = target_batches(model, [(request.text, request.target)])
    labels = batch.prompts.labels.to(model.device)
    settings = TrainerSettings(lr=config.lr, steps=config.steps)
    trainer = Trainer(model, [batch], settings, above=above(model, [site.reads, site.writes]))
    with torch.no_grad(), trace(model.module, site.reads, inputs=True, outputs=False) as seen:
        logits = run(model, batch.prompts)
    read = seen[site.reads].input
    assert read is not None
    states = read.reshape(-1, read.shape[-1]).float()  # (t, d)
    wrong = (logits.argmax(-1) != labels).nonzero()[:, 0][: config.most]
    if not len(wrong):
        logger.info("%r is what the model says already: no neuron", request.target_new)
        return NeuronsDelta(site, _none(states.shape[1], model), states[1:].cpu())
    h = states[batch.prompts.columns.to(states.device)[wrong]]  # (n, d) one mistake a row
    training = PatchTraining(model, config, trainer, site, h, labels)
    with torch.enable_grad(), frozen(model.module):
        trainer.record([batch])
        neurons = training.fit()
    return NeuronsDelta(site, neurons, states[1:].cpu())


def memories(
    model: Model, config: TPatcherConfig, corpus: Sequence[str] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the states (M, d) to leave alone and those (m, d) held out, of plain text."""
    reads = _site(model, config).reads
    states = remembered_states(model, reads, config.memory + config.held_out, corpus)
    held_out = min(config.held_out, len(states) // 2)
    return states[held_out:], states[:held_out]


class PatchTraining:
    """The neurons of one request in training.

    Args:
        model: the model.
        config: the hyper-parameters.
        trainer: runs the example, from the patched block on.
        site: where the neurons are.
        h: (n, d) input of the network at each mistake.
        labels: target tokens.
    """

    def __init__(
        self,
        model: Model,
        config: TPatcherConfig,
        trainer: Trainer,
        site: Site,
        h: Tensor,
        labels: Tensor,
    ) -> None:
        self.config, self.trainer, self.site = config, trainer, site
        self.root, self.h, self.labels = model.module, h, labels
        earlier = [
            delta.states
            for _, delta in model.active(NeuronsDelta.kind)
            if isinstance(delta, NeuronsDelta) and delta.site.reads == site.reads
            if delta.states is not None
        ]
        kept = memories(model, config)
        self.memory, self.held_out = (torch.cat([part, *earlier]).to(h) for part in kept)
        n, d_out = len(h), model.anatomy.shape(model.module, site.writes)[0]
        generator = torch.Generator().manual_seed(config.seed)
        self.k = h / h.square().sum(dim=1, keepdim=True)  # so that k · h = 1
        self.b = h.new_zeros(n)
        self.v = torch.randn(n, d_out, generator=generator).to(h)
        self.a = torch.full_like(self.v, config.scale)

    def neurons(self) -> Neurons:
        """Return the neurons as they stand, a and v in one."""
        return Neurons(self.k, self.b, self.a * self.v)

    def losses(self, logits: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of task, activation and memory."""
        config = self.config
        p = (self.k * self.h).sum(dim=1) + self.b  # (n,) each at its own mistake
        p_mem = memory @ self.k.T + self.b  # (M, n)
        task = functional.cross_entropy(logits, self.labels, label_smoothing=config.label_smoothing)
        l_a = worst(config.activation_margin - p, config.activation_top)
        l_m1 = worst(p_mem - p + config.own_margin, config.memory_top)
        l_m2 = worst(p_mem - config.memory_margin, config.memory_top)
        return task, l_a, l_m1 + l_m2

    def fit(self) -> Neurons:
        """Train until the tokens are right and the held-out memory loss falls no further."""
        config = self.config
        leaves = [self.k, self.b, self.v, self.a]
        for leaf in leaves:
            leaf.requires_grad_()
        optimiser = torch.optim.Adam(leaves, lr=config.lr, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimiser, factor=0.5, patience=1, threshold=0.05
        )
        scale = loss_scale(self.trainer.model)
        best, best_loss, idle, right = self._copy(), float("inf"), 0, False
        for step in range(1, config.steps + 1):
            task, l_a, l_m = self.losses(self._logits(), self.memory)
            loss = task + config.activation_weight * l_a + config.memory_weight * l_m
            if not bool(torch.isfinite(loss)):
                raise EditFailed(
                    f"The loss of a patch became {float(loss)} at step {step}: lower lr "
                    f"({config.lr:g})."
                )
            optimiser.zero_grad()
            gradients = torch.autograd.grad(loss * scale, leaves)
            for leaf, gradient in zip(leaves, gradients, strict=True):
                leaf.grad = gradient / scale
            torch.nn.utils.clip_grad_norm_(leaves, config.clip)
            optimiser.step()
            if step < config.first_check or (step - config.first_check) % config.check_every:
                continue
            with torch.no_grad():
                logits = self._logits()
                _, _, held_out = self.losses(logits, self.held_out)
            now = torch.equal(logits.argmax(-1), self.labels)
            schedule.step(held_out)
            if now and (not right or float(held_out) < best_loss - _IMPROVED):
                best, best_loss, idle, right = self._copy(), float(held_out), 0, True
            elif right:
                idle += 1
            if idle > 1:
                break
        logger.info(
            "%d neurons after %d steps, held-out memory loss %.3g%s", len(self.h), step, best_loss,
            "" if right else ": the tokens are still wrong",
        )  # fmt: skip
        return best if right else self._copy()

    def _logits(self) -> Tensor:
        undo = hang(self.root, self.site, self.neurons())
        try:
            return self.trainer.logits(self.trainer.batches[0])
        finally:
            undo()

    def _copy(self) -> Neurons:
        found = self.neurons()
        return Neurons(
            *(t.detach().cpu().clone() for t in (found.keys, found.biases, found.values))
        )


def worst(r: Tensor, k: int) -> Tensor:
    """Return the mean of the k largest exp(r)."""
    return r.flatten().topk(min(k, r.numel())).values.exp().mean()


def _site(model: Model, config: TPatcherConfig) -> Site:
    layer = config.for_model(model.anatomy).layer
    assert layer is not None
    return site_of(model, layer)


def _none(d_in: int, model: Model) -> Neurons:
    return Neurons(torch.empty(0, d_in), torch.empty(0), torch.empty(0, model.anatomy.hidden_size))
