"""A second device without its hardware: what is put on two devices at once raises, as on a GPU.

Inside `second_device()` a tensor moved to "meta" keeps its values in CPU memory. An operation that
is given tensors of both devices raises RuntimeError; a number (a tensor without dimensions) and an
index may come from the CPU, as CUDA takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from errata.edits.last_written import LastWritten

if TYPE_CHECKING:
    from errata.model import Model

SECOND = torch.device("meta")
_MOVES = ("aten::copy_", "aten::_to_copy")
_CPU_INDEX = ("aten::index.Tensor", "aten::_pack_padded_sequence")


class Away(torch.Tensor):
    """A tensor on the second device; `held` has its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Away:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device=SECOND
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        return self.held.tolist()

    def new_tensor(self, data: Any, **options: Any) -> torch.Tensor:
        return torch.as_tensor(data, dtype=options.get("dtype", self.dtype)).to(SECOND)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    given, spec = tree_flatten((args, kwargs))
    tensors = [one for one in given if isinstance(one, torch.Tensor)]
    away = [isinstance(one, Away) for one in tensors]
    name = func.name()
    by_index = name.startswith(_CPU_INDEX) and away[0]
    if any(away) and not name.startswith(_MOVES) and not by_index:
        writes_here = func._schema.is_mutable and not away[0]
        together = (far or one.ndim == 0 for far, one in zip(away, tensors, strict=True))
        if writes_here or not all(together):
            raise RuntimeError(f"{name} was given tensors on two devices.")
    held = [one.held if isinstance(one, Away) else one for one in given]
    plain_args, plain_kwargs = tree_unflatten(held, spec)
    device = kwargs.get("device")
    if device is not None:
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    found = func(*plain_args, **plain_kwargs)
    if away and away[0] and found is tensors[0].held:  # in place
        return tensors[0]
    if not (any(away) if device is None else torch.device(device) == SECOND):
        return found
    if name.startswith("aten::copy_"):
        return found
    if name.startswith("aten::_pack_padded_sequence"):
        return Away(found[0]), found[1]  # the batch sizes are always the CPU's
    return tree_map(lambda one: Away(one) if isinstance(one, torch.Tensor) else one, found)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Let there be a second device in the block; yields it."""
    tensor = torch.tensor

    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        found = tensor(*args, **options)  # made in one piece, past every dispatcher
        return found if device is None else found.to(device)

    with pytest.MonkeyPatch.context() as patch, _Dispatch():
        patch.setattr(torch, "tensor", made)
        yield SECOND


def put_there(model: Model, *paths: str) -> None:
    """Put parts of a model ("" is all of it) on the second device.

    As with a device map, what a part is given follows it there, and what it returns comes back.
    """
    model.fingerprint  # noqa: B018  # read while its tensors are in memory, and kept
    for path in paths:
        part = model.module.get_submodule(path).to(SECOND)
        if path:
            part.register_forward_pre_hook(_bring, with_kwargs=True)
            part.register_forward_hook(lambda part, args, output: _moved("cpu", output))
    model.parameters.update(model.module.named_parameters())
    model.buffers.update(model.module.named_buffers())
    model.stack.written = LastWritten(model)  # it was opened there


def _bring(part: Any, args: Any, kwargs: Any) -> Any:
    return _moved(SECOND, args), _moved(SECOND, kwargs)


def _moved(device: Any, values: Any) -> Any:
    return tree_map(lambda v: v.to(device) if isinstance(v, torch.Tensor) else v, values)
