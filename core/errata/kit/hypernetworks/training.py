"""The training of a network that edits: steps, validation, early stop, and going on after a kill.

Each step takes one lesson: B requests, each edited by itself, then asked. Everything random is
drawn from generators that the seed and the step's number seed, and the state is kept whenever the
network is validated. So a training that was killed goes on to the same network, bit for bit; and
one with more `steps` goes on from one with fewer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.edits.rendering import rendered
from errata.errors import ConfigError
from errata.kit.hypernetworks.batches import BatchCache, RequestBatch, seeded
from errata.kit.hypernetworks.factors import Factors
from errata.kit.hypernetworks.lessons import Answered, Locality
from errata.kit.hypernetworks.signals import Signals, check_says_something
from errata.model.forward import frozen

if TYPE_CHECKING:
    from torch import Tensor

    from errata.edits.request import Request
    from errata.kit.hypernetworks.settings import NetworkConfig
    from errata.model.model import Model

Validation = Mapping[str, float]
"""What a validation measures: edit (nats), success, locality (KL, nats), kept."""


class EditingNetwork(nn.Module, ABC):
    """A network that edits, and what it is trained for; a method's own.

    Attributes:
        extra: rows of factors that it gives each request besides those of its signal.
        origin: name of its artifact → SHA-256 of that file; empty before it is trained.
    """

    extra = 0
    origin: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def forward(self, signals: Signals) -> dict[str, Factors]:
        """Return the change of each matrix for each request."""

    @abstractmethod
    def objective(self, answered: Answered) -> Tensor:
        """Return the loss of one step."""

    @abstractmethod
    def optimisers(self) -> list[torch.optim.Optimizer]:
        """Return what trains its parameters."""

    def begin(self, signals: Iterable[Signals], trial: Callable[[], float]) -> None:
        """Act before the first step, such as taking statistics of the training requests.

        Args:
            signals: of all training requests, a batch at a time. They are computed as they are
                asked for: go through them once. (A request that cannot be learnt from is found
                here, and not hours later.)
            trial: returns the objective of the network as it stands, on the first requests.
        """
        for _ in signals:
            pass

    def rate(self, step: int) -> float:
        """Return what the learning rates are multiplied with in a step, counted from 0."""
        del step
        return 1.0

    def stepped(self) -> None:
        """Act after each step of the optimisers."""

    def validated(self, found: Validation) -> None:
        """Act after a validation, such as tightening a margin."""

    def badness(self, found: Validation) -> float:
        """Return the number by which the best network is chosen: lower is better."""
        return found["loss"]


class NetworkTraining:
    """Trains a network that edits.

    Args:
        model: the model, with every edit off.
        name: of the method, for progress.
        editing: the network; trained in place.
        modules: paths of the edited modules.
        requests: what is trained on; a part is held out for validation.
        config: the hyper-parameters.
        state: artifact key of the training's state.

    Attributes:
        curve: one entry per validation: step, loss (of the steps since the last one), and what it
            measured.
        best: the step after which the network was best; that network is kept.
    """

    def __init__(
        self,
        model: Model,
        name: str,
        editing: EditingNetwork,
        modules: Sequence[str],
        requests: Sequence[Request],
        config: NetworkConfig,
        state: tuple[str, ...],
    ) -> None:
        self._model, self._name, self._editing = model, name, editing.to(model.device)
        self._modules, self._config, self._state = modules, config, state
        self.curve: list[dict[str, float]] = []
        self.best = 0
        self._best: dict[str, Tensor] = {}
        self._lowest: float | None = None
        asked = rendered(model, list(requests))
        training, held_out = _split(asked, config.validation, config.seed)
        _check_locality(training, config.locality)
        for request in asked:
            check_says_something(request)
        self._batches = RequestBatch.split("group", training, config.batch_size)
        self._held_out = RequestBatch.split("held out", held_out, config.batch_size)
        self._cache = BatchCache(model, modules, training, self._batches[0], config)
        self._optimisers: list[torch.optim.Optimizer] = []

    def run(self) -> dict[str, Tensor]:
        """Train until the steps are done or validation stops improving; return the best state."""
        config, editing = self._config, self._editing
        with frozen(self._model.module), torch.enable_grad():
            done = self._resume()
            if done is None:
                done = 0
                self._name_shorter()
                every = self._model.progress.track(self._batches, "Gradients of the requests")
                editing.begin(map(self._cache.signals, every), self._trial)
                self._optimisers = editing.optimisers()
            rates = [[group["lr"] for group in o.param_groups] for o in editing.optimisers()]
            losses: list[float] = []
            text, left = f"Training {self._name}", range(done, config.steps)
            for step in self._model.progress.track(left, text, len(left)):
                if self._exhausted(step):
                    break
                losses.append(self._step(step, rates))
                last = step + 1 == config.steps
                if (step + 1) % config.validate_every == 0 or last:
                    self._validate(step + 1, losses)
                    losses = []
                    if (step + 1) % config.validate_every == 0:
                        self._save(step + 1)
        return self._best

    def _name_shorter(self) -> None:
        """Say which variants are trained for far fewer steps, where there are any."""
        most, variants = self._config.steps / 20, self._config.variants.items()
        steps = {name: sets["steps"] for name, sets in variants if sets.get("steps", most) < most}
        if steps:
            shorter = ", ".join(f"--set variant={name} ({n:,} steps)" for name, n in steps.items())
            self._model.progress.note(
                f"{self._name} is trained for {self._config.steps:,} steps. Far fewer: {shorter}"
            )

    # -- a step ----------------------------------------------------------------------------------

    def _step(self, step: int, rates: Sequence[Sequence[float]]) -> float:
        config, editing = self._config, self._editing
        epoch, place = divmod(step, len(self._batches))
        order = torch.randperm(len(self._batches), generator=self._generator("epoch", epoch))
        batch = self._batches[int(order[place])]
        lesson = self._cache.lesson(batch)
        drawn = lesson.draw(
            self._generator("step", step),
            prompt_share=config.prompt_share,
            n_locality=config.n_locality,
            views=config.views,
        )
        loss = editing.objective(lesson.ask(editing(self._cache.signals(batch)), drawn))
        loss.backward()  # type: ignore[no-untyped-call]  # the model is frozen
        norm = nn.utils.clip_grad_norm_(editing.parameters(), config.clip or math.inf)
        if bool(torch.isfinite(norm)):  # as published, a step with another gradient is skipped
            for optimiser, bases in zip(self._optimisers, rates, strict=True):
                for param_group, base in zip(optimiser.param_groups, bases, strict=True):
                    param_group["lr"] = base * editing.rate(step)
                optimiser.step()
            editing.stepped()
        editing.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def _validate(self, step: int, losses: Sequence[float]) -> None:
        totals: dict[str, float] = {}
        for batch in self._held_out:
            found = self._asked(batch)
            values = {
                "loss": float(self._editing.objective(found)),
                "edit": float(found.edit.mean()),
                "success": float(found.holds.float().mean()),
                "locality": float(found.locality),
                "kept": found.kept,
            }
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + value * len(batch.requests)
        n = sum(len(batch.requests) for batch in self._held_out)
        measured = {name: value / n for name, value in totals.items()}
        trained = sum(losses) / max(len(losses), 1)
        self.curve.append({"step": step, "training_loss": trained, **measured})
        badness = self._editing.badness(measured)
        if not all(map(math.isfinite, (trained, badness, *measured.values()))):
            raise ConfigError(
                f"The training of {self._name} diverged: at step {step} the loss is {trained:g}, "
                f"on what is held out {badness:g}. Give a smaller lr."
            )
        if self._lowest is None or badness < self._lowest:
            self._lowest, self.best = badness, step
            now = self._editing.state_dict().items()
            self._best = {name: tensor.detach().clone() for name, tensor in now}
        self._editing.validated(measured)
        self._model.progress.note(
            f"{self._name}, step {step}: loss {trained:.3f}; of {n} held out, edit "
            f"{measured['edit']:.3f} nats, success {measured['success']:.2f}, KL "
            f"{measured['locality']:.3f} nats, kept {measured['kept']:.2f}"
        )

    def _trial(self) -> float:
        losses = []
        with torch.no_grad():
            for batch in self._batches[:2]:
                losses.append(float(self._editing.objective(self._asked(batch))))
        return sum(losses) / len(losses)

    def _asked(self, batch: RequestBatch) -> Answered:
        """Return what comes of a batch's lesson with the network as it stands.

        It asks what the steps ask: the requests' own prompts alone where the steps ask no other.
        """
        own, lesson = self._config.prompt_share == 1, self._cache.lesson(batch)
        return lesson.ask(self._editing(self._cache.signals(batch)), lesson.phrasings(own=own))

    def _exhausted(self, step: int) -> bool:
        patience = self._config.patience
        return patience is not None and bool(self.curve) and step - self.best >= patience

    def _generator(self, *what: object) -> torch.Generator:
        return seeded(self._config.seed, *what)

    # -- its state -------------------------------------------------------------------------------

    def _save(self, step: int) -> None:
        """Keep everything that the next step depends on, and the best network so far."""
        tensors = {f"now.{n}": t for n, t in self._editing.state_dict().items()}
        tensors |= {f"best.{n}": t for n, t in self._best.items()}
        for number, optimiser in enumerate(self._optimisers):
            for index, values in optimiser.state_dict()["state"].items():
                for key, value in values.items():
                    if value is not None:
                        tensors[f"optimiser.{number}.{index}.{key}"] = torch.as_tensor(value)
        about = {"step": step, "curve": self.curve, "best": self.best, "lowest": self._lowest}
        self._model.artifacts.save(self._state, tensors, about)

    def _resume(self) -> int | None:
        """Go back to the state that was kept; return its step, None where there is none."""
        stored = self._model.artifacts.load(self._state)
        if stored is None or int(stored[1]["step"]) > self._config.steps:
            return None
        tensors, about = stored
        now = _part(tensors, "now")
        if shapes_of(now) != shapes_of(self._editing.state_dict()):
            return None  # of a version whose network had other shapes
        self._editing.load_state_dict(now)
        self._optimisers = self._editing.optimisers()
        for number, optimiser in enumerate(self._optimisers):
            state: dict[int, dict[str, Any]] = {}
            for name, value in _part(tensors, f"optimiser.{number}").items():
                index, key = name.split(".", 1)
                state.setdefault(int(index), {})[key] = value
            optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
        self._best = _part(tensors, "best")
        self.curve, self.best = list(about["curve"]), int(about["best"])
        self._lowest = about["lowest"]
        self._model.progress.note(f"{self._name}: going on after step {about['step']}")
        return int(about["step"])


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Return the shape of each tensor: whether a state fits a network shows in it."""
    return {name: tensor.shape for name, tensor in state.items()}


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    begin = f"{name}."
    return {n.removeprefix(begin): tensor for n, tensor in tensors.items() if n.startswith(begin)}


def _split(requests: list[Request], n: int, seed: int) -> tuple[list[Request], list[Request]]:
    """Return (training, held out): about other subjects, in a random order."""
    n_subjects = len({request.subject for request in requests})
    if n_subjects < 2:
        raise ConfigError(
            f"Training needs requests about two subjects at least, one of them to validate on; "
            f"{len(requests)} about {n_subjects} were given."
        )
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed)).tolist()
    mixed = [requests[index] for index in order]
    held_out = mixed[: max(1, min(n, len(mixed) // 5))]
    subjects = list(dict.fromkeys(request.subject for request in held_out))
    if len(subjects) > n_subjects - 2:  # many requests about few: most of these are learnt from
        subjects = subjects[: max(1, n_subjects // 5)]
    aside = set(subjects)
    training = [request for request in mixed if request.subject not in aside]
    return training, [request for request in held_out if request.subject in aside]


def _check_locality(training: Sequence[Request], locality: Locality) -> None:
    """Raise `ConfigError` where nothing is known that an edit must leave alone."""
    several = len({request.subject for request in training}) > 1
    beside = locality == "neighbours" and any(r.neighbourhood or r.locality for r in training)
    if not several and not beside:
        raise ConfigError(
            f"Training requests about one subject are left ({len(training)}) when those to "
            "validate on are taken away, and nothing says what an edit must leave alone: give "
            "requests about three subjects at least, or with neighbours and locality='neighbours'."
        )
