"""Who may use a live model at a time: any number that run it, or one that changes it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from errata.errors import ConfigError, LedgerError

if TYPE_CHECKING:
    from torch import nn

_CLAIMED: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()
_CLAIMING = threading.Lock()


def claim(owner: object, tensors: Iterable[object]) -> None:
    """Make an editor the only one of these parameters, until `release` or its end.

    The objects are told apart by identity, whatever module holds them: `owner` must keep them.

    Raises `ConfigError` where another editor has one of them.
    """
    wanted = frozenset(map(id, tensors))

    def taken() -> bool:
        return any(wanted & claimed for claimed in list(_CLAIMED.values()))

    with _CLAIMING:
        if taken():
            gc.collect()  # editors are in reference cycles: one may be gone and not collected
        if taken():
            raise ConfigError(
                "Another editor has this model object (or a part of it): two of them would take "
                "each other's edits for the base. Use that editor, close it first, or load the "
                "model a second time."
            )
        _CLAIMED[owner] = wanted


def release(owner: object) -> None:
    """Let other editors have what `owner` claimed."""
    _CLAIMED.pop(owner, None)


class Access:
    """A lock that several threads share for running a model, and one takes for changing it.

    Both are reentrant. A thread that waits to change the model goes before those that begin to
    run it after that. While anybody has it the module is in eval mode: what is computed and
    measured does not depend on where its owner's training stands.
    """

    def __init__(self, module: nn.Module | None = None) -> None:
        self._condition = threading.Condition()
        self._running: dict[int, int] = {}  # thread → how deep
        self._changing: int | None = None
        self._depth = 0
        self._waiting = 0
        self._module = module
        self._training: list[nn.Module] = []
        self._found = (
            [part for part in module.modules() if part.training] if module is not None else []
        )

    def put_back(self) -> None:
        """Put the modules back into training mode that were in it when the model was opened."""
        for part in self._found:
            part.training = True

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model in the block: nobody changes it meanwhile."""
        me = threading.get_ident()
        with self._condition:
            while (
                me not in self._running
                and self._changing != me
                and (self._changing is not None or self._waiting)
            ):
                self._condition.wait()
            self._begin()
            self._running[me] = self._running.get(me, 0) + 1
        try:
            yield
        finally:
            with self._condition:
                self._running[me] -= 1
                if not self._running[me]:
                    del self._running[me]
                self._end()
                self._condition.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the model in the block: nobody else runs or changes it meanwhile.

        Raises `LedgerError` in a thread that is in the middle of running the model.
        """
        me = threading.get_ident()
        with self._condition:
            if self._changing != me:
                if me in self._running:
                    raise LedgerError(
                        "The model is being run by this very thread: let generate, evaluate or "
                        "locate return before the model is changed."
                    )
                self._waiting += 1
                try:
                    while self._changing is not None or self._running:
                        self._condition.wait()
                finally:
                    self._waiting -= 1
                self._begin()
                self._changing = me
            self._depth += 1
        try:
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if not self._depth:
                    self._changing = None
                    self._end()
                self._condition.notify_all()

    def _begin(self) -> None:
        """Leave training mode with the first who comes in."""
        if self._module is not None and not self._running and self._changing is None:
            self._training = [part for part in self._module.modules() if part.training]
            for part in self._training:
                part.training = False

    def _end(self) -> None:
        """Go back to it with the last who leaves."""
        if not self._running and self._changing is None:
            for part in self._training:
                part.training = True
            self._training = []
