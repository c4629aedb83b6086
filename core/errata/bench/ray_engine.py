"""Workers as Ray actors: on this machine, or on a cluster that shares the run's directory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from errata.bench.engines import WorkerHandle, WorkerMessage, WorkerPool, sent_error, threads_each
from errata.errors import MissingExtraError, reason_of

if TYPE_CHECKING:
    from pathlib import Path

    from errata.bench.config import BenchConfig
    from errata.bench.run_spec import RunSpec
    from errata.bench.work_units import WorkUnit


class RayEngine(WorkerPool):
    """Ray actors, one model each; lines come back as they are made.

    Without a cluster a local one is started and stopped again. On a cluster the run's directory
    and its data must be on storage that every node sees under the same path: workers read the
    base's answers there and keep the ledgers of streams there.

    Args:
        jobs: how many actors; they share the threads that one process would have.
        address: of a running cluster ("auto" finds it); None starts one here.

    Raises:
        MissingExtraError: Ray is not installed.
    """

    def __init__(self, jobs: int, address: str | None = None) -> None:
        super().__init__(jobs)
        try:
            import ray
        except ImportError:
            raise MissingExtraError("The engine 'ray'", "ray", "ray") from None
        self._ray: Any = ray
        self._address = address
        self._ours = False

    def _start(self, spec: RunSpec) -> WorkerHandle:
        if not self._ray.is_initialized():
            self._initialise()
        threads = threads_each(self.jobs, os.environ)
        gpus = 1 if (spec.config.device or "").startswith("cuda") else 0
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": 0}
        actor = self._ray.remote(**options)(_Actor)
        made = actor.remote(spec.config, spec.directory, spec.trusted, threads)
        return _Remote(self._ray, made)

    def _initialise(self) -> None:
        options: dict[str, Any] = {
            "log_to_driver": False,
            "configure_logging": False,
            "logging_level": "ERROR",
        }
        if self._address is not None:
            self._ray.init(address=self._address, **options)
        else:
            path = os.pathsep.join(entry for entry in sys.path if entry)
            self._ray.init(
                address="local",
                num_cpus=self.jobs,
                include_dashboard=False,
                runtime_env={"env_vars": {"PYTHONPATH": path}},
                **options,
            )
        self._ours = True

    def _wait(self, handles: Sequence[WorkerHandle]) -> list[tuple[WorkerHandle, WorkerMessage]]:
        remote = [handle for handle in handles if isinstance(handle, _Remote)]
        ready, _ = self._ray.wait([one.lines for one in remote], num_returns=1, fetch_local=False)
        return [(one, one.receive()) for one in remote if any(one.lines is r for r in ready)]

    def close(self) -> None:
        """End the actors, and the local cluster if this engine started it."""
        try:
            super().close()
        finally:
            if self._ours and self._ray.is_initialized():
                self._ray.shutdown()
            self._ours = False


class _Remote:
    """One actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self.lines: Any = None

    def send(self, unit: WorkUnit) -> None:
        self.lines = self._actor.carry_out.options(num_returns="streaming").remote(unit)

    def receive(self) -> WorkerMessage:
        try:
            kind, content = self._ray.get(next(self.lines))
        except StopIteration:
            return WorkerMessage("done")
        except self._ray.exceptions.RayActorError as error:
            return WorkerMessage("gone", reason_of(error))
        return WorkerMessage(kind, content)

    def stop(self) -> None:
        self._ray.kill(self._actor)

    def finish(self) -> WorkerMessage:
        try:
            kind, content = self._ray.get(self._actor.close.remote())
        except self._ray.exceptions.RayActorError:
            return WorkerMessage("gone")
        finally:
            self.stop()
        return WorkerMessage(kind, content)


class _Actor:
    """What runs in an actor's process."""

    def __init__(
        self, config: BenchConfig, directory: Path | None, trusted: bool, threads: int
    ) -> None:
        import torch
        import transformers

        from errata.bench.run_spec import RunSpec
        from errata.bench.worker import Worker

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self._worker = Worker(RunSpec(config, directory, trusted))

    def carry_out(self, unit: WorkUnit) -> Iterator[tuple[str, Any]]:
        """Yield (kind, content) of messages; the end of the stream says that it is done."""
        from errata.bench.dispatch import carry_out

        try:
            for line in carry_out(self._worker, unit):
                yield "line", line
        except Exception as error:
            yield "error", sent_error(error)

    def close(self) -> tuple[str, Any]:
        """Check that the model is its base again."""
        try:
            self._worker.close()
        except Exception as error:
            return "error", sent_error(error)
        return "done", None
