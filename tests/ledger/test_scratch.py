"""What killed processes leave behind is swept at the next open; a ledger is its owner's."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from errata.common.scratch import noted, sweep, unfinished
from errata.edits.ledger import Ledger
from tests.ledger.ledger_helpers import KINDS, add, open_, three_edits

KILLED = """
import os, signal, sys
from pathlib import Path
from errata.common.scratch import OLD, noted, unfinished

notes = []
for target in map(Path, sys.argv[1:]):
    scratch = unfinished(target)
    notes.append(noted(scratch, target))
    notes[-1].__enter__()
    if target.is_dir():
        (scratch / "new").mkdir(parents=True)
        target.rename(scratch / OLD)
    else:
        scratch.write_bytes(b"half")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_swept_at_the_next_open(tmp_path: Path) -> None:
    file, replaced, mine = tmp_path / "x.errata", tmp_path / "merged", tmp_path / ".mine.0.tmp"
    replaced.mkdir()
    (replaced / "weights").write_text("earlier")
    mine.write_text("not errata's")
    ended = subprocess.run([sys.executable, "-c", KILLED, file, replaced], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 3
    assert not replaced.exists()
    with Ledger.open(tmp_path / "ledger", kinds=KINDS):
        left = {path.name for path in tmp_path.iterdir()}
    assert left == {"ledger", "merged", ".mine.0.tmp"}
    assert (replaced / "weights").read_text() == "earlier"


def test_what_a_living_process_is_making_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "x.errata"
    scratch = unfinished(target)
    with noted(scratch, target):
        scratch.write_bytes(b"half")
        assert sweep() == []
        assert scratch.exists()
    assert scratch.exists()  # whoever made it cleans up; the note is gone
    assert sweep() == []


@pytest.mark.parametrize("name", ["thesis", ".x.errata.tmp", ".y.errata.0123456789ab.tmp"])
def test_a_forged_note_deletes_nothing_else(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / name
    victim.mkdir()
    # A cache of its own: in the one that tests share, another may be writing just now.
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))
    notes = tmp_path / "cache" / "unfinished"
    notes.mkdir(parents=True, exist_ok=True)
    about = {"scratch": str(victim), "target": str(tmp_path / "x.errata")}
    (notes / "0.json").write_text(json.dumps(about))
    (notes / "1.json").write_text("[1]")
    assert sweep() == []
    assert victim.exists()
    assert not list(notes.iterdir())


# -- whose a ledger is -----------------------------------------------------------------------------


def rights(folder: Path) -> set[int]:
    paths = [folder, *folder.rglob("*")]
    return {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths}


@pytest.fixture
def usual_umask() -> object:
    former = os.umask(0o022)
    yield
    os.umask(former)


@pytest.mark.usefixtures("usual_umask")
def test_only_the_owner_reads_a_ledger_also_one_that_was_open_to_all(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    assert rights(folder) == {0}
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    with open_(folder) as ledger:
        add(ledger)
        assert rights(folder) == {0}


@pytest.mark.usefixtures("usual_umask")
def test_a_folder_with_other_things_stays_open_and_the_ledger_in_it_is_closed(
    tmp_path: Path,
) -> None:
    (tmp_path / "notes.txt").write_text("for everybody")
    tmp_path.chmod(0o755)
    three_edits(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "notes.txt").stat().st_mode) == 0o644
    assert rights(tmp_path / "blobs") == {0}
    assert stat.S_IMODE((tmp_path / "ledger.sqlite").stat().st_mode) == 0o600
