"""The preparation of methods: what they compute of the base, and what they are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import torch

from errata.edits.request import Request
from errata.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from errata.contract.config import MethodConfig
    from errata.contract.manager import Manager
    from errata.model.model import Model

_NAMED = 4  # settings that differ, in a message
_DIGITS = 12  # of a fact's digest: 100,000 facts collide with a chance of 2e-5


class TrainingSet(Sequence[Request]):
    """Requests to train on, read when they are asked for.

    Args:
        requests: any sequence of requests, also a lazy one.

    Attributes:
        facts: short digests of the facts (subject and relation, or prompt) in it.
        digest: SHA-256 over all requests.
    """

    def __init__(self, requests: Sequence[Request] = ()) -> None:
        given: Any = requests
        if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
            raise ConfigError(
                f"training is a {type(given).__name__}; give a sequence of requests, for "
                "example list(errata.datasets.load('zsre', path))."
            )
        self._requests = requests

    def __len__(self) -> int:
        return len(self._requests)

    @overload
    def __getitem__(self, index: int) -> Request: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Request]: ...

    def __getitem__(self, index: int | slice) -> Request | Sequence[Request]:
        if isinstance(index, slice):
            return TrainingSet([self[i] for i in range(*index.indices(len(self)))])
        return Request.parse(self._requests[index])

    def __iter__(self) -> Iterator[Request]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def facts(self) -> frozenset[str]:
        """Short digests of the facts in it."""
        return frozenset(name for request in self for name in _facts(request))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all requests, in order."""
        sha = hashlib.sha256()
        for request in self:
            sha.update(request.digest.encode())
        return sha.hexdigest()


@dataclass(frozen=True)
class _Trained:
    """What a method was trained on: nothing, or requests with this digest, about these facts."""

    on: str | None = None
    facts: frozenset[str] = frozenset()


class Preparation:
    """Prepares the methods of one editor, each once per configuration.

    Args:
        training: requests that methods are trained on; None where none were given.
    """

    def __init__(self, training: Sequence[Request] | None = None) -> None:
        self.training = None if training is None else TrainingSet(training)
        self._prepared: set[tuple[str, str]] = set()
        self._trained: dict[tuple[str, str], _Trained] = {}

    def prepare(self, manager: Manager, model: Model, config: MethodConfig, trains: bool) -> None:
        """Let a method compute what belongs to the base.

        What a method was trained on last is noted among the model's artifacts, so that later
        editors need no training requests for the same configuration, and still know the facts.

        Args:
            manager: of the method.
            model: the model; every edit is taken off meanwhile.
            config: the method's configuration.
            trains: the method declares `needs: training`.

        Raises:
            ConfigError: training requests are needed, none were given, and none were used before.
        """
        method, key = manager.method, (manager.method, config.recipe())
        if key in self._prepared:
            return
        model.pristine.digest_all()  # so that a base file that is put back is recognised
        training = self.training if trains and self.training is not None else TrainingSet()
        former = _noted(model, key) if trains else None
        if trains and not training and former is None:
            raise ConfigError(
                f"{method} has to be trained first, on requests that are not those to be "
                "edited, and none were given: Editor(…, training=requests), or "
                f"`errata prepare {method} --training NAME=PATH` once."
                + _otherwise_trained(model, method, config)
            )
        given = _Trained(training.digest, training.facts) if training else None
        trained = given or former or _Trained()
        with model.base_state(), _training(model, trained.on):
            manager.prepare(model, model.corpus or (), training, config)
        if given is not None:
            about = {
                "digest": given.on, "n": len(training), "facts": sorted(given.facts),
                "config": _prepares(config),
            }  # fmt: skip
            model.artifacts.save(_note(model, key), {"n": torch.tensor(len(training))}, about)
        self._trained[key] = trained
        self._prepared.add(key)

    def recall(self, model: Model, method: str, config: MethodConfig) -> None:
        """Find out what a method was trained on, here or earlier, for a call that does not prepare.

        Raises:
            ConfigError: it was never trained, or not on the training requests given here.
        """
        key = (method, config.recipe())
        if key in self._trained:
            return
        former = _noted(model, key)
        if former is None or (self.training and former.on != self.training.digest):
            on = " on the training requests given" if self.training else ""
            raise ConfigError(
                f"{method} has not been trained{on} with these hyper-parameters, and another "
                f"method asks for its edits: run `errata prepare {method} --training NAME=PATH` "
                "(in Python, prepare it with the editor that edits) first."
                + ("" if former else _otherwise_trained(model, method, config))
            )
        self._trained[key] = former

    @contextmanager
    def in_force(self, model: Model, method: str, config: MethodConfig) -> Iterator[None]:
        """Let `model.of_base(…, trained=True)` find what the method was trained on, for a block."""
        trained = self._trained.get((method, config.recipe()), _Trained())
        with _training(model, trained.on):
            yield

    def check_overlap(self, method: str, config: MethodConfig, requests: Sequence[Request]) -> None:
        """Raise `RequestError` for a request about a fact that the method was trained on."""
        seen = self._trained.get((method, config.recipe()), _Trained()).facts
        for request in requests:
            if any(name in seen for name in _facts(request)):
                raise RequestError(
                    f"{method} was trained on the fact that {request.text!r} asks for: an edit of "
                    "it would measure memory, not editing. Train on other requests."
                )


@contextmanager
def _training(model: Model, trained_on: str | None) -> Iterator[None]:
    former, model.trained_on = model.trained_on, trained_on
    try:
        yield
    finally:
        model.trained_on = former


def _note(model: Model, key: tuple[str, str]) -> tuple[str, ...]:
    """Return the artifact key of what a method (name, recipe) was trained on last."""
    return ("trained", model.fingerprint, *key)


def _noted(model: Model, key: tuple[str, str]) -> _Trained | None:
    """Return what the note says that a method (name, recipe) was trained on; None: no note."""
    stored = model.artifacts.load(_note(model, key))
    if stored is None:
        return None
    return _Trained(str(stored[1]["digest"]), frozenset(map(str, stored[1]["facts"])))


def _prepares(config: MethodConfig) -> dict[str, Any]:
    """Return those hyper-parameters that a preparation depends on."""
    return config.model_dump(mode="json", include=config.prepares)


def _otherwise_trained(model: Model, method: str, config: MethodConfig) -> str:
    """Say with which other settings a method was trained for this model; "" if with none."""
    wanted = _prepares(config)
    others = []
    for key in model.artifacts.under(("trained", model.fingerprint, method)):
        stored = model.artifacts.load(key)
        former = (stored[1].get("config") if stored else None) or {}
        differ = [name for name in wanted if former.get(name, wanted[name]) != wanted[name]]
        others.append([f"{name} {former[name]!r} (here {wanted[name]!r})" for name in differ])
    nearest: list[str] = min(filter(None, others), key=len, default=[])
    if not nearest:  # or all that differs is what an earlier version did not ask
        return ""
    more = f" and {len(nearest) - _NAMED} more" if len(nearest) > _NAMED else ""
    return (
        f" For this model it was trained with other settings: {', '.join(nearest[:_NAMED])}{more}. "
        "Give the same (--set NAME=VALUE), and that training is used."
    )


def _facts(request: Request) -> list[str]:
    keys = [f"{request.subject}\n{request.prompt}"]
    if request.relation:
        keys.append(f"{request.subject}\n{request.relation}")
    return [hashlib.sha256(key.encode()).hexdigest()[:_DIGITS] for key in keys]
