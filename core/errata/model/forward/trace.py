"""Hooks that undo themselves: capture, patch, answer from memory, freeze.

All of them work on module paths and call nothing themselves, so adapters, codebooks and other
hooks that hang on the same modules keep acting. They act in the thread that put them there: what
another thread runs on the same module meanwhile does not see them.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from errata.errors import AnatomyError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Seen:
    """What one module was given and what it returned, in its last call.

    Attributes:
        input: the first tensor argument, or None when it was not asked for.
        output: the first tensor of what it returned, or None when it was not asked for.
    """

    input: Tensor | None = None
    output: Tensor | None = None


class _Stop(Exception):
    """Ends a forward pass from inside a hook; carries the trace that raised it."""

    def __init__(self, seen: object) -> None:
        super().__init__("the forward pass was stopped on purpose")
        self.seen = seen


def submodule(root: nn.Module, name: str) -> nn.Module:
    """Return a submodule by path; raise `AnatomyError` naming how far the path leads."""
    try:
        return root.get_submodule(name)
    except AttributeError as error:
        raise AnatomyError(f"{type(root).__name__} has no module {name!r}: {error}.") from None


def first_tensor(value: Any) -> Tensor:
    """Return a tensor, or the first element of a tuple that holds one first."""
    tensor = value if isinstance(value, torch.Tensor) else value[0]
    assert isinstance(tensor, torch.Tensor)
    return tensor


def with_first(value: Any, tensor: Tensor) -> Any:
    """Return `value` with its first tensor replaced, in the same structure."""
    if isinstance(value, torch.Tensor):
        return tensor
    return type(value)((tensor, *value[1:]))


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among the arguments of a call (attentions take keywords only)."""
    tensors = (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
    return next(tensors, None)


def _copy(tensor: Tensor | None, detach: bool) -> Tensor | None:
    if tensor is None:
        return None
    return (tensor.detach() if detach else tensor).clone()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a module hook that acts in the present thread and leaves other threads alone."""
    owner = threading.get_ident()

    @functools.wraps(hook)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return hook(*args, **kwargs) if threading.get_ident() == owner else None

    return bound


@contextmanager
def trace(
    root: nn.Module,
    names: Sequence[str] | str,
    *,
    inputs: bool = False,
    outputs: bool = True,
    stop: bool = False,
    detach: bool = False,
) -> Iterator[dict[str, Seen]]:
    """Capture what passes through the named modules while the block runs.

    Args:
        root: the module that `names` are paths in.
        names: one module path or several.
        inputs: keep the first tensor argument of each.
        outputs: keep the first tensor each returns.
        stop: end the forward pass as soon as every named module has run. The call of the root
            module then returns nothing: it must be the last statement of the block.
        detach: keep them outside the autograd graph.

    What is kept are copies: some blocks go on writing into what they were given (Falcon adds the
    attention's output to the MLP's in place).

    Yields:
        Module path → `Seen`, filled while the block runs; a path is there once it was reached.

    >>> with torch.no_grad(), trace(module, ["h.0.mlp"], stop=True) as seen:  # doctest: +SKIP
    ...     module(input_ids)
    >>> seen["h.0.mlp"].output.shape  # doctest: +SKIP
    torch.Size([1, 7, 64])
    """
    wanted = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    seen: dict[str, Seen] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            del module
            given = _given(args, kwargs) if inputs else None
            returned = first_tensor(output) if outputs else None
            seen[name] = Seen(_copy(given, detach), _copy(returned, detach))
            if stop and len(seen) == len(wanted):
                raise _Stop(seen)

        return hook

    with ExitStack() as undo:
        for name in wanted:
            handle = submodule(root, name).register_forward_hook(
                of_this_thread(hook_for(name)), with_kwargs=True
            )
            undo.callback(handle.remove)
        try:
            yield seen
        except _Stop as stopped:
            if stopped.seen is not seen:  # an enclosing trace asked for it
                raise


@contextmanager
def patched(root: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Pass the output of each named module through a function while the block runs.

    The function gets the first tensor of the output and returns its replacement; it must not
    write to what it gets. See `adding` for the common one.
    """

    def hook_for(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            del module, args
            return with_first(output, change(first_tensor(output)))

        return hook

    with ExitStack() as undo:
        for name, change in changes.items():
            handle = submodule(root, name).register_forward_hook(of_this_thread(hook_for(change)))
            undo.callback(handle.remove)
        yield


def adding(
    values: Tensor, columns: Tensor | int, *, rows: Tensor | None = None, replace: bool = False
) -> Callable[[Tensor], Tensor]:
    """Return a change for `patched` that adds vectors at chosen positions.

    Args:
        values: (n, d), cast to the dtype of what it is added to; gradients flow back into it.
        columns: (n,) or one number: the column of each vector.
        rows: (n,), default 0 … n-1. Where a module sees rows and columns flattened into one
            dimension (OPT's MLP), the batch is taken to be `rows` counted up to its highest.
        replace: write the vectors instead of adding them.
    """

    def change(output: Tensor) -> Tensor:
        where = output.device
        index = torch.arange(len(values)) if rows is None else rows
        flat = output.ndim == 2
        shaped = output.view(int(index.max()) + 1, -1, output.shape[-1]) if flat else output
        column = torch.as_tensor(columns, device=where).expand(len(values))
        new = values.to(device=where, dtype=output.dtype)
        place = (index.to(where), column)
        return shaped.index_put(place, new, accumulate=not replace).view(output.shape)

    return change


class _Answering:
    """Stands in the place of one module's forward while any thread lets it answer from memory."""

    lock = threading.Lock()

    def __init__(self, module: nn.Module) -> None:
        self._own = module.__dict__
        self._former = self._own.get("forward")
        self._original = module.forward
        self._answers: dict[int, list[Callable[..., Any]]] = {}  # by thread; the last one counts

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        answers = self._answers.get(threading.get_ident())
        return answers[-1](*args, **kwargs) if answers else self._original(*args, **kwargs)

    @classmethod
    def begin(cls, module: nn.Module, answer: Callable[..., Any]) -> _Answering:
        """Let the module answer in this thread."""
        with cls.lock:
            there = module.__dict__.get("forward")
            found = there if isinstance(there, cls) else cls(module)
            found._answers.setdefault(threading.get_ident(), []).append(answer)
            module.__dict__["forward"] = found
        return found

    def end(self) -> None:
        """Take this thread's last answer away, and oneself when there is no other."""
        with self.lock:
            answers = self._answers[threading.get_ident()]
            answers.pop()
            if not answers:
                del self._answers[threading.get_ident()]
            if self._answers:
                return
            if self._former is None:
                del self._own["forward"]
            else:
                self._own["forward"] = self._former


@contextmanager
def answered(root: nn.Module, answers: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Let the named modules answer from memory while the block runs.

    The forward of each is not run, `answers[name]` is called with its arguments instead. Hooks
    that hang on the module still see the call. The class is left alone: the answer stands in
    the instance's own dictionary, in front of a `forward` that may be there already (as
    `accelerate` puts it), which comes back. Other threads run that one meanwhile.
    """
    with ExitStack() as undo:
        for name, answer in answers.items():
            undo.callback(_Answering.begin(submodule(root, name), answer).end)
        yield


@contextmanager
def bypassed(root: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Make the named blocks hand on what they are given while the block runs.

    They are run (their output has the structure their caller expects) and then overruled.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        del module
        given = _given(args, kwargs)
        return output if given is None else with_first(output, given)

    with ExitStack() as undo:
        for name in names:
            handle = submodule(root, name).register_forward_hook(
                of_this_thread(hook), with_kwargs=True
            )
            undo.callback(handle.remove)
        yield


@contextmanager
def frozen(root: nn.Module) -> Iterator[None]:
    """Take `requires_grad` off every parameter for the block, so that no graph is kept for them."""
    live = [parameter for parameter in root.parameters() if parameter.requires_grad]
    try:
        for parameter in live:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
