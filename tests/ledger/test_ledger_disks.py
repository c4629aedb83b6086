"""Disks that are full, read-only or slow to answer, and Ctrl-C: reported, and nothing changed."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errata.common import storage
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger
from errata.edits.ledger.schema import DATABASE, translated
from errata.errors import StorageError
from tests.ledger.ledger_helpers import (
    IDS,
    commit,
    content_of,
    open_,
    small_delta,
    small_edit,
    three_edits,
    unchanged,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A closed ledger with three edits, the second of them reverted."""
    return three_edits(tmp_path / "ledger")


def changes(ledger: Ledger) -> list[Callable[[], Any]]:
    return [
        lambda: commit(ledger, small_edit(), small_delta(70)),
        lambda: ledger.deactivate([IDS[0]]),
        lambda: ledger.activate([IDS[1]]),
        lambda: ledger.note("x", {"text": "y" * 50_000}),
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_disk_that_refuses_a_blob(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    with unchanged(folder) as ledger:
        owner = storage if step == "open" else storage.os
        with monkeypatch.context() as patch:
            patch.setattr(owner, step, refuse, raising=False)
            with pytest.raises(StorageError, match=os.strerror(code)):
                commit(ledger, small_edit(), small_delta(71))


@pytest.mark.parametrize("pragma", ["max_page_count = 1", "query_only = ON"])
def test_a_database_that_cannot_grow_or_be_written(folder: Path, pragma: str) -> None:
    with unchanged(folder) as ledger:
        ledger._database.rows(f"PRAGMA {pragma}")  # stands for a full or read-only disk
        uses = changes(ledger) if "query_only" in pragma else changes(ledger)[-1:]
        for use in uses:
            with pytest.raises(StorageError, match="Nothing was written"):
                use()
        ledger._database.rows("PRAGMA query_only = OFF")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of one megabyte, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        allowed = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        pytest.skip("mounting a small file system is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    folder = small_disk / "ledger"
    filler = small_disk / "filler"
    with open_(folder) as ledger:
        for seed, name in enumerate(IDS):
            commit(ledger, small_edit(f"Land {seed}", id=name), small_delta(seed))
        before = content_of(ledger)
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(2**20))
        with pytest.raises(StorageError):
            commit(ledger, small_edit(), small_delta(73))
        with pytest.raises(StorageError):
            ledger.note("x", {"text": "y" * 200_000})
        with pytest.raises(StorageError):
            ledger.export([IDS[0]], small_disk / "x.errata")
        assert content_of(ledger) == before
        assert ledger.verify() == []
        filler.unlink()
        commit(ledger, small_edit(), small_delta(73))
    with open_(folder) as ledger:
        assert ledger.verify() == []
        assert len(ledger.edits()) == 4
    assert {path.name for path in small_disk.iterdir()} == {"ledger"}


def test_a_disk_that_is_really_read_only(small_disk: Path, folder: Path) -> None:
    copy = small_disk / "ledger"
    shutil.copytree(folder, copy)
    remount = ["mount", "-o", "remount,ro", str(small_disk)]
    subprocess.run(remount, check=True, capture_output=True)
    for path in (copy, small_disk / "new"):
        with pytest.raises(StorageError):
            open_(path)
    with open_(folder) as ledger, open_(copy, readonly=True) as reader:
        assert content_of(reader) == content_of(ledger)
        assert reader.verify() == []
        with pytest.raises(StorageError):
            ledger.export(IDS, small_disk / "x.errata")


def long_edit() -> Edit:
    """Return an edit whose record takes more pages than a full disk has."""
    return small_edit().model_copy(update={"config": {"text": "y" * 50_000}})


def test_a_disk_that_fills_up_before_the_commit_keeps_no_file(folder: Path) -> None:
    with unchanged(folder) as ledger:
        (pages,) = ledger._database.rows("PRAGMA page_count")[0]
        ledger._database.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(StorageError, match="full"):
            commit(ledger, long_edit(), small_delta(76))
        assert not ledger._database.ready().in_transaction
        assert ledger.lost() == []
        entries = [(small_edit(), small_delta(77), True), (long_edit(), small_delta(78), True)]
        with pytest.raises(StorageError, match="full"):
            ledger.commit(entries)
        assert ledger.lost() == []


@pytest.mark.parametrize("by_itself", [True, False])
@pytest.mark.parametrize(("why", "refused", "certain"), [
    ("database or disk is full", ("COMMIT", "PRAGMA wal_checkpoint"), True),
    ("disk I/O error", ("COMMIT",), True),
    # A failed sync: pages of the change may be read at the next start.
    ("disk I/O error", ("COMMIT", "PRAGMA wal_checkpoint"), False),
])  # fmt: skip
def test_a_commit_that_fails_keeps_the_file_only_where_it_may_be_recorded(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
    refused: tuple[str, ...],
    certain: bool,
    by_itself: bool,
) -> None:
    with open_(folder) as ledger:
        before = content_of(ledger)
        database = ledger._database
        original = database.rows

        def fail(query: str, *values: Any) -> Any:
            if query.startswith(refused):
                if by_itself and query == "COMMIT":  # as SQLite does on some errors
                    original("ROLLBACK")
                with translated("here"):
                    raise sqlite3.OperationalError(why)
            return original(query, *values)

        with monkeypatch.context() as patch:
            patch.setattr(database, "rows", fail)
            with pytest.raises(StorageError, match=why) as raised:
                commit(ledger, small_edit(), small_delta(79))
        assert ("Nothing was written" in str(raised.value)) is certain
        assert ("may have been written, or not" in str(raised.value)) is not certain
        assert content_of(ledger) == before
        assert ledger.verify() == [], "no edit was reported that is not there"
        assert len(ledger.unreported()) == (0 if certain else 1)
        commit(ledger, small_edit(), small_delta(79))


def test_an_interrupt_right_before_the_change_is_stored_keeps_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unchanged(folder) as ledger:
        original = ledger._database.rows

        def interrupt(query: str, *values: Any) -> Any:
            if query == "COMMIT":
                raise KeyboardInterrupt
            return original(query, *values)

        with monkeypatch.context() as patch:
            patch.setattr(ledger._database, "rows", interrupt)
            with pytest.raises(KeyboardInterrupt):
                commit(ledger, small_edit(), small_delta(80))
        assert ledger.verify() == []


def test_an_interrupt_in_the_middle_of_a_change(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for target in ("flush", "write"):
        with unchanged(folder) as ledger:
            with monkeypatch.context() as patch:
                patch.setattr(ledger._database.files, target, interrupt)
                with pytest.raises(KeyboardInterrupt):
                    commit(ledger, small_edit(), small_delta(74))
            assert not ledger._database.ready().in_transaction


def test_an_interrupt_right_after_the_change_is_stored_keeps_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_(folder) as ledger:
        database = ledger._database
        original = database.rows

        def interrupt(query: str, *values: Any) -> Any:
            result = original(query, *values)
            if query == "COMMIT":
                raise KeyboardInterrupt
            return result

        with monkeypatch.context() as patch:
            patch.setattr(database, "rows", interrupt)
            with pytest.raises(KeyboardInterrupt):
                commit(ledger, small_edit(), small_delta(75))
        assert len(ledger.edits()) == 4
        assert ledger.verify() == []
        ledger.deactivate([IDS[0]])  # its own change is none by another process


def deleted(folder: Path) -> None:
    shutil.rmtree(folder)


def moved(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def replaced(folder: Path) -> None:
    copy = folder.with_name("copy.sqlite")
    shutil.copy(folder / DATABASE, copy)
    copy.replace(folder / DATABASE)


@pytest.mark.parametrize("lose", [deleted, moved, replaced])
def test_nothing_is_reported_as_recorded_in_a_database_that_is_not_there(
    folder: Path, lose: Callable[[Path], None]
) -> None:
    said = "was replaced by another file" if lose is replaced else "is gone: it was deleted or"
    with open_(folder) as ledger:
        edits = ledger.edits()
        lose(folder)
        there = sorted(folder.rglob("*"))
        for change in changes(ledger):
            with pytest.raises(StorageError, match=said):
                change()
        assert sorted(folder.rglob("*")) == there  # nor is the folder made again
        assert any(said in problem for problem in ledger.verify())
        assert ledger.edits() == edits
        if lose is moved:
            folder.with_name("elsewhere").rename(folder)
            assert ledger.verify() == []
            assert len(ledger.commit([(small_edit(), small_delta(70), True)])) == 1


def test_a_folder_that_is_deleted_during_a_change_records_nothing(folder: Path) -> None:
    with open_(folder) as ledger:
        before = ledger.ids()
        changing = ledger.transaction()
        changing.__enter__()
        commit(ledger, small_edit(), small_delta(70))
        (folder / DATABASE).unlink()
        with pytest.raises(StorageError, match="is gone"):
            changing.__exit__(None, None, None)
        assert ledger.ids() == before
