"""Engines: several processes and Ray give what one process gives, and survive what kills them."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata import bench
from errata.bench.engines import (
    TRIES,
    WorkerHandle,
    WorkerMessage,
    WorkerPool,
    received_error,
    sent_error,
    threads_each,
)
from errata.bench.run_spec import RunSpec
from errata.bench.work_units import WorkUnit, keys_of
from errata.errors import (
    ConfigError,
    EditRefused,
    ErrataError,
    IntegrityError,
    MissingExtraError,
    StorageError,
    UnknownNameError,
)
from tests.bench.bench_helpers import SUBJECTS, short, values

STREAM = short(regime="sequential", limit=2, checkpoints=[1])


@pytest.fixture(autouse=True)
def one_thread(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def fatal(folder: Path, subject: str, once: bool) -> dict[str, Any]:
    marker = str(folder / "died") if once else ""
    return {"method": "nudge", "config": {"die_on": subject, "die_once": marker}}


def same(folder: Path, other: Path, but: tuple[str, ...] = ()) -> bool:
    """Compare two runs whose variants differ in the ways they die."""
    one, two = values(folder), values(other)
    return {k: v for k, v in one.items() if k not in but} == {
        k: v for k, v in two.items() if k not in but
    }


@pytest.mark.slow
def test_processes_give_what_one_process_gives_even_when_one_dies(tmp_path: Path) -> None:
    bench.run(short(limit=4), tmp_path / "serial")
    dying = [fatal(tmp_path, SUBJECTS[2], once=True)]
    bench.run(short(limit=4, methods=dying), tmp_path / "processes", engine=bench.ProcessEngine(2))
    assert (tmp_path / "died").exists()
    assert same(tmp_path / "processes", tmp_path / "serial")


@pytest.mark.slow
def test_a_case_that_kills_every_worker_is_given_up_and_the_stream_goes_on(
    tmp_path: Path,
) -> None:
    dying = [fatal(tmp_path, SUBJECTS[0], once=False), {"method": "nudge", "variant": "well"}]
    run = bench.run({**STREAM, "methods": dying}, tmp_path, engine=bench.ProcessEngine(2))
    (failure,) = run.failures()
    assert failure["key"] == "nudge|atlas|0|immediate|1|0"
    assert "ended 3 times over this case (killed by SIGKILL)" in failure["error"]
    lines = values(tmp_path)
    assert lines["nudge|atlas|0|checkpoint|2|1"]["edit"]["ids"] == 1
    assert lines["well|atlas|0|checkpoint|2|0"]["kind"] == "case"
    # Going on finds nothing to do, and starts no process that could die again.
    assert len(list(bench.run({**STREAM, "methods": dying}, tmp_path))) == len(lines)


@pytest.mark.slow
def test_an_error_about_the_run_comes_back_from_a_worker(tmp_path: Path) -> None:
    with pytest.raises(ErrataError, match="holds no model"):
        bench.run(short(model=str(tmp_path)), tmp_path / "run", engine=bench.ProcessEngine(1))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra 'ray'")
def test_ray_gives_what_one_process_gives_even_when_an_actor_dies(tmp_path: Path) -> None:
    bench.run(STREAM, tmp_path / "serial")
    dying = [fatal(tmp_path, SUBJECTS[1], once=True)]
    engine = bench.RayEngine(2)
    bench.run({**STREAM, "methods": dying}, tmp_path / "ray", engine=engine)
    assert (tmp_path / "died").exists()
    assert same(tmp_path / "ray", tmp_path / "serial")


def test_without_ray_the_engine_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"errata\[ray\]"):
        bench.RayEngine(2)


def test_no_job_makes_no_sense() -> None:
    with pytest.raises(ConfigError, match="jobs=0"):
        bench.ProcessEngine(0)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (StorageError("full"), StorageError),
        (IntegrityError("bad"), IntegrityError),
        (UnknownNameError("method", "x", ["y"]), ErrataError),
        (EditRefused("no", {}), ErrataError),
        (ZeroDivisionError("x"), ErrataError),
    ],
)
def test_an_error_crosses_processes_with_its_message(
    error: Exception, kind: type[Exception]
) -> None:
    there = received_error(sent_error(error))
    assert type(there) is kind
    assert str(error) in str(there)


def test_threads_are_divided() -> None:
    assert threads_each(4, {"OMP_NUM_THREADS": "8"}) == 2
    assert threads_each(4, {"OMP_NUM_THREADS": "2"}) == 1
    assert threads_each(1, {}) >= 1


# -- what a pool does about deaths, without processes ----------------------------------------------


class Scripted(WorkerPool):
    """Workers that write every line at once, except that some keys kill them."""

    def __init__(self, jobs: int, deadly: dict[str, int]) -> None:
        super().__init__(jobs)
        self.deadly = deadly  # key → how often it kills
        self.started: list[WorkUnit] = []
        self._said: dict[WorkerHandle, list[WorkerMessage]] = {}

    def _start(self, spec: RunSpec) -> WorkerHandle:
        pool = self

        class Puppet:
            def send(self, unit: WorkUnit) -> None:
                pool.started.append(unit)
                pool._said[self] = list(pool.script(spec, unit))

            def stop(self) -> None:
                pool._said.pop(self, None)

            def finish(self) -> WorkerMessage:
                return WorkerMessage("done")

        return Puppet()

    def script(self, spec: RunSpec, unit: WorkUnit) -> Iterator[WorkerMessage]:
        for key in keys_of(spec, unit):
            if key in unit.done:
                continue
            if key not in unit.given_up and self.deadly.get(key, 0):
                self.deadly[key] -= 1
                yield WorkerMessage("gone", "killed")
                return
            kind = "failure" if key in unit.given_up else "case"
            yield WorkerMessage("line", {"key": key, "kind": kind})
        yield WorkerMessage("done")

    def _wait(self, handles: Sequence[WorkerHandle]) -> list[tuple[WorkerHandle, WorkerMessage]]:
        return [(handle, self._said[handle].pop(0)) for handle in handles]


@pytest.fixture(scope="module")
def spec(site: Path) -> RunSpec:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        made = RunSpec(
            bench.BenchConfig.parse(short(regime="sequential", limit=3, checkpoints=[2]))
        )
        assert made.measuring
    return made


@given(
    deadly=st.dictionaries(st.integers(0, 7), st.integers(1, 4), max_size=3),
    jobs=st.integers(1, 3),
)
def test_however_workers_die_each_line_comes_once(
    spec: RunSpec, deadly: dict[int, int], jobs: int
) -> None:
    unit = WorkUnit("stream", 0, 0, 0, tuple(spec.stream(0, 0)))
    keys = list(keys_of(spec, unit))
    assert len(keys) == 3 + 2 + 3
    pool = Scripted(jobs, {keys[place]: times for place, times in deadly.items()})
    lines = list(pool.run(spec, [unit]))
    failed = {keys[place] for place, times in deadly.items() if times >= TRIES}
    came = [line["key"] for line in lines]
    # What fails at once is not looked for again at checkpoints.
    assert len(set(came)) == len(came)
    assert failed <= {line["key"] for line in lines if line["kind"] == "failure"} | (
        set(keys) - set(came)
    )
    assert {line["key"] for line in lines if line["kind"] == "failure"} <= failed
    assert set(keys) - set(came) <= {key for key in keys if "checkpoint" in key}
    deaths = sum(min(times, TRIES) for times in deadly.values())
    assert len(pool.started) <= deaths + 1


def test_before_a_case_is_given_up_it_is_tried_with_care(spec: RunSpec) -> None:
    unit = WorkUnit("stream", 0, 0, 0, tuple(spec.stream(0, 0)))
    first = next(keys_of(spec, unit))
    pool = Scripted(1, {first: 99})
    lines = list(pool.run(spec, [unit]))
    assert [started.careful for started in pool.started] == [False, False, True, False]
    assert lines[0]["kind"] == "failure"
    assert pool.started[-1].given_up[first].startswith("WorkerDied")


def test_workers_that_all_die_at_once_end_the_run(spec: RunSpec) -> None:
    class Stillborn(Scripted):
        def script(self, spec: RunSpec, unit: WorkUnit) -> Iterator[WorkerMessage]:
            yield WorkerMessage("gone", "killed")

    with pytest.raises(ErrataError, match=r"in a row.*fewer --jobs"):
        list(
            Stillborn(2, {}).run(spec, [WorkUnit("stream", 0, 0, 0, tuple(spec.stream(0, 0)))] * 5)
        )
