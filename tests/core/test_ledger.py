"""The ledger: what was reported as done is there, whoever is killed, and nobody is overwritten."""

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
import torch

import errata
from errata.edit import Edit
from errata.errors import (
    IntegrityError,
    LedgerBusyError,
    LedgerChangedError,
    LedgerError,
    StorageError,
    UnknownNameError,
)
from errata.ledger import Ledger
from tests.core.ledger_writer import KINDS, POINTS, small_delta, small_edit
from tests.helpers import ROOT


@pytest.fixture(params=["folder", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    where = tmp_path / "ledger" if request.param == "folder" else None
    with Ledger.open(where, kinds=KINDS) as opened:
        yield opened
        assert opened.verify() == []


def add(ledger: Ledger, count: int = 1, active: bool = True) -> list[Edit]:
    start = ledger.next_sequence
    subjects = [f"Land {start + i}" for i in range(count)]
    entries = [(small_edit(s), small_delta(start + i), active) for i, s in enumerate(subjects)]
    return ledger.commit_many(entries)


def same_delta(first: Any, second: Any) -> bool:
    a, b = first.tensors(), second.tensors()
    return (
        type(first) is type(second)
        and first.metadata() == second.metadata()
        and a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
    )


# -- edits and events ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_an_edit_comes_back_as_it_was_recorded(ledger: Ledger, kind: str) -> None:
    given, delta = small_edit("道の国", kind), small_delta(1, kind)
    stored = ledger.commit(given, delta)
    assert (stored.sequence, stored.nbytes) == (1, delta.nbytes)
    assert ledger.get(given.id) == stored == ledger.edits()[0]
    assert stored.model_copy(update={"sequence": 0, "blob": "", "nbytes": 0}) == given
    assert same_delta(ledger.delta(given.id), delta)


def test_edits_are_in_order_and_every_change_is_an_event(ledger: Ledger) -> None:
    first, second, third = add(ledger, 3)
    assert ledger.deactivate([third.id, first.id[:6]]) == [first.id, third.id]
    ledger.activate([third.id])
    assert [edit.sequence for edit in ledger.edits()] == [1, 2, 3]
    assert ledger.active_ids() == [second.id, third.id]
    assert not ledger.is_active(first.id)
    assert [(event.kind, event.edit_id) for event in ledger.events(3)] == [
        ("revert", first.id),
        ("revert", third.id),
        ("apply", third.id),
    ]
    assert [event.number for event in ledger.events()] == list(range(1, 10))
    assert ledger.head == 9


def test_an_edit_may_be_recorded_without_being_applied(ledger: Ledger) -> None:
    (edit,) = add(ledger, active=False)
    assert ledger.active_ids() == []
    ledger.activate([edit.id])
    assert ledger.active_ids() == [edit.id]


def test_applying_twice_or_reverting_twice_is_an_error_and_changes_nothing(ledger: Ledger) -> None:
    first, second = add(ledger, 2)
    ledger.deactivate([second.id])
    with pytest.raises(LedgerError, match="already active"):
        ledger.activate([second.id, first.id])
    with pytest.raises(LedgerError, match="not active"):
        ledger.deactivate([first.id, second.id])
    assert ledger.active_ids() == [first.id]


def test_several_edits_are_recorded_all_or_none(ledger: Ledger) -> None:
    (kept,) = add(ledger)
    head = ledger.head
    entries = [(small_edit("A"), small_delta(5), True), (kept, small_delta(6), True)]
    with pytest.raises(LedgerError, match=f"{kept.id} is in the ledger"):
        ledger.commit_many(entries)
    assert ledger.ids() == [kept.id]
    assert ledger.head == head == len(ledger.events())


def test_a_transaction_is_taken_back_whole_and_an_inner_change_alone(ledger: Ledger) -> None:
    first, second = add(ledger, 2)

    def fail_half_way() -> None:
        with ledger.transaction():
            ledger.deactivate([first.id])
            add(ledger)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert ledger.active_ids() == [first.id, second.id]
    with ledger.transaction():
        ledger.deactivate([first.id])
        with pytest.raises(LedgerError):
            ledger.deactivate([second.id, first.id])
        (third,) = add(ledger)
    assert ledger.active_ids() == [second.id, third.id]
    assert ledger.head == len(ledger.events())


def test_measurements_are_kept_with_the_edit(ledger: Ledger) -> None:
    (edit,) = add(ledger)
    outcome = {"efficacy": {"value": 1.0, "n": 1, "protocol": "counterfact"}, "ppl": float("inf")}
    after = ledger.set_outcome(edit.id, outcome)
    assert after.outcome == {"efficacy": outcome["efficacy"], "ppl": "inf"}
    assert after == ledger.get(edit.id)
    assert after.model_copy(update={"outcome": {}}) == edit
    assert float(after.outcome["ppl"]) == float("inf")


def test_refusals_and_notes_are_kept_with_the_reason(ledger: Ledger) -> None:
    edit = small_edit()
    ledger.refuse(
        method="rome",
        requests=edit.requests,
        config={"layer": 3},
        reason="perplexity rose",
        measured={"ppl": float("nan"), "limit": 2.0},
    )
    ledger.note("model", {"name": "tiny"})
    (refused,) = ledger.refused()
    assert refused.detail["reason"] == "perplexity rose"
    assert refused.detail["measured"] == {"ppl": "nan", "limit": 2.0}
    assert refused.detail["requests"][0]["subject"] == "Veldonia"
    assert ledger.events(1)[0].detail == {"name": "tiny"}
    assert ledger.edits() == []
    for kind in ("edit", "Bad Kind", ""):
        with pytest.raises(LedgerError, match="no kind for a note"):
            ledger.note(kind, {})


def test_requests_are_found_by_digest_so_that_a_resumed_run_does_nothing_twice(
    ledger: Ledger,
) -> None:
    edits = add(ledger, 3)
    (again,) = ledger.commit_many([(small_edit("Land 2"), small_delta(9), False)])
    digests = [edit.requests[0].digest for edit in edits]
    assert ledger.find(digests[1:]) == {
        digests[1]: [edits[1].id, again.id],
        digests[2]: [edits[2].id],
    }
    assert ledger.find(["0" * 64]) == {}
    assert set(ledger.find()) == set(digests)
    assert len(ledger.find(digests + [f"{i:064x}" for i in range(2000)])) == 3


def test_an_edit_is_found_by_a_unique_beginning_of_its_id(ledger: Ledger) -> None:
    ids = ["aaaa00000001", "aaaa00000002", "bbbb00000003"]
    for seed, name in enumerate(ids):
        ledger.commit(small_edit(id=name), small_delta(seed))
    assert ledger.get("b").id == ids[2]
    with pytest.raises(UnknownNameError, match="give more digits") as caught:
        ledger.get("aaaa")
    assert caught.value.known == ids[:2]
    with pytest.raises(UnknownNameError, match=f"Did you mean '{ids[2]}'"):
        ledger.get("bbbb00000004")


def test_an_unknown_edit_among_thousands_gives_a_short_message(ledger: Ledger) -> None:
    add(ledger, 40)
    with pytest.raises(UnknownNameError, match="older ones") as caught:
        ledger.get("nonsense")
    assert len(str(caught.value)) < 400


def test_what_cannot_be_recorded_is_refused_by_name(ledger: Ledger) -> None:
    edit = small_edit().model_copy(update={"config": {"hook": {"fn": print}}})
    with pytest.raises(LedgerError, match=r"config\.hook\.fn"):
        ledger.commit(edit, small_delta(1))
    with pytest.raises(LedgerError, match="says its delta is 'low_rank'"):
        ledger.commit(small_edit(), small_delta(1, "dense"))
    assert ledger.events() == []


def test_a_kind_that_is_not_installed_is_named_and_the_record_stays_readable(
    tmp_path: Path,
) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        (edit,) = add(ledger)
    with Ledger.open(tmp_path, kinds={"dense": KINDS["dense"]}) as ledger:
        assert ledger.get(edit.id) == edit
        with pytest.raises(UnknownNameError, match="low_rank"):
            ledger.delta(edit.id)
        with pytest.raises(UnknownNameError, match="low_rank"):
            ledger.commit(small_edit(), small_delta(2))
        assert "low_rank" in ledger.verify()[0]


def test_a_ledger_opens_again_as_it_was_closed(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "new" / "ledger", kinds=KINDS) as ledger:
        edits = add(ledger, 3)
        ledger.deactivate([edits[1].id])
        events, head = ledger.events(), ledger.head
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.edits()
    with Ledger.open(tmp_path / "new" / "ledger", kinds=KINDS) as ledger:
        assert ledger.edits() == edits
        assert ledger.active_ids() == [edits[0].id, edits[2].id]
        assert (ledger.events(), ledger.head) == (events, head)
        assert ledger.verify() == []


def test_reading_only_changes_nothing_and_needs_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="There is no ledger"):
        Ledger.open(tmp_path / "none", kinds=KINDS, readonly=True)
    assert not (tmp_path / "none").exists()
    with Ledger.open(tmp_path / "ledger", kinds=KINDS) as ledger:
        edits = add(ledger, 2)
        with Ledger.open(tmp_path / "ledger", readonly=True) as reader:
            assert reader.edits() == edits
            with pytest.raises(LedgerError, match="reading only"):
                reader.note("x", {})
            add(ledger)
            assert len(reader.edits()) == 3


def test_records_are_read_without_importing_torch(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        add(ledger)
    code = (
        "import sys; from errata.ledger import Ledger\n"
        f"l = Ledger.open({str(tmp_path)!r}, readonly=True)\n"
        "assert len(l.edits()) == 1 and l.events() and 'torch' not in sys.modules"
    )
    core = str(Path(errata.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": core})


def test_equal_deltas_share_a_file_and_writing_one_again_heals_it(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        first = ledger.commit(small_edit("A"), small_delta(1))
        (path,) = (tmp_path / "blobs").glob("*/*.safetensors")
        path.write_bytes(b"damaged")
        second = ledger.commit(small_edit("B"), small_delta(1))
        assert first.blob == second.blob == path.stem
        assert ledger.verify() == []


# -- exchange --------------------------------------------------------------------------------------


def test_edits_move_to_another_ledger_as_one_file(ledger: Ledger, tmp_path: Path) -> None:
    edits = add(ledger, 3)
    dense = ledger.commit(small_edit("Dense", "dense"), small_delta(9, "dense"))
    path = ledger.export([dense.id, edits[2].id, edits[0].id], tmp_path / "slips.errata")
    pairs = ledger.read_export(path)
    assert [edit for edit, _ in pairs] == [edits[0], edits[2], dense]
    assert all(same_delta(delta, ledger.delta(edit.id)) for edit, delta in pairs)

    with Ledger.open(tmp_path / "other", kinds=KINDS) as other:
        add(other, 2)
        taken = other.import_(path)
        assert [edit.id for edit in taken] == [edits[0].id, edits[2].id, dense.id]
        assert [edit.sequence for edit in taken] == [3, 4, 5]
        assert not {edit.id for edit in taken} & set(other.active_ids())
        assert same_delta(other.delta(dense.id), ledger.delta(dense.id))
        assert other.verify() == []


def test_importing_again_changes_nothing_and_another_content_is_an_error(
    ledger: Ledger, tmp_path: Path
) -> None:
    first, second = add(ledger, 2)
    one = ledger.export([second.id], tmp_path / "one.errata")
    both = ledger.export([first.id, second.id], tmp_path / "both.errata")
    with Ledger.open(None, kinds=KINDS) as other:
        other.import_(one, active=True)
        other.set_outcome(second.id, {"measured": 1})
        taken = other.import_(both, active=True)
        assert [edit.id for edit in taken] == [first.id, second.id]
        assert taken[1].outcome == {"measured": 1}
        assert other.active_ids() == [second.id, first.id]
        head = other.head
        assert other.import_(both) == taken
        assert other.head == head
    with Ledger.open(None, kinds=KINDS) as other:
        other.commit(small_edit("Other", id=second.id), small_delta(77))
        with pytest.raises(IntegrityError, match=second.id):
            other.import_(both)
        assert other.ids() == [second.id]


def test_an_export_does_not_overwrite_unless_told(ledger: Ledger, tmp_path: Path) -> None:
    first, second = add(ledger, 2)
    path = tmp_path / "x.errata"
    ledger.export([first.id], path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="overwrite=True"):
        ledger.export([second.id], path)
    assert path.read_bytes() == before
    ledger.export([second.id], path, overwrite=True)
    assert [edit.id for edit, _ in ledger.read_export(path)] == [second.id]
    with pytest.raises(LedgerError, match="No edits"):
        ledger.export([], tmp_path / "empty.errata")
    with pytest.raises(UnknownNameError):
        ledger.export(["ffffffffffff"], tmp_path / "unknown.errata")
    with pytest.raises(StorageError):
        ledger.export([first.id], tmp_path / "missing" / "x.errata")


def test_a_thousand_edits_fit_into_one_file(tmp_path: Path) -> None:
    with Ledger.open(None, kinds=KINDS) as ledger, Ledger.open(None, kinds=KINDS) as other:
        edits = add(ledger, 1000)
        path = ledger.export([edit.id for edit in edits], tmp_path / "many.errata")
        assert [edit.id for edit in other.import_(path)] == [edit.id for edit in edits]


# -- two at once -----------------------------------------------------------------------------------


class Writers:
    """A process that forks writers which can be killed."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.core.ledger_writer"],
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


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.005)


def test_a_second_writer_waits_and_then_succeeds(tmp_path: Path, writers: Writers) -> None:
    held, release = tmp_path / "held", tmp_path / "release"
    with Ledger.open(tmp_path / "ledger", kinds=KINDS, timeout=60) as ledger:
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


def test_a_second_writer_that_waits_too_long_is_told(tmp_path: Path, writers: Writers) -> None:
    held, release = tmp_path / "held", tmp_path / "release"
    with Ledger.open(tmp_path / "ledger", kinds=KINDS, timeout=0.05) as ledger:
        task = {"do": "hold", "ledger": tmp_path / "ledger", "report": held, "release": release}
        writers.start(**task, commits=True)
        wait_for(held)
        with pytest.raises(LedgerBusyError, match=r"0\.05 s"):
            add(ledger)
        assert ledger.edits() == []  # reading never waits
        with Ledger.open(tmp_path / "ledger", kinds=KINDS, timeout=0.05) as third:
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
        two.set_outcome(edit.id, {"x": 1})
        with pytest.raises(LedgerChangedError):
            add(two)
        add(one)
        two.refresh()
        add(two)
        assert one.get(edit.id).outcome == {"x": 1}
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
        assert ledger.verify() == []
        active = set(ledger.active_ids())
        state = {name: name in active for name in ledger.ids()}
        assert state in (done, pending)
        assert all(same_delta(ledger.delta(name), small_delta(int(name, 16))) for name in state)
    assert not list((folder / "tmp").glob(".*"))
    report.unlink(missing_ok=True)
    return state, state == pending != done


def test_killed_at_fifty_random_moments_it_holds_every_edit_reported_as_done(
    tmp_path: Path, writers: Writers
) -> None:
    folder, report = tmp_path / "ledger", tmp_path / "report"
    choose = random.Random(0)
    state: State = {}
    for kill in range(50):
        child = writers.start(do="write", ledger=folder, report=report, seed=kill)
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
