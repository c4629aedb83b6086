"""Training one adapter: the objective on the target tokens, the rank allocation, the early stop."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from errata.delta.adapter_layers import no_randomness
from errata.delta.adapter_training import Training, training
from errata.errors import ConfigError
from errata.evaluate import scoring
from errata.forward import logits_at
from errata_adalora.targets import resolve

if TYPE_CHECKING:
    from torch import Tensor

    from errata.delta import AdapterDelta
    from errata.evaluate.scoring import Scored
    from errata.model import Model
    from errata.request import Request
    from errata_adalora.config import AdaloraConfig

logger = logging.getLogger("errata.adalora")
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "encoder": None}


@dataclass
class Objective:
    """The loss of one batch, as PEFT wants it: an object with `.loss` that it adds to.

    Attributes:
        loss: mean over requests of the mean negative log-likelihood (nats) of the target's tokens;
            the prompt's tokens are read and not scored.
        exact: every target token was the most probable one.
    """

    loss: Tensor
    exact: bool


def train(model: Model, requests: Sequence[Request], config: AdaloraConfig) -> AdapterDelta:
    """Train one adapter for all requests on top of the active edits, and return it.

    Raises `ConfigError` for a schedule without room, for unknown modules, and when the loss is no
    longer finite.
    """
    from peft import AdaLoraConfig

    modules = resolve(model, config)
    size = config.batch_size
    parts = [requests[i : i + size] for i in range(0, len(requests), size)]
    batches = [
        scoring.prepare(model, [r.text for r in part], [r.target_new for r in part])
        for part in parts
    ]
    total, tinit, tfinal = config.schedule(len(batches))
    peft_config = AdaLoraConfig(
        task_type=TASKS[model.anatomy.kind],
        init_r=config.init_rank,
        target_r=config.target_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        total_step=total,
        tinit=tinit,
        tfinal=tfinal,
        deltaT=config.delta_t,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_weight,
        fan_in_fan_out=model.anatomy.transposed(modules[0]),
    )
    trainer = Trainer(model, config, batches)
    with (
        no_randomness(config.seed),
        torch.enable_grad(),
        training(model, peft_config, modules, trainer.objective) as run,
    ):
        trainer.fit(run, total)
    delta = run.extract()
    logger.debug("adapter of ranks %s after %d steps", delta.ranks, trainer.done)
    return delta


class Trainer:
    """Fits an adapter to batches, allocating ranks at every step.

    With early stop, the schedule of PEFT is followed until the requests hold; then the budget is
    cut to its target at once, and the steps that are left fine-tune what remains until the
    requests hold again. So an adapter never keeps more rank than its target, whenever it stops.
    """

    def __init__(self, model: Model, config: AdaloraConfig, batches: Sequence[Scored]) -> None:
        self._model = model
        self._config = config
        self._batches = batches
        self._batch = batches[0]
        self.done = 0

    def objective(self) -> Objective:
        """Compute the loss of the current batch. PEFT adds the orthogonal regularisation."""
        batch = self._batch
        with self._model.prompts(batch.ends):
            logits = logits_at(self._model, batch.inputs, batch.rows, batch.columns)
        labels = batch.labels.to(logits.device)
        counts = torch.tensor(batch.counts, device=logits.device)
        # Each request counts the same, whatever the length of its target.
        weights = (1.0 / (counts * len(counts))).repeat_interleave(counts)
        nll = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        exact = bool((logits.argmax(dim=-1) == labels).all())
        return Objective((nll * weights).sum(), exact)

    def fit(self, run: Training, total: int) -> None:
        """Train for at most `total` steps."""
        tuner: Any = run.peft_model.base_model
        schedule: Any = run.peft_model.peft_config["default"]
        optimiser = torch.optim.Adam(
            run.parameters, lr=self._config.lr, weight_decay=self._config.weight_decay
        )
        exact: list[bool] = []
        for step in self._model.progress.track(range(1, total + 1), "Training an adapter", total):
            self._batch = self._batches[self._choose(step)]
            run.dropout(True)
            result = run.peft_model()
            if not math.isfinite(result.loss.item()):
                raise ConfigError(
                    f"AdaLoRA's loss is {result.loss.item()} at step {step} with "
                    f"lr={self._config.lr:g}: give a smaller lr."
                )
            result.loss.backward(inputs=run.parameters)
            optimiser.step()
            tuner.update_and_allocate(step)  # reads the gradients
            optimiser.zero_grad()
            self.done = step
            # The forward before the update is a hint that costs nothing; asking costs a pass.
            exact = [*exact, result.exact][-len(self._batches) :]
            seen_all = len(exact) == len(self._batches) and all(exact)
            if not (self._config.early_stop and seen_all and step > schedule.tinit):
                continue
            if step < total - schedule.tfinal and self._holds(run):
                schedule.tfinal = total - step  # this step is the last of the budget phase
                tuner.update_and_allocate(step)
            if step >= total - schedule.tfinal and self._holds(run):
                break
        run.dropout(False)

    def _choose(self, step: int) -> int:
        """Return the batch of a step: a new random order for every pass."""
        index = (step - 1) % len(self._batches)
        if index == 0:
            self._order = torch.randperm(len(self._batches)).tolist()
        return int(self._order[index])

    @torch.no_grad()
    def _holds(self, run: Training) -> bool:
        """Say whether every request has taken effect, without dropout."""
        run.dropout(False)
        limit = self._config.stop_loss or math.inf
        scores = [score for batch in self._batches for score in scoring.run(self._model, batch)]
        return all(score.exact and score.mean_nll < limit for score in scores)
