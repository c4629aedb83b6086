"""Writing one edit into a shard.

    L = NLL + L_a
    L_a = [Δ_out − α]₊ + [β − Δ_in]₊ + [γ − (Δ_in − Δ_out)]₊

Δ_in of the edit's prompt in eleven contexts, Δ_out of a text it has nothing to do with; each term
is averaged over its positive entries. Plain gradient descent on the entries of a random mask, which
is drawn once for each shard.

As in EasyEdit's code, by the authors, but: distances are taken over the prompt's tokens in training
as they are when rows are told apart (theirs: with the target, and anew at each decoded token); the
weight decay acts on the difference, so entries outside the mask stay W's, bit for bit; the other
text comes from a corpus and not from what locality is measured on; an edit's distance is the least
of its contexts', as the paper says (theirs: the mean, below which the bare prompt may fall); the
NLL is the mean over the target's tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from errata.errors import EditFailed
from errata.kit.contexts import in_contexts, prefix_contexts
from errata.kit.feed_forward import activation_of
from errata.kit.loss_scale import loss_scale
from errata.kit.second_moments import documents_of
from errata.kit.training import Trainer, TrainerSettings, above, target_batches
from errata.kit.training.training_batches import batch_loss
from errata.model.forward import frozen, patched, trace
from errata.model.running import prepare, run
from errata_wise.delta import ShardDelta, SideMemories, activation, packed
from errata_wise.memories import Settings, moved, over_prompt

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.training import TrainingBatch
    from errata.model import Model
    from errata.model.prompts import PreparedPrompts
    from errata_wise.config import WiseConfig

logger = logging.getLogger("errata")

_STARTS = ("I", "You", "Because", "Yes", "Q: ")
_WORDS = 24  # of the other text
_PLAIN = "silu"  # φ where the model's own has no name, such as xIELU with its parameters


def contexts(model: Model, config: WiseConfig) -> tuple[str, ...]:
    """Return the bare context and greedy continuations of five beginnings."""
    lengths = [(length, len(_STARTS)) for length in config.context_lengths]
    return prefix_contexts(model, lengths, starts=_STARTS, seed=config.seed, top_k=1)


def edit(model: Model, request: Request, config: WiseConfig) -> ShardDelta:
    """Return what one request adds to the shard that is being written.

    Raises:
        EditFailed: the loss is no longer finite.
    """
    written = config.for_model(model.anatomy)
    assert written.layer is not None
    module = model.anatomy.mlp_out(written.layer)
    settings = Settings(
        module, activation_of(model, written.layer) or _PLAIN, config.ratio, config.save_every,
        config.merge_every, config.density, config.clip,
    )  # fmt: skip
    held = SideMemories.of(model)
    earlier = [d for _, d in model.active(ShardDelta.kind) if d.settings == settings]
    number = 1 + max((delta.number for delta in earlier), default=-1)
    index = number // config.save_every
    rows, columns = model.anatomy.shape(model.module, module)
    shard = held.shards(settings, (rows, columns)).shard(earlier, index)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    mask = torch.rand(rows, columns, generator=generator) < config.mask_ratio
    locality = other_text(model, config.seed + number)
    with held.aside(), frozen(model.module):
        writing = Writing(model, request, config, settings, locality)
        with torch.enable_grad():
            after = writing.fit(shard, mask)
        distance = float(writing.distances(after)[0].min())
    difference = (after - shard.to(after)).cpu()
    return ShardDelta(
        settings, number, distance, packed(mask), difference[mask], (rows, columns), locality
    )


def other_text(model: Model, seed: int) -> str:
    """Return the beginning of a document drawn from the corpus."""
    documents = documents_of(model)
    generator = torch.Generator().manual_seed(seed)
    drawn = documents[int(torch.randint(len(documents), (1,), generator=generator))]
    return " ".join(drawn.split()[:_WORDS])


class Writing:
    """One edit in training.

    Args:
        model: the model, with no side memory acting.
        request: the edit.
        config: the hyper-parameters.
        settings: of the side memory.
        locality: the other text.
    """

    def __init__(
        self,
        model: Model,
        request: Request,
        config: WiseConfig,
        settings: Settings,
        locality: str,
    ) -> None:
        self._model, self._config, self._module = model, config, settings.module
        self._text, self._φ = request.text, activation(settings)
        prompts = [
            request.filled(text) for text in in_contexts(model, request, contexts(model, config))
        ]
        (batch,) = target_batches(model, [(prompt, request.target) for prompt in prompts])
        self._batch: TrainingBatch = batch
        self._x, self._before = self._observed(batch.prompts)
        other = prepare(model, [locality])
        self._other = self._observed(other)
        self._others_end = other.ends[0]
        self._trainer = Trainer(
            model, [batch], TrainerSettings(lr=config.lr, steps=config.steps),
            above=above(model, [settings.module]),
        )  # fmt: skip

    def distances(self, d: Tensor) -> tuple[Tensor, Tensor]:
        """Return Δ_in (rows) and Δ_out (1) under a shard's difference (d, D)."""
        tokens = moved(self._before, self._before + self._x @ d.T, self._φ)
        ends = self._batch.prompts.ends
        inside = torch.stack([over_prompt(tokens[r, : end + 1]) for r, end in enumerate(ends)])
        x, before = self._other
        there = moved(before, before + x @ d.T, self._φ)[0, : self._others_end + 1]
        return inside, over_prompt(there)[None]

    def loss(self, d: Tensor) -> Tensor:
        """Return L under a shard's difference."""
        config = self._config
        with patched(self._model.module, {self._module: self._through(d)}):
            logits = self._trainer.logits(self._batch)
        nll, _ = batch_loss(self._batch, logits)
        Δ_in, Δ_out = self.distances(d)
        terms = (Δ_out - config.alpha, config.beta - Δ_in, config.gamma - (Δ_in - Δ_out))
        return nll + sum(_positive_mean(term) for term in terms)

    def fit(self, start: Tensor, mask: Tensor) -> Tensor:
        """Return a shard's difference after training, starting from what it was."""
        config = self._config
        d = start.to(self._x.device, copy=True).requires_grad_()
        m = mask.to(d)
        scale = loss_scale(self._model)
        with patched(self._model.module, {self._module: self._through(d)}):
            self._trainer.record([self._batch])
        former = float("inf")
        step, value = 0, former
        for step in range(1, config.steps + 1):
            loss = self.loss(d)
            value = float(loss.detach())
            if not torch.isfinite(loss):
                raise EditFailed(
                    f"The loss of {self._text!r} became {value} at step {step}: give a smaller lr "
                    f"({config.lr:g})."
                )
            if value <= config.stop_loss and abs(former - value) <= config.stop_change:
                break
            former = value
            (gradient,) = torch.autograd.grad(loss * scale, d)
            with torch.no_grad():
                d -= config.lr * m * (gradient / scale + config.weight_decay * d)
                d.clamp_(-config.clip, config.clip)
        logger.info("a shard was written in %d steps, loss %.3g", step, value)
        return d.detach()

    def _through(self, d: Tensor) -> Callable[[Tensor], Tensor]:
        """Return what turns the module's output into the shard's."""

        def change(output: Tensor) -> Tensor:
            added = self._x @ d.T
            return (output + added.view(output.shape)).to(output.dtype)

        return change

    @torch.no_grad()
    def _observed(self, prompts: PreparedPrompts) -> tuple[Tensor, Tensor]:
        """Return the module's inputs (B, T, D) and outputs (B, T, d), fp32."""
        with trace(self._model.module, self._module, inputs=True, detach=True, stop=True) as seen:
            run(self._model, prompts)
        x, y = seen[self._module].input, seen[self._module].output
        assert x is not None
        assert y is not None
        size = len(prompts)
        return x.reshape(size, -1, x.shape[-1]).float(), y.reshape(size, -1, y.shape[-1]).float()


def _positive_mean(term: Tensor) -> Tensor:
    """Return the mean over the positive entries; 0 where there are none."""
    positive = term > 0
    return (term * positive).sum() / positive.sum().clamp_min(1)
