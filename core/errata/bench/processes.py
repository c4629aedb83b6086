"""Workers in processes of their own on this machine, each with its own copy of the model."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from errata.bench.config import BenchConfig
from errata.bench.engines import WorkerHandle, WorkerMessage, WorkerPool, sent_error, threads_each
from errata.bench.run_spec import RunSpec
from errata.errors import ErrataError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess
    from pathlib import Path

    from errata.bench.work_units import WorkUnit

logger = logging.getLogger("errata")
FINISH = 60.0  # seconds for the last check of a model


class ProcessEngine(WorkerPool):
    """Several spawned processes; lines come back through pipes.

    A program that uses it must be importable: as everywhere with spawned processes, start it
    under `if __name__ == "__main__":`.

    Args:
        jobs: how many processes; they share the threads that one would have.
    """

    def _start(self, spec: RunSpec) -> WorkerHandle:
        return _Process(spec, threads_each(self.jobs, os.environ))

    def _wait(self, handles: Sequence[WorkerHandle]) -> list[tuple[WorkerHandle, WorkerMessage]]:
        processes = [handle for handle in handles if isinstance(handle, _Process)]
        ready = set(wait([process.connection for process in processes]))
        return [(one, one.receive()) for one in processes if one.connection in ready]


class _Process:
    """One process."""

    def __init__(self, spec: RunSpec, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process: SpawnProcess = context.Process(
            target=_serve,
            args=(
                theirs,
                spec.config,
                spec.directory,
                spec.trusted,
                threads,
                logger.getEffectiveLevel(),
            ),
            daemon=True,
        )
        with _interrupts_blocked():
            self._process.start()
        theirs.close()  # so that its end is seen when it dies

    def send(self, unit: WorkUnit) -> None:
        try:
            self.connection.send(unit)
        except OSError:  # it died while it was idle: `receive` says so
            logger.debug("A worker was gone before its unit")

    def receive(self) -> WorkerMessage:
        try:
            message: WorkerMessage = self.connection.recv()
        except (EOFError, OSError):
            self._process.join(5)
            code = self._process.exitcode
            if code is not None and code < 0:
                return WorkerMessage("gone", f"killed by {signal.Signals(-code).name}")
            return WorkerMessage("gone", f"exit code {code}")
        return message

    def stop(self) -> None:
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self.connection.close()
        self._process.close()

    def finish(self) -> WorkerMessage:
        last = WorkerMessage("gone")
        try:
            self.connection.send(None)
            if self.connection.poll(FINISH):
                last = self.receive()
        except OSError:
            logger.debug("A worker was gone before it was asked to end")
        self._process.join(5)
        self.stop()
        return last


def _serve(
    connection: Connection[Any, Any],
    config: BenchConfig,
    directory: Path | None,
    trusted: bool,
    threads: int,
    level: int,
) -> None:
    """Carry out units until there are no more or nobody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    _end_with_the_parent()
    logger.setLevel(level)
    try:
        import torch
        import transformers

        from errata.bench.dispatch import carry_out
        from errata.bench.worker import Worker

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        worker = Worker(RunSpec(config, directory, trusted))
        while (unit := connection.recv()) is not None:
            for line in carry_out(worker, unit):
                connection.send(WorkerMessage("line", line))
            connection.send(WorkerMessage("done"))
        worker.close()
        connection.send(WorkerMessage("done"))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        os._exit(1)  # the parent is gone
    except Exception as error:
        if not isinstance(error, ErrataError):
            logger.error("A worker failed", exc_info=True)
        connection.send(WorkerMessage("error", sent_error(error)))


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Start processes that no Ctrl-C reaches, from their first moment on."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # started inside, it would let interrupts through
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _end_with_the_parent() -> None:
    """End this process within a moment when its parent is killed: it must not go on editing."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
