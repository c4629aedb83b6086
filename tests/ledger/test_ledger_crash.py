"""Several processes on one ledger, and processes that are killed while they write."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.edits.ledger import Ledger, schema
from errata.errors import LedgerBusyError, LedgerChangedError, LedgerError
from tests.helpers import ROOT
from tests.ledger.ledger_helpers import KINDS, add, same_delta, small_delta
from tests.ledger.ledger_writer import POINTS

# -- two at once -----------------------------------------------------------------------------------


class Writers:
    """A process that forks writers which can be killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.ledger.ledger_writer"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )

    def start(self, **task: Any) -> int:
        """Start a child on a task; return its process id."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task, default=str) + "\n")
        return self._number()

    def wait(self) -> int:
        """Wait for the child; return its exit code (negative for a signal)."""
        return self._number()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def writers() -> Iterator[Writers]:
    made = Writers()
    yield made
    made.close()


def wait_for(path: Path, text: str = "") -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.005)


@pytest.mark.slow
def test_a_second_writer_waits_and_then_succeeds(
    tmp_path: Path, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TIMEOUT", 60.0)
    held, release = tmp_path / "held", tmp_path / "release"
    with Ledger.open(tmp_path / "ledger", kinds=KINDS) as ledger:
        task = {"do": "hold", "ledger": tmp_path / "ledger", "report": held, "release": release}
        writers.start(**task, commits=False)
        wait_for(held)
        letting_go = threading.Timer(0.2, release.touch)
        letting_go.start()
        (edit,) = add(ledger)
        assert release.exists()
        letting_go.join()
        assert writers.wait() == 0
        assert ledger.ids() == [edit.id]


def test_a_second_writer_that_waits_too_long_is_told(
    tmp_path: Path, writers: Writers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "TIMEOUT", 0.05)
    held, release = tmp_path / "held", tmp_path / "release"
    with Ledger.open(tmp_path / "ledger", kinds=KINDS) as ledger:
        task = {"do": "hold", "ledger": tmp_path / "ledger", "report": held, "release": release}
        writers.start(**task, commits=True)
        wait_for(held)
        with pytest.raises(LedgerBusyError, match=r"0\.05 s"):
            add(ledger)
        assert ledger.edits() == []  # reading never waits
        with Ledger.open(tmp_path / "ledger", kinds=KINDS) as third:
            assert third.edits() == []
        release.touch()
        assert writers.wait() == 0
        with pytest.raises(LedgerChangedError, match="new edits: "):
            add(ledger)
        ledger.refresh()
        add(ledger)
        assert [edit.requests[0].subject for edit in ledger.edits()] == ["Elsewhere", "Land 2"]
        assert ledger.verify() == []


def test_a_write_by_another_is_named_and_refresh_returns_what_was_missed(tmp_path: Path) -> None:
    with (
        Ledger.open(tmp_path, kinds=KINDS) as one,
        Ledger.open(tmp_path, kinds=KINDS) as two,
    ):
        first, second = add(one, 2)
        for change in (
            lambda: add(two),
            lambda: two.deactivate([first.id]),
            lambda: two.import_(one.export([first.id], tmp_path / "x", overwrite=True)),
        ):
            with pytest.raises(LedgerChangedError, match=f"{first.id}, {second.id}"):
                change()
        assert one.ids() == [first.id, second.id]
        assert [event.kind for event in two.refresh()] == ["edit", "apply"] * 2
        assert two.refresh() == []
        two.deactivate([first.id])
        with pytest.raises(LedgerChangedError, match=f"reverted: {first.id}"):
            one.deactivate([second.id])
        assert one.refresh()[0].kind == "revert"
        one.deactivate([second.id])
        assert one.active_ids() == []


def test_refusals_measurements_and_notes_of_another_do_not_stand_in_the_way(
    tmp_path: Path,
) -> None:
    with (
        Ledger.open(tmp_path, kinds=KINDS) as one,
        Ledger.open(tmp_path, kinds=KINDS) as two,
    ):
        (edit,) = add(one)
        two.note("seen", {})  # while an edit of the other was missed
        two.note("seen", {}, edit.id)
        with pytest.raises(LedgerChangedError):
            add(two)
        add(one)
        two.refresh()
        add(two)
        assert one.verify() == []


def test_a_ledger_is_not_carried_across_a_fork(tmp_path: Path, writers: Writers) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        (edit,) = add(ledger)
        ledger._database._process += 1  # what a child would see
        with pytest.raises(LedgerError, match="another process"):
            ledger.edits()
        ledger._database._process -= 1
        assert ledger.ids() == [edit.id]


# -- killed ----------------------------------------------------------------------------------------

State = dict[str, bool]


def replay(lines: list[str], state: State) -> tuple[State, State]:
    """Return what must be there after the changes reported as done, and with the one in flight."""
    done = pending = dict(state)
    for line in lines:
        what, *rest = line.split()
        if what == "done":
            done = pending
            continue
        pending = {**done, **dict.fromkeys(rest[1:], rest[0] != "off")}
    return done, pending


def check_after_kill(folder: Path, report: Path, before: State) -> tuple[State, bool]:
    lines = report.read_text().splitlines() if report.exists() else []
    done, pending = replay(lines, before)
    with Ledger.open(folder, kinds=KINDS) as ledger:
        # At worst the files of the change that was in flight are left, which is no fault.
        assert ledger.verify() == []
        assert ledger.lost() == []
        active = set(ledger.active_ids())
        state = {name: name in active for name in ledger.ids()}
        assert state in (done, pending)
        assert all(same_delta(ledger.delta(name), small_delta(int(name, 16))) for name in state)
    assert not list((folder / "tmp").glob(".*"))
    report.unlink(missing_ok=True)
    return state, state == pending != done


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_holds_every_edit_reported_as_done(
    tmp_path: Path, writers: Writers, kills: int
) -> None:
    folder, report = tmp_path / "ledger", tmp_path / "report"
    choose = random.Random(0)
    state: State = {}
    for kill in range(kills):
        child = writers.start(do="write", ledger=folder, report=report, seed=kill)
        if kill % 4 == 0:  # on a busy disk the pause alone may end before anything is written
            wait_for(report, "done")
        time.sleep(choose.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        assert writers.wait() == -signal.SIGKILL
        state, _ = check_after_kill(folder, report, state)
    assert state


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_chosen_point_of_a_change(tmp_path: Path, writers: Writers, point: str) -> None:
    folder, report = tmp_path / "ledger", tmp_path / "report"
    state: State = {}
    kept = []
    for seed in range(4):
        writers.start(do="write", ledger=folder, report=report, seed=seed, die=point)
        assert writers.wait() == -signal.SIGKILL
        state, in_flight_is_there = check_after_kill(folder, report, state)
        kept.append(in_flight_is_there)
    assert all(kept) == any(kept) == (point == "after commit")


def test_a_temporary_file_is_left_alone_while_its_writer_lives(
    tmp_path: Path, writers: Writers
) -> None:
    folder, held, release = tmp_path / "ledger", tmp_path / "held", tmp_path / "release"
    with Ledger.open(folder, kinds=KINDS) as ledger:
        add(ledger)
    orphan = folder / "tmp" / ".half.tmp"
    writers.start(do="hold", ledger=folder, report=held, release=release, commits=False)
    wait_for(held)
    orphan.write_bytes(b"half")
    Ledger.open(folder, kinds=KINDS).close()
    assert orphan.exists()
    release.touch()
    assert writers.wait() == 0
    Ledger.open(folder, kinds=KINDS).close()
    assert not orphan.exists()


@pytest.mark.slow
def test_a_limit_on_file_sizes_stops_the_writer_with_one_clear_error(
    tmp_path: Path, writers: Writers
) -> None:
    report, folder = tmp_path / "report", tmp_path / "ledger"
    writers.start(do="fill", ledger=folder, report=report, limit=200_000)
    assert writers.wait() == 0
    assert report.read_text() == "StorageError"
    with Ledger.open(folder, kinds=KINDS) as ledger:
        assert ledger.verify() == []
        before = len(ledger.edits())
        assert before > 0
        add(ledger)
        assert len(ledger.edits()) == before + 1
