"""Parts of a forward that nobody reads are not run: rows before they differ, places behind.

Both put hooks on modules for one call, before other changes are put there: those see all rows and
columns, as if everything had been run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from errata.model.forward.trace import first_tensor, with_first

if TYPE_CHECKING:
    from torch import Tensor, nn

Given = tuple[tuple[Any, ...], dict[str, Any]]


@contextmanager
def narrowed(module: nn.Module, reads: Sequence[int]) -> Iterator[None]:
    """Let a module that treats columns alike see some of them only, and fill up with zeros.

    Where it gets rows and columns in one dimension (OPT) it sees all.

    Args:
        module: the MLP of the last block: what it says elsewhere nobody reads.
        reads: the columns.
    """
    width = [0]

    def columns(value: Any) -> int:
        return value.shape[1] if isinstance(value, torch.Tensor) and value.ndim == 3 else 0

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given | None:
        width[0] = max(map(columns, (*args, *kwargs.values())), default=0)
        if width[0] <= len(reads):
            width[0] = 0
            return None

        def narrow(value: Any) -> Any:
            return value[:, list(reads)] if columns(value) == width[0] else value

        return tuple(map(narrow, args)), {name: narrow(v) for name, v in kwargs.items()}

    def fill(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not width[0]:
            return None
        found = first_tensor(output)
        full = found.new_zeros(found.shape[0], width[0], found.shape[2])
        full[:, list(reads)] = found
        return with_first(output, full)

    with _hooked(module, cut, fill):
        yield


@contextmanager
def joining(
    blocks: Sequence[tuple[nn.Module, int]], rows: int, state: Callable[[int, int], Tensor]
) -> Iterator[None]:
    """Let blocks run the first rows of a batch only; the others join higher up.

    Args:
        blocks: (block, number of rows that it runs), from below.
        rows: of the whole batch.
        state: (index in `blocks`, number of rows) → what the block would give for the rows that
            it does not run, or would if they were run as they were recorded.
    """
    with ExitStack() as undo:
        for index, (block, active) in enumerate(blocks):
            if active < rows:
                hooks = _rows_of(active, rows, partial(state, index))
                undo.enter_context(_hooked(block, *hooks))
        yield


def _rows_of(active: int, rows: int, rest: Callable[[int], Tensor]) -> tuple[Any, Any]:
    def first(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value[:active] if value.ndim and value.shape[0] == rows else value
        if type(value) in (tuple, list):
            return type(value)(map(first, value))
        return value

    def cut(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
        return tuple(map(first, args)), {name: first(v) for name, v in kwargs.items()}

    def fill(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        found = first_tensor(output)
        return with_first(output, torch.cat([found, rest(rows - active).to(found)]))

    return cut, fill


@contextmanager
def _hooked(module: nn.Module, before: Any, after: Any) -> Iterator[None]:
    with ExitStack() as undo:
        undo.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        undo.callback(module.register_forward_hook(after).remove)
        yield
