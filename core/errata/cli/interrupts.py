"""Ctrl-C: ends a command in order, wherever it is, and at once where it is pressed again."""

from __future__ import annotations

import _thread
import os
import signal
import threading
import time
from types import FrameType

SAME = 1.0
"""Seconds within which a second Ctrl-C is taken for the first."""
LATER = 0.05
"""Seconds after which an interrupt that was held is tried again."""
INTERRUPTED = 130
_IMPORTING = "<frozen importlib._bootstrap>"


class Interrupts:
    """The process's handler of SIGINT.

    The first raises `KeyboardInterrupt`, so that what is under way is taken back; but not while a
    module is imported: libraries that are in part C++ (torch) end the process where Python code
    that they run raises. It is held until the import is done. A later one ends the process; what
    is on the disk is whole at any time.
    """

    def __init__(self) -> None:
        self._first: float | None = None
        self._held = False

    def install(self) -> None:
        """Take over SIGINT, unless somebody else has: a shell that runs this in the background."""
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        again, self._held = self._held, False
        if self._first is None:
            self._first = now
        elif not again and now - self._first >= SAME:
            os.write(2, b"\nInterrupted.\n")
            os._exit(INTERRUPTED)
        elif not again:
            return
        if _importing(frame):
            retry = threading.Timer(LATER, self._deliver)
            retry.daemon = True
            retry.start()
            return
        raise KeyboardInterrupt

    def _deliver(self) -> None:
        self._held = True
        main = threading.main_thread().ident
        if hasattr(signal, "pthread_kill") and main is not None:
            signal.pthread_kill(main, signal.SIGINT)  # wakes it where it waits
        else:
            _thread.interrupt_main()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False
