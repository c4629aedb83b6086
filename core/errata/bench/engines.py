"""Where units of work are carried out: in this process, in several, or on a Ray cluster.

An engine gets units and yields their lines as they come; it never writes results. What is written
is up to the one process that runs the benchmark.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from errata import errors
from errata.bench.work_units import WorkUnit, keys_of

if TYPE_CHECKING:
    from errata.bench.results import Line
    from errata.bench.run_spec import RunSpec
    from errata.bench.worker import Worker
    from errata.common.progress import Progress

TRIES = 3
"""How often a unit is started without a single new line before its next case is given up."""


class Engine(Protocol):
    """Carries out units of work."""

    def run(self, spec: RunSpec, units: Sequence[WorkUnit]) -> Generator[Line, None, None]:
        """Yield the lines of units as they come, in any order; each unit's own in its order."""
        ...

    def close(self) -> None:
        """Let go of models and processes; `run` may be called several times before."""
        ...


class SerialEngine:
    """Everything in this process, in order.

    Args:
        progress: where long work inside a unit reports to.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._worker: Worker | None = None

    def run(self, spec: RunSpec, units: Sequence[WorkUnit]) -> Generator[Line, None, None]:
        """Yield the lines of units, in order."""
        from errata.bench.dispatch import carry_out
        from errata.bench.worker import Worker

        if self._worker is None:
            self._worker = Worker(spec, self._progress)
        for unit in units:
            yield from carry_out(self._worker, unit)

    def close(self) -> None:
        """Let go of the model; raise `IntegrityError` unless it is its base again."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()


class WorkerMessage(NamedTuple):
    """What a worker process says: a line, that a unit is done, an error, or that it is gone."""

    kind: Literal["line", "done", "error", "gone"]
    content: Any = None


class WorkerHandle(Protocol):
    """One worker elsewhere."""

    def send(self, unit: WorkUnit) -> None:
        """Let it carry out a unit."""
        ...

    def stop(self) -> None:
        """End it now, whatever it does."""
        ...

    def finish(self) -> WorkerMessage:
        """Let it check its model and end by itself; return its last word."""
        ...


class WorkerPool:
    """An engine with several workers that may die: what engines on processes share.

    A subclass says how a worker is started and how one waits for several.

    Args:
        jobs: how many workers.
    """

    def __init__(self, jobs: int) -> None:
        if jobs < 1:
            raise errors.ConfigError(f"jobs={jobs} makes no sense: give 1 or more.")
        self.jobs = jobs
        self._idle: list[WorkerHandle] = []

    def _start(self, spec: RunSpec) -> WorkerHandle:
        raise NotImplementedError

    def _wait(self, handles: Sequence[WorkerHandle]) -> list[tuple[WorkerHandle, WorkerMessage]]:
        """Block until one of the workers says something."""
        raise NotImplementedError

    def run(self, spec: RunSpec, units: Sequence[WorkUnit]) -> Generator[Line, None, None]:
        """Yield the lines of units as they come; a worker that dies is replaced."""
        waiting = deque(_Attempt(unit) for unit in units)
        busy: dict[WorkerHandle, _Attempt] = {}
        deaths = 0  # since anybody said anything
        try:
            while waiting or busy:
                while waiting and len(busy) < self.jobs:
                    handle = self._idle.pop() if self._idle else self._start(spec)
                    busy[handle] = attempt = waiting.popleft()
                    handle.send(attempt.unit)
                for handle, message in self._wait(list(busy)):
                    deaths = deaths + 1 if message.kind == "gone" else 0
                    if deaths > TRIES * (self.jobs + 1):
                        raise errors.ErrataError(
                            f"{deaths} workers in a row ended before they did anything "
                            f"({message.content}). If the system ran out of memory, use fewer "
                            "--jobs; otherwise try without --jobs to see the error itself."
                        )
                    if message.kind == "line":
                        busy[handle].got(message.content)
                        yield message.content
                    elif message.kind == "done":
                        del busy[handle]
                        self._idle.append(handle)
                    elif message.kind == "error":
                        raise received_error(message.content)
                    else:
                        waiting.appendleft(busy.pop(handle).again(spec, str(message.content)))
                        handle.stop()
        finally:
            for handle in busy:
                handle.stop()

    def close(self) -> None:
        """End the workers; raise what one of them finds wrong with its model."""
        idle, self._idle = self._idle, []
        last = [handle.finish() for handle in idle]
        for message in last:
            if message.kind == "error":
                raise received_error(message.content)


class _Attempt:
    """A unit of work that may have to be started several times."""

    def __init__(self, unit: WorkUnit) -> None:
        self.unit = unit
        self._seen: dict[str, str] = {}
        self._deaths = 0
        self._over = ""  # the first key that was left when a worker last died

    def got(self, line: Line) -> None:
        """Take note of a line: it is not to be made again."""
        if "key" in line:
            self._seen[line["key"]] = line["kind"]
            self._deaths = 0

    def again(self, spec: RunSpec, reason: str) -> _Attempt:
        """Return this attempt for another worker: what is left, more carefully each time.

        Raises `ErrataError` where there is no single case that could be given up.
        """
        failed = {key for key, kind in self._seen.items() if kind == "failure"}
        done = self.unit.done | self._seen.keys()
        unit = replace(self.unit, done=done, failed=self.unit.failed | failed)
        # Keys of the unit as the worker got it: the first one that is not done killed the worker,
        # even if a failure has made its line needless since.
        over = next((k for k in keys_of(spec, self.unit) if k not in done), "")
        self._deaths = self._deaths + 1 if over == self._over else 1
        self._over = over
        unit = replace(unit, careful=self._deaths == TRIES - 1)
        if self._deaths >= TRIES:
            left = [k for k in keys_of(spec, unit) if k not in {*unit.done, *unit.given_up}]
            if not left:
                raise errors.ErrataError(
                    f"A worker ended {TRIES} times over {unit.work!r} ({reason}). If the system "
                    "ran out of memory, use fewer --jobs or a smaller settings.batch_size."
                )
            why = f"WorkerDied: the worker process ended {TRIES} times over this case ({reason})"
            unit = replace(unit, given_up={**unit.given_up, left[0]: why})
            self._deaths = 0
        self.unit = unit
        return self


def sent_error(error: BaseException) -> tuple[str, str]:
    """Return what is sent of an error: not every exception survives being pickled."""
    return type(error).__name__, str(error)


def received_error(content: tuple[str, str]) -> errors.ErrataError:
    """Return the error that a worker sent, of its own class where that takes a message alone."""
    name, message = content
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, errors.ErrataError):
        if "__init__" not in vars(kind):
            return kind(message)
        return errors.ErrataError(message)
    return errors.ErrataError(f"A worker failed: {name}: {message}")


def threads_each(jobs: int, environment: Mapping[str, str]) -> int:
    """Return the threads per worker: those of one process, divided among the workers."""
    given = environment.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        whole = int(given)
    else:
        import torch

        whole = torch.get_num_threads()
    return max(1, whole // jobs)
