"""Where long work says how far it is. The library reports; the caller decides what is shown."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from errata.errors import ConfigError

T = TypeVar("T")
logger = logging.getLogger("errata")

FIRST = 3.0
"""Seconds before the first line: short work stays silent."""
EVERY = 10.0
"""Seconds between further lines."""
YOUNG = 1.0
"""Seconds after which a part of some work is reported in place of the whole."""


@dataclass(eq=False)
class Work:
    """One piece of work that is going on.

    Attributes:
        text: what it is.
        total: number of steps, where they can be counted.
        done: how many of them are done.
        started: when it began (monotonic seconds).
        shown: a line about it was said.
    """

    text: str
    total: int | None = None
    done: int = 0
    started: float = field(default_factory=time.monotonic)
    shown: bool = False

    def step(self) -> None:
        """Count one step."""
        self.done += 1

    def line(self, now: float) -> str:
        """Return how far it is: "text: 3 of 12 (20 s, about 60 s left)"."""
        spent = now - self.started
        if self.total is None or self.total <= 1:
            steps = f"{self.done} done, " if self.total is None and self.done else ""
            return f"{self.text} … ({steps}{_time(spent)})"
        left = ""
        if 0 < self.done < self.total:
            left = f", about {_time(spent / self.done * (self.total - self.done))} left"
        return f"{self.text}: {self.done} of {self.total} ({_time(spent)}{left})"


class Progress:
    """Progress by time: a line after 3 s, then every 10 s, and one when long work is done.

    The lines go to the log of the name "errata" at INFO, or to `say`: `Editor(…, progress=print)`.
    They come from a thread of their own, which runs only while work does, so that a step which
    takes minutes is not silent. Subclass it to show something else.

    Args:
        say: takes one line of text. What it raises does not end the work: it is logged as a
            warning, and `say` is asked no more.

    Raises `ConfigError` for a `say` that cannot be called.
    """

    def __init__(self, say: Callable[[str], None] | None = None) -> None:
        if say is not None and not callable(say):
            raise ConfigError(
                f"progress={say!r} is not allowed: give None (the log of the name 'errata' at "
                "INFO), a function that takes a line of text (print), or a Progress."
            )
        self._say = say
        self._works: list[Work] = []
        self._lock = threading.Lock()
        self._ended = threading.Event()

    @classmethod
    def of(cls, given: Progress | Callable[[str], None] | None) -> Progress:
        """Return progress from what a caller gave: progress, what takes a line, or nothing."""
        return given if isinstance(given, Progress) else cls(given)

    def track(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, reporting `text` and how many of `total` are done."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        with self._working(text, total) as work:
            for item in items:
                yield item
                work.step()

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Report that work without countable steps goes on while the block runs."""
        with self._working(text, None):
            yield

    def note(self, text: str) -> None:
        """Report one finished step."""
        say = self._say
        if say is None:
            logger.info("%s", text)
            return
        try:
            say(text)
        except Exception as error:  # whose work is done must not lose it to a display
            with self._lock:  # the work and the thread that reports it may both be here
                first, self._say = self._say is not None, None
            if first:
                logger.warning(
                    "The function given as progress raised %s: %s. It is not called again.",
                    type(error).__name__, error,
                )  # fmt: skip

    @property
    def heard(self) -> bool:
        """Whether anybody gets the lines."""
        return self._say is not None or logger.isEnabledFor(logging.INFO)

    @contextmanager
    def _working(self, text: str, total: int | None) -> Iterator[Work]:
        work = Work(text, total)
        with self._lock:
            self._works.append(work)
            if len(self._works) == 1 and self.heard:
                self._ended = threading.Event()
                args = (self._ended,)
                threading.Thread(target=self._report, args=args, daemon=True).start()
        try:
            yield work
        finally:
            with self._lock:
                self._works.remove(work)
                if not self._works:
                    self._ended.set()
            if work.shown:
                of = f"{work.done} in " if work.done > 1 else ""
                self.note(f"{text}: done, {of}{_time(time.monotonic() - work.started)}")

    def _report(self, ended: threading.Event) -> None:
        """Say now and then how far the outermost work is, and what is done within it."""
        wait = FIRST
        while not ended.wait(wait):
            wait = EVERY
            now = time.monotonic()
            with self._lock:
                # What has only just begun says nothing yet: what it is a part of does.
                works = self._works[:1] + [w for w in self._works[1:] if now - w.started >= YOUNG]
                lines = [work.line(now) for work in dict.fromkeys((*works[:1], *works[-1:]))]
            if works:
                works[0].shown = True  # the others' ends are between two of its lines
                self.note("; ".join(lines))


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
