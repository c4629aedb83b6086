"""Training SERAC's two networks in one loop (Mitchell et al. 2022b, section 3.3).

    L = c_edit · NLL(h(zᵢ, xᵢ)) + c_loc · [ mean −log g(zᵢ, xᵢ) + mean −log(1 − g(zᵢ, x̄ᵢ)) ]

for edits zᵢ, prompts xᵢ in their scope (the edit's own or a paraphrase; h reads the right edit, not
the retrieved one) and prompts x̄ᵢ outside. The variant "mixture" has no supervision of g:

    L = c_edit · NLL(m(zᵢ, xᵢ)) + c_loc · KL(f ‖ m) at x̄ᵢ        m = (1 − g) f + g h

Each batch is drawn by a generator that the seed and the batch's number seed, and all that is
trained is saved with Adam's moments now and then: a run that was killed goes on to the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from errata.edits.rendering import rendered
from errata.errors import ConfigError
from errata.model.chat import user_turn
from errata.model.forward import frozen
from errata.model.running import prepare, run
from errata_serac.counterfactual import new_lora, read_with, switched_on
from errata_serac.delta import mixed_log_probs
from errata_serac.scope import log_outside, scope_of

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.model import Model
    from errata_serac.config import SeracConfig
    from errata_serac.scope import Edit

_SAVED_EVERY = 50
"""Batches between two saves of an unfinished run."""


class ScopeLesson(NamedTuple):
    """One training request: the edit, prompts in its scope, and hard ones that are not."""

    edit: Edit
    inside: list[str]
    hard: list[str]


class Example(NamedTuple):
    """One row of a batch: an edit, a prompt in its scope, one outside."""

    edit: Edit
    inside: str
    outside: str


def train(
    model: Model, training: Sequence[Request], config: SeracConfig, unfinished: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the trained tensors ("scope/…", "lora/…") and the curve of validation losses.

    Args:
        model: the unedited model.
        training: requests to learn from.
        config: the hyper-parameters.
        unfinished: key under which a run that was killed is kept.

    Raises `ConfigError` for too few requests, and where all ask the same: then nothing is outside
    an edit's scope.
    """
    if not training:
        raise ConfigError(
            "SERAC's networks for this model and configuration are lost or damaged. Train them "
            "again on their requests: `errata prepare serac --training NAME=PATH`."
        )
    lessons = lessons_of(rendered(model, training[: config.records]))
    held_out = lessons[: max(1, min(config.validation, len(lessons) // 10))]
    learnt = lessons[len(held_out) :]
    if len({lesson.edit[0] for lesson in learnt}) < 2:
        raise ConfigError(
            f"{len(lessons)} training requests, without the first {len(held_out)} to validate on, "
            f"all ask {learnt[0].edit[0]!r}: nothing would be outside an edit's scope. Give "
            "requests about two subjects at least."
        )
    return SeracTraining.begin(model, config, learnt, held_out).to_end(unfinished)


def lessons_of(training: Sequence[Request]) -> list[ScopeLesson]:
    """Return what can be learnt of training requests; of those that only erase, nothing."""
    lessons = []
    for request in training:
        if not request.target_new:
            continue
        hard = [probe.prompt for probe in (*request.neighbourhood, *request.locality)]
        edit = (request.plain.text, request.target_new)
        lessons.append(ScopeLesson(edit, [request.text, *request.paraphrases], hard))
    if len(lessons) < 4:
        raise ConfigError(
            f"{len(lessons)} training requests that say something are too few: give 4 or more."
        )
    return lessons


@dataclass
class SeracTraining:
    """One training run.

    Attributes:
        model: the unedited model.
        config: the hyper-parameters.
        lessons, held_out: what is learnt from, and what is kept aside to validate on.
        scope, lora: the two networks.
        tensors: all that is trained, "scope/…" and "lora/…".
    """

    model: Model
    config: SeracConfig
    lessons: list[ScopeLesson]
    held_out: list[ScopeLesson]
    scope: Any
    lora: dict[str, Tensor]
    tensors: dict[str, Tensor]

    @classmethod
    def begin(
        cls,
        model: Model,
        config: SeracConfig,
        lessons: list[ScopeLesson],
        held_out: list[ScopeLesson],
    ) -> SeracTraining:
        """Return a run before its first batch."""
        scope = scope_of(model, config)
        lora = new_lora(model, config.rank, config.target_modules, config.layers, config.seed)
        tensors = {
            **{f"scope/{name}": tensor for name, tensor in scope.trained.items()},
            **{f"lora/{name}": tensor for name, tensor in lora.items()},
        }
        return cls(model, config, lessons, held_out, scope, lora, tensors)

    def to_end(self, unfinished: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Train until nothing gets better, or the steps are over."""
        model, config = self.model, self.config
        for tensor in self.tensors.values():
            tensor.requires_grad_(True)
        adam = torch.optim.Adam(list(self.tensors.values()), lr=config.lr)
        best, curve, begin = self._resume(unfinished, adam)
        steps = range(begin, config.steps)
        tracked = model.progress.track(steps, "Training SERAC", len(steps))
        with frozen(model.module), torch.enable_grad():
            for step in tracked:
                loss = self.loss(
                    self.batch(self.lessons, f"{config.seed} {step}", config.batch_size)
                )
                (loss / config.accumulate).backward()  # type: ignore[no-untyped-call]
                last = step + 1 == config.steps
                if (step + 1) % config.accumulate == 0 or last:
                    torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), config.clip)
                    adam.step()
                    adam.zero_grad()
                if (step + 1) % config.validate_every == 0 or last:
                    curve.append([step + 1, self.validated()])
                    if curve[-1][1] <= min(value for _, value in curve):
                        best = self._copy()
                    batch, validated = curve[-1]
                    model.progress.note(f"SERAC, batch {batch}: validation loss {validated:.4f}")
                    at = min(curve, key=lambda point: point[1])[0]
                    if step + 1 - at >= config.patience:
                        break
                if (step + 1) % (_SAVED_EVERY * config.accumulate) == 0:
                    self._save(unfinished, adam, best, curve, step + 1)
        for tensor in self.tensors.values():
            tensor.requires_grad_(False)
        model.artifacts.path(unfinished).unlink(missing_ok=True)
        about = {
            "config": config.model_dump(mode="json"), "start": self.scope.start, "curve": curve,
            "lessons": len(self.lessons),
        }  # fmt: skip
        return best, about

    # -- losses ----------------------------------------------------------------------------------

    def batch(self, lessons: Sequence[ScopeLesson], seed: str, size: int) -> list[Example]:
        """Draw a batch: prompts outside are the request's own neighbours, or another's prompts."""
        chance = random.Random(seed)
        rows = []
        for lesson in chance.sample(lessons, min(size, len(lessons))):
            other = chance.choice([o for o in self.lessons if o.edit[0] != lesson.edit[0]])
            hard = lesson.hard and chance.random() < self.config.hard_negatives
            outside = chance.choice(lesson.hard if hard else other.inside)
            rows.append(Example(lesson.edit, chance.choice(lesson.inside), outside))
        return rows

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """Return L of a batch."""
        edits, inside = [row.edit for row in rows], [row.inside for row in rows]
        within = self.scope.pairs(edits, self._said(inside))
        beyond = self.scope.pairs(edits, self._said([row.outside for row in rows]))
        config = self.config
        if config.variant == "mixture":
            answer, kept = self._mixture(rows, within, beyond)
            return config.edit_weight * answer + config.scope_weight * kept
        # −log g for what is in scope, −log(1 − g) for what is not, each a mean of its own.
        scope = -within.mean() - log_outside(beyond).mean()
        answers = self._answers(edits, inside).to(scope.device)
        loss: Tensor = config.edit_weight * answers + config.scope_weight * scope
        return loss

    def _said(self, prompts: Sequence[str]) -> list[str]:
        """Return what the scope classifier reads: in a chat, what the user says."""
        return [user_turn(self.model, prompt)[1] for prompt in prompts]

    def _answers(self, edits: Sequence[Edit], inside: Sequence[str]) -> Tensor:
        """Return the NLL per token of h(z, x) for the edits' labels, and for the end after them."""
        texts = [read_with(self.model, *pair) for pair in zip(edits, inside, strict=True)]
        end = self.model.tokenizer.eos_token if self.config.append_end else None
        batch = prepare(self.model, texts, [f"{label}{end or ''}" for _, label in edits])
        with switched_on(self.model, self.lora):
            logits = run(self.model, batch)
        return torch.nn.functional.cross_entropy(logits, batch.labels.to(logits.device))

    def _mixture(
        self, rows: Sequence[Example], within: Tensor, beyond: Tensor
    ) -> tuple[Tensor, Tensor]:
        answers, kept = [], []
        for row, inside, outside in zip(rows, within, beyond, strict=True):
            mix, ids = self._mix(row.inside, row.edit, inside)
            labels = torch.tensor(ids, device=mix.device)
            answers.append(torch.nn.functional.nll_loss(mix, labels))
            table, _ = self._mix(row.outside, row.edit, outside)
            with torch.no_grad():
                base = run(self.model, prepare(self.model, [row.outside], [row.edit[1]]))
            f = base.log_softmax(dim=-1)
            kept.append((f.exp() * (f - table)).sum(dim=-1).mean())
        return torch.stack(answers).mean(), torch.stack(kept).mean()

    def _mix(self, prompt: str, edit: Edit, log_g: Tensor) -> tuple[Tensor, list[int]]:
        return mixed_log_probs(self.model, self.lora, prompt, edit[1], edit, log_g)

    @torch.no_grad()
    def validated(self) -> float:
        """Return L on all that was kept aside, of the same draws each time."""
        rows = self.batch(self.held_out, "held out", len(self.held_out))
        size = self.config.batch_size
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return sum(len(part) * float(self.loss(part)) for part in parts) / len(rows)

    # -- a run that is killed goes on ------------------------------------------------------------

    def _copy(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.tensors.items()}

    def _save(
        self,
        key: tuple[str, ...],
        adam: torch.optim.Adam,
        best: Mapping[str, Tensor],
        curve: Sequence[Any],
        step: int,
    ) -> None:
        stored = {f"now/{n}": t for n, t in self._copy().items()}
        stored |= {f"best/{n}": t for n, t in best.items()}
        for name, tensor in self.tensors.items():
            state = adam.state[tensor]
            stored |= {f"m/{name}": state["exp_avg"], f"v/{name}": state["exp_avg_sq"]}
            stored[f"t/{name}"] = state["step"]
        self.model.artifacts.save(key, stored, {"step": step, "curve": list(curve)})

    def _resume(
        self, key: tuple[str, ...], adam: torch.optim.Adam
    ) -> tuple[dict[str, Tensor], list[Any], int]:
        """Return the best so far, the curve and the next batch of a run that was killed."""
        stored = self.model.artifacts.load(key)
        if stored is None:
            return self._copy(), [], 0
        found, about = stored
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(found[f"now/{name}"])
                adam.state[tensor] = {
                    "step": found[f"t/{name}"],
                    "exp_avg": found[f"m/{name}"],
                    "exp_avg_sq": found[f"v/{name}"],
                }
        best = {name: found[f"best/{name}"] for name in self.tensors}
        self.model.progress.note(f"SERAC: going on after batch {about['step']}")
        return best, list(about["curve"]), int(about["step"])
