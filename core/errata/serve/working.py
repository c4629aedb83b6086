"""Work that takes long, seen while it goes on, and given up where nobody waits for it any more."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from errata.common.progress import Progress
from errata.errors import ErrataError

T = TypeVar("T")


class GivenUpError(ErrataError, RuntimeError):
    """The work was given up: nobody waits for it any more, or the server is being closed."""


@dataclass(eq=False)
class Job:
    """One piece of work that somebody asked for.

    Attributes:
        what: what it is, for people.
        step: what it is at, as the library says it.
        done: steps done, of `total` where they can be counted.
        began: when the step began (monotonic seconds).
        given_up: it ends at its next step.
        why: the reason for that.
    """

    what: str
    step: str = ""
    done: int = 0
    total: int | None = None
    began: float = 0.0
    started: float = field(default_factory=time.monotonic)
    given_up: threading.Event = field(default_factory=threading.Event)
    why: str = "Nobody waits for it."

    def as_json(self) -> dict[str, Any]:
        """Return how far it is."""
        now = time.monotonic()
        return {
            "what": self.what, "step": self.step, "done": self.done, "total": self.total,
            "seconds": round(now - self.started, 1),
            "step_seconds": round(now - self.began, 1) if self.step else 0.0,
        }  # fmt: skip

    def begin(self, step: str, total: int | None) -> None:
        """Note what comes now; raise `GivenUpError` where it was given up."""
        self.check()
        self.step, self.done, self.total, self.began = step, 0, total, time.monotonic()

    def check(self) -> None:
        """Raise `GivenUpError` where it was given up."""
        if self.given_up.is_set():
            raise GivenUpError(f"{self.what} was given up. {self.why}")


class Jobs(Progress):
    """The work of a server: what goes on, in its order. It listens to a model's progress.

    Args:
        listened: the progress that the model reports to; it goes on getting everything.
    """

    def __init__(self, listened: Progress) -> None:
        super().__init__()
        self.listened = listened
        self._jobs: list[Job] = []
        self._own = threading.local()

    def going_on(self) -> list[dict[str, Any]]:
        """Return what goes on or waits, the oldest first."""
        return [job.as_json() for job in list(self._jobs)]

    def give_up(self, why: str) -> None:
        """Have everything that can end at its next step do so, and say why."""
        for job in list(self._jobs):
            job.why = why
            job.given_up.set()

    async def ended(self) -> None:
        """Wait until nothing goes on."""
        while self._jobs:
            await asyncio.sleep(0.02)

    async def run(
        self, what: str, work: Callable[[], T], gone: Coroutine[Any, Any, None] | None = None
    ) -> T:
        """Carry work out in a thread.

        Args:
            what: what it is, for people.
            work: what is called.
            gone: ends when who asked has gone away: then it is given up at its next step. None:
                it is always carried out.

        Raises `GivenUpError`, and whatever the work raises.
        """
        job = Job(what)
        self._jobs.append(job)
        left = None if gone is None else asyncio.ensure_future(gone)
        if left is not None:
            left.add_done_callback(lambda _: job.given_up.set())
        try:
            return await run_in_threadpool(self._carried_out, job, work, left is not None)
        finally:
            self._jobs.remove(job)
            if left is not None:
                left.cancel()

    def _carried_out(self, job: Job, work: Callable[[], T], may_end: bool) -> T:
        self._own.job = job if may_end else None
        try:
            return work()
        finally:
            self._own.job = None

    # -- what the library reports ----------------------------------------------------------------

    def track(self, items: Iterable[T], text: str, total: int | None = None) -> Iterator[T]:
        """Yield the items, and note how many are done."""
        if total is None and hasattr(items, "__len__"):
            total = len(items)  # type: ignore[arg-type]
        job: Job | None = getattr(self._own, "job", None)
        if job is None:
            yield from self.listened.track(items, text, total)
            return
        job.begin(text, total)
        for item in self.listened.track(items, text, total):
            job.check()
            yield item
            job.done += 1

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Report that work goes on."""
        job: Job | None = getattr(self._own, "job", None)
        if job is not None:
            job.begin(text, None)
        with self.listened.busy(text):
            yield

    def note(self, text: str) -> None:
        """Report one finished step."""
        self.listened.note(text)

    @property
    def heard(self) -> bool:
        """Whether anybody gets the lines."""
        return self.listened.heard
