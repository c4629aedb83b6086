"""Purity: a plugin that computes leaves the model, and the process, as it found them."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from errata.edits.last_written import hashed
from errata.errors import ImpureMethodError
from errata.model.structure import Structure

if TYPE_CHECKING:
    from errata.model.model import Model


class Snapshot:
    """What a live model looked like: tensor versions and bit hashes, gradients, structure.

    A version counter alone is not enough: writing through `.data` does not move it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._structure = Structure(model.module)
        live = {**model.parameters, **model.buffers}
        self._tensors = {n: (t._version, hashed(t), t.requires_grad) for n, t in live.items()}
        # A model that was trained a moment ago still has gradients: they are its owner's.
        self._gradients = {n: t.grad.clone() for n, t in live.items() if t.grad is not None}

    def check(self) -> None:
        """Raise `IntegrityError` where other code changed the model since errata wrote to it.

        What a hook finds on such a model is about no base, and putting back what it does to the
        model would take the owner's change away.
        """
        self._model.stack.check_unchanged({n: t[1] for n, t in self._tensors.items()})

    def changed(self) -> list[str]:
        """Name everything that is not as it was."""
        names = []
        for name, tensor in {**self._model.parameters, **self._model.buffers}.items():
            version, bits, requires_grad = self._tensors[name]
            if not torch.equal(hashed(tensor), bits) or (
                # Who asks the base takes every edit off and puts it on again.
                tensor._version != version and self._model.stack.differing([name])
            ):
                names.append(name)
            elif tensor.requires_grad != requires_grad:
                names.append(f"{name} (requires_grad)")
            elif not self._same_gradient(name, tensor.grad):
                names.append(f"{name} (grad)")
        return names + self._structure.changed()

    def restore(self) -> None:
        """Bring everything back: modules, hooks, flags, and every tensor from the base."""
        self._structure.restore()
        for name, tensor in {**self._model.parameters, **self._model.buffers}.items():
            if not self._same_gradient(name, tensor.grad):
                tensor.grad = self._gradients.get(name)
            if tensor.is_leaf:
                tensor.requires_grad_(self._tensors[name][2])
        self._model.stack.restore()

    def _same_gradient(self, name: str, gradient: torch.Tensor | None) -> bool:
        former = self._gradients.get(name)
        if former is None or gradient is None:
            return former is gradient
        return torch.equal(hashed(former), hashed(gradient))


@contextmanager
def pure(model: Model, method: str, hook: str) -> Iterator[None]:
    """Refuse and undo whatever a hook does in the block to the model or to the process.

    Args:
        model: the model.
        method: name of the method (or plugin) whose code runs.
        hook: which of its hooks.

    Raises:
        ImpureMethodError: something is not as it was; it has been put back.
        IntegrityError: other code had changed the model's parameters before.
    """
    before, randomness, settings = Snapshot(model), _RandomState(), _Surroundings(model)
    before.check()
    try:
        yield
    except BaseException:
        if before.changed():
            before.restore()
        randomness.restore()
        settings.restore()
        raise
    changed = before.changed()
    if changed:
        before.restore()
    beside = [*randomness.changed(), *settings.changed()]
    if beside:
        randomness.restore()
        settings.restore()
    if changed or beside:
        raise ImpureMethodError(method, [*changed, *beside], hook)


class _Surroundings:
    """What else decides what a model says: its configuration, its tokenizer, how torch computes."""

    def __init__(self, model: Model) -> None:
        self._module, self._tokenizer = model.module, model.tokenizer
        self._configs = {
            name: (config, copy.deepcopy(vars(config)))
            for name in ("config", "generation_config")
            if (config := getattr(model.module, name, None)) is not None
        }
        self._sides = (self._tokenizer.padding_side, self._tokenizer.truncation_side)
        self._words = len(self._tokenizer)
        self._torch = _torch_settings()

    def changed(self) -> list[str]:
        """Name what is not as it was."""
        names = [
            f"the model's {name}"
            for name, (config, was) in self._configs.items()
            if getattr(self._module, name, None) is not config or vars(config) != was
        ]
        if (self._tokenizer.padding_side, self._tokenizer.truncation_side) != self._sides:
            names.append("the tokenizer's sides")
        if len(self._tokenizer) != self._words:
            names.append("the tokenizer's vocabulary (load it again: tokens cannot be taken out)")
        return names + [
            f"torch's {n}" for n, now in _torch_settings().items() if now != self._torch[n]
        ]

    def restore(self) -> None:
        """Put everything back but tokens that were added."""
        for name, (config, was) in self._configs.items():
            if vars(config) != was:
                vars(config).clear()
                vars(config).update(was)
            setattr(self._module, name, config)
        self._tokenizer.padding_side, self._tokenizer.truncation_side = self._sides
        if _torch_settings() != self._torch:
            torch.set_default_dtype(self._torch["default dtype"])
            torch.use_deterministic_algorithms(self._torch["deterministic algorithms"])
            torch.set_num_threads(self._torch["number of threads"])


def _torch_settings() -> dict[str, Any]:
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "number of threads": torch.get_num_threads(),
    }


class _RandomState:
    """The state of the process's global random generators."""

    def __init__(self) -> None:
        self._state = _generators()

    def changed(self) -> list[str]:
        """Name the generators that were drawn from or seeded."""
        now = _generators()
        return [
            f"global random state of {name}"
            for name, state in self._state.items()
            if not _equal(state, now[name])
        ]

    def restore(self) -> None:
        """Put them back."""
        random.setstate(self._state["random"])
        torch.random.set_rng_state(self._state["torch"])
        if "numpy" in self._state:
            sys.modules["numpy"].random.set_state(self._state["numpy"])
        if "torch.cuda" in self._state:
            torch.cuda.set_rng_state_all(self._state["torch.cuda"])


def _generators() -> dict[str, Any]:
    found: dict[str, Any] = {"random": random.getstate(), "torch": torch.random.get_rng_state()}
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found["torch.cuda"] = torch.cuda.get_rng_state_all()
    return found


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    if hasattr(one, "tobytes"):
        return bool(one.tobytes() == other.tobytes())
    return bool(one == other)
