"""Purity: a plugin that computes leaves the model, and the process, as it found them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from errata.common.process import ProcessState
from errata.edits.last_written import hashed
from errata.errors import ImpureMethodError, IntegrityError
from errata.model.model import sample_tokens
from errata.model.structure import Structure

if TYPE_CHECKING:
    from errata.model.model import Model

logger = logging.getLogger("errata")


class Snapshot:
    """What a live model looked like: tensor versions and bit hashes, gradients, structure.

    A version counter alone is not enough: writing through `.data` does not move it.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._structure = Structure(model.module)
        live = {**model.parameters, **model.buffers}
        self._tensors = {n: (t._version, hashed(t), t.requires_grad) for n, t in live.items()}
        # What `.half()` or `.to(device)` takes the place of; no copy of its values.
        self._data = {n: t.data for n, t in live.items()}
        # A model that was trained a moment ago still has gradients: they are its owner's.
        self._gradients = {n: t.grad.clone() for n, t in live.items() if t.grad is not None}

    def check(self) -> None:
        """Raise `IntegrityError` where other code changed the model since errata wrote to it.

        What a hook finds on such a model describes no base, and undoing what the hook does to it
        would undo the owner's change, too.
        """
        self._model.stack.check_unchanged({n: t[1] for n, t in self._tensors.items()})

    def changed(self) -> list[str]:
        """Name everything that is not as it was."""
        names = []
        for name, tensor in {**self._model.parameters, **self._model.buffers}.items():
            version, bits, requires_grad = self._tensors[name]
            if _form(tensor) != _form(self._data[name]):
                names.append(f"{name} ({tensor.dtype}, {tensor.device})")
            elif not torch.equal(hashed(tensor), bits) or (
                # A hook that asks the base takes every edit off and puts it on again.
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
            former = self._data[name]
            if (_form(tensor), tensor.data_ptr()) != (_form(former), former.data_ptr()):
                tensor.data = former
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


def _form(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape, tensor.stride()


@contextmanager
def pure(model: Model, method: str, hook: str) -> Iterator[None]:
    """Refuse and undo whatever a hook does in the block to the model or to the process.

    Args:
        model: the model.
        method: name of the method (or plugin) whose code runs.
        hook: which of its hooks.

    Raises:
        ImpureMethodError: something is not as it was; it has been put back, or is named as left.
        IntegrityError: other code had changed the model's parameters before.
    """
    before = Snapshot(model)
    before.check()
    # Put back in this order: on another default device no tensor could be compared.
    watched = (ProcessState(), _Tokenizer(model), _Configs(model), before)
    try:
        yield
    except BaseException:
        if left := _put_back(watched)[1]:
            text = "What %s changed in its `%s` hook before it failed could not be put back: %s."
            logger.warning(text, method, hook, ", ".join(left))
        raise
    changed, left = _put_back(watched)
    if changed:
        raise ImpureMethodError(method, changed, hook, left)


def _put_back(watched: Sequence[Any]) -> tuple[list[str], list[str]]:
    """Put everything back; return what was changed, and what is not as it was even now."""
    changed: list[str] = []
    left: list[str] = []
    for one in watched:
        if now := one.changed():
            changed = [*now, *changed]  # the model's before the process's
            try:
                one.restore()
            except IntegrityError as error:
                logger.warning("%s", error)
            left += one.changed()
    return changed, left


class _Configs:
    """The configurations of a model."""

    def __init__(self, model: Model) -> None:
        self._module = model.module
        self._was = {
            name: (config, copy.deepcopy(vars(config)))
            for name in ("config", "generation_config")
            if (config := getattr(model.module, name, None)) is not None
        }

    def changed(self) -> list[str]:
        """Name those that are not as they were."""
        return [
            f"the model's {name}"
            for name, (config, was) in self._was.items()
            if getattr(self._module, name, None) is not config or vars(config) != was
        ]

    def restore(self) -> None:
        """Put them back."""
        for name, (config, was) in self._was.items():
            if vars(config) != was:
                vars(config).clear()
                vars(config).update(was)
            setattr(self._module, name, config)


STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
"""What the Rust part of a tokenizer does around its vocabulary. (Truncation and padding are set by
every call, and are left out; so is the vocabulary, which takes as long to read as an edit.)"""
_TOLD = ("_special_tokens_map", "_extra_special_tokens", "chat_template")
_PLAIN = (bool, int, float, str, type(None))
_SAMPLED = "tokens of a text"


class _Tokenizer:
    """What decides the tokens of a text: a tokenizer's settings, special tokens and steps.

    What is compared takes microseconds; what else may have changed shows in the tokens of a sample.
    """

    def __init__(self, model: Model) -> None:
        self._tokenizer = model.tokenizer
        self._core = getattr(model.tokenizer, "backend_tokenizer", None)
        self._settings = self._plain()
        self._steps = {name: getattr(self._core, name) for name in STEPS if self._core is not None}
        self._was = self._told()

    def changed(self) -> list[str]:
        """Name what is not as it was."""
        now = self._told()
        found = [name for name, told in self._was.items() if now.get(name) != told]
        if len(found) > 1:  # the sample's tokens follow from the rest
            found = [name for name in found if name != _SAMPLED]
        return [f"the tokenizer's {name}" for name in found + sorted(now.keys() - self._was.keys())]

    def restore(self) -> None:
        """Put everything back but tokens that were added, which cannot be taken out."""
        own = vars(self._tokenizer)
        for name in self._plain().keys() - self._settings.keys():
            del own[name]
        own.update(copy.deepcopy(self._settings))
        if self._core is not None:
            own["_tokenizer"] = self._core
            for name, step in self._steps.items():
                if _state(step) != (was := self._was[name.replace("_", " ")]):
                    step.__setstate__(was)  # it was changed in place
                setattr(self._core, name, step)

    def _plain(self) -> dict[str, Any]:
        """Return a copy of those attributes that are settings, not caches or tables."""
        return {
            name: copy.deepcopy(value)
            for name, value in vars(self._tokenizer).items()
            if name in _TOLD or isinstance(value, _PLAIN)
        }

    def _told(self) -> dict[str, Any]:
        core = getattr(self._tokenizer, "backend_tokenizer", None)
        steps = {name: _state(getattr(core, name)) for name in STEPS if core is not None}
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {
            **{name.lstrip("_"): repr(value) for name, value in self._plain().items()},
            **{name.replace("_", " "): state for name, state in steps.items()},
            "vocabulary": (len(self._tokenizer), repr(added), core is self._core),
            _SAMPLED: _sampled(self._tokenizer),
        }


def _state(step: Any) -> Any:
    try:
        return None if step is None else step.__getstate__()
    except Exception:  # written in Python: it has none
        return type(step)


def _sampled(tokenizer: Any) -> Any:
    try:
        return sample_tokens(tokenizer)
    except Exception as error:  # a hook made it useless
        return type(error)
