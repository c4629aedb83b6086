"""What of a process decides numbers: torch's settings and random generators, to put back."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger("errata")

Setting = tuple[Callable[[], Any], Callable[[Any], object]]
"""How something is read, and how it is put back."""


class ProcessState:
    """What a process's settings and global random generators were, to compare and put back.

    Of the libraries that were loaded then: loading one is no change. (torch is not loaded here.)
    """

    def __init__(self) -> None:
        self._was = {name: _value(read) for name, (read, _) in _settings().items()}

    def changed(self) -> list[str]:
        """Name what is not as it was."""
        settings = _settings()
        return [
            name
            for name, was in self._was.items()
            if was is not None and not _equal(was, _value(settings[name][0]))
        ]

    def restore(self) -> None:
        """Put it back."""
        settings = _settings()
        for name in self.changed():
            settings[name][1](self._was[name])


@contextmanager
def undisturbed(what: str) -> Iterator[None]:
    """Put back what is changed in the block, where a plugin is imported, and warn of it.

    An edit's numbers must not depend on which plugins were imported before it was made.
    """
    before = ProcessState()
    try:
        yield
    finally:
        if changed := before.changed():
            before.restore()
            text = "Importing %s changed %s. It was put back: a plugin sets nothing for others."
            logger.warning(text, what, ", ".join(changed))


def _settings() -> dict[str, Setting]:
    """Return what can be read and put back by the libraries that are loaded, by name.

    The default device comes first: while it is another, what is compared next would lie there.
    """
    known: dict[str, Setting] = {}
    if (torch := sys.modules.get("torch")) is not None:
        known |= {
            "torch's default device": (
                torch.get_default_device,
                lambda was: torch.set_default_device(None if was.type == "cpu" else was),
            ),
            "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
            "torch's precision of float32 products": (
                torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
            ),
            "torch's deterministic algorithms": (
                torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode,
            ),
            "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
            "torch's recording of gradients": (torch.is_grad_enabled, torch.set_grad_enabled),
            "torch's anomaly detection": (
                torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly,
            ),
            "global random state of torch": (
                torch.random.get_rng_state, torch.random.set_rng_state,
            ),
        }  # fmt: skip
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            known["global random state of torch.cuda"] = (
                torch.cuda.get_rng_state_all, torch.cuda.set_rng_state_all,
            )  # fmt: skip
    known["global random state of random"] = random.getstate, random.setstate
    if (numpy := sys.modules.get("numpy")) is not None:
        known["global random state of numpy"] = numpy.random.get_state, numpy.random.set_state
    known["the level up to which nothing is logged"] = (
        lambda: logging.root.manager.disable, logging.disable,
    )  # fmt: skip
    known["the working directory"] = os.getcwd, os.chdir
    return known


def _value(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RuntimeError, OSError):
        # A folder that is gone, or precisions that were set through torch's older and newer names.
        return None


def _equal(one: Any, other: Any) -> bool:
    if hasattr(one, "tolist"):  # of torch or numpy
        return hasattr(other, "tolist") and bool((one == other).all())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)
