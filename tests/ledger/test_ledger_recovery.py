"""Edits whose files are there and whose records are lost: named, and taken back in."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import Editor
from errata.cli.app import app
from errata.common.storage import sha256
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger, content
from errata.edits.ledger.schema import DATABASE
from errata.errors import IntegrityError, LedgerError
from tests.ledger.ledger_helpers import (
    IDS,
    add,
    commit,
    content_of,
    open_,
    same_delta,
    small_delta,
    small_edit,
    three_edits,
)

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}


def a_lost_tail(tmp_path: Path) -> tuple[Path, list[Edit]]:
    """Return a ledger whose write-ahead file went with all that came after three edits."""
    folder = three_edits(tmp_path / "ledger")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    with open_(folder) as whole:
        add(whole, 2)
        expected = whole.edits()
    for blob in (folder / "blobs").rglob("*.safetensors"):
        there = copy / blob.relative_to(folder)
        there.parent.mkdir(exist_ok=True)
        shutil.copy(blob, there)
    return copy, expected


def test_edits_of_a_lost_write_ahead_file_are_named_and_taken_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, expected = a_lost_tail(tmp_path)
    with caplog.at_level(logging.WARNING, "errata"), open_(folder) as ledger:
        assert "has no record of 2 of the files" in caplog.text
        assert "errata log --recover" in caplog.text
        assert ledger.ids() == IDS
        (problem,) = ledger.verify()
        assert "has no record of 2 of the files" in problem
        records, refused = ledger.recover()
        assert refused == {}
        assert records == expected[3:]  # to the last field
        assert ledger.edits() == expected
        assert ledger.active_ids() == [IDS[0], IDS[2]]  # what was reverted since is not known
        assert all(same_delta(ledger.delta(e.id), small_delta(e.sequence)) for e in records)
        assert ledger.verify() == []
        assert ledger.recover() == ([], {})


def test_a_whole_lost_database_comes_back_in_the_order_of_its_edits(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    with open_(folder) as ledger:
        expected = ledger.edits()
    (folder / DATABASE).unlink()
    with pytest.raises(IntegrityError, match=r"errata log --recover.*recover=True"):
        open_(folder)
    with open_(folder, recover=True) as ledger:
        records, refused = ledger.recover()
        assert (records, refused) == (expected, {})
        assert ledger.active_ids() == []
    with open_(folder) as ledger:
        assert ledger.verify() == []
        assert ledger.edits() == expected


def test_what_is_not_sound_is_refused_by_name_and_the_rest_comes_back(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    with open_(folder) as ledger:
        blobs = [edit.blob for edit in ledger.edits()]
        record = json.loads(ledger.edits()[0].model_dump_json())
    (folder / DATABASE).unlink()
    damaged = folder / "blobs" / blobs[1][:2] / f"{blobs[1]}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    parts = content.take(small_delta(50))
    forged = {
        "older": content.encode(parts, None),  # type: ignore[arg-type]
        "no record": content.encode(parts, {**record, "id": "../../etc"}),
        "another kind": content.encode(parts, {**record, "delta_kind": "dense"}),
        "another size": content.encode(parts, {**record, "nbytes": 1}),
        "twice": content.encode(parts, {**record, "sequence": 9, "nbytes": small_delta(50).nbytes}),
    }
    for data in forged.values():
        digest = sha256(data)
        there = folder / "blobs" / digest[:2] / f"{digest}.safetensors"
        there.parent.mkdir(exist_ok=True)
        there.write_bytes(data)
    with open_(folder, recover=True) as ledger:
        records, refused = ledger.recover()
        assert [edit.id for edit in records] == [IDS[0], IDS[2]]
        reasons = {name: refused[sha256(data)] for name, data in forged.items()}
        assert "holds no record" in reasons["older"]
        assert "no sound record: id" in reasons["no record"]
        assert "of kind 'low_rank'" in reasons["another kind"]
        assert "its record says 1" in reasons["another size"]
        assert "already" in reasons["twice"]
        assert "SHA-256" in refused[blobs[1]]
        assert len(refused) == 6


def test_the_command_line_recovers(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    (folder / DATABASE).unlink()
    run = CliRunner()
    lost = run.invoke(app, ["log", "--ledger", str(folder)])
    assert lost.exit_code == 1
    assert "log --recover" in " ".join(lost.output.split())
    examined = run.invoke(app, ["doctor", "--ledger", str(folder), "--json"])
    assert any("log --recover" in text for text in json.loads(examined.stdout)["problems"])
    back = run.invoke(app, ["log", "--ledger", str(folder), "--recover", "--json"])
    assert back.exit_code == 0, back.output
    assert IDS[2] in back.output
    after = run.invoke(app, ["log", "--ledger", str(folder), "--json"])
    assert [edit["active"] for edit in json.loads(after.stdout)["edits"]] == [False] * 3


def a_killed_change(tmp_path: Path) -> tuple[Path, list[Edit]]:
    """Return a ledger as it is when a process is killed before it records two edits of a call."""
    folder, killed = three_edits(tmp_path / "ledger"), tmp_path / "killed"
    entries = [(small_edit(f"Isle {i}"), small_delta(60 + i), True) for i in range(2)]
    with open_(folder) as ledger, ledger.transaction():
        edits = ledger.commit(entries)
        shutil.copytree(folder, killed)
    return killed, edits


def test_what_a_killed_process_left_is_no_fault_and_can_be_discarded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, edits = a_killed_change(tmp_path)
    with caplog.at_level(logging.WARNING, "errata"), open_(folder) as ledger:
        assert caplog.text == ""
        assert ledger.verify() == ledger.lost() == []
        assert ledger.unreported() == sorted(edit.blob for edit in edits)
        add(ledger)  # what others write meanwhile does not end the killed change
    with open_(folder) as ledger:
        before = ledger.edits()
        assert ledger.discard_lost() == sorted(edit.blob for edit in edits)
        assert ledger.unreported() == ledger.discard_lost() == ledger.verify() == []
        assert ledger.edits() == before
        assert ledger.events()[-1].kind == "discard"
        assert all(ledger.delta(edit.id) for edit in before)
    open_(folder).close()
    assert list((folder / "tmp").iterdir()) == []


def test_what_a_killed_process_left_can_be_taken_in(tmp_path: Path) -> None:
    folder, edits = a_killed_change(tmp_path)
    with open_(folder) as ledger:
        records, refused = ledger.recover()
        assert ([record.id for record in records], refused) == ([e.id for e in edits], {})
        assert ledger.unreported() == ledger.verify() == []
        assert set(ledger.active_ids()) == {IDS[0], IDS[2]}


def test_the_command_line_names_what_a_killed_process_left_and_discards_it(tmp_path: Path) -> None:
    folder, _ = a_killed_change(tmp_path)
    run, at = CliRunner(), ["--ledger", str(folder)]
    found = run.invoke(app, ["verify", "--ledger-only", *at])
    assert found.exit_code == 0, found.output
    text = " ".join(found.output.split())
    assert "Note: 2 of the files" in text
    assert "Sound." in text
    assert all(way in text for way in ("log --discard-lost", "log --recover"))
    data = json.loads(run.invoke(app, ["verify", "--ledger-only", "--json", *at]).stdout)
    assert (data["sound"], data["problems"], len(data["notes"])) == (True, [], 1)
    gone = run.invoke(app, ["log", "--discard-lost", *at])
    assert gone.exit_code == 0, gone.output
    assert "2 files without a record deleted" in " ".join(gone.output.split())
    data = json.loads(run.invoke(app, ["verify", "--ledger-only", "--json", *at]).stdout)
    assert (data["sound"], data["notes"]) == (True, [])


def test_edits_whose_record_was_lost_can_be_discarded_too(tmp_path: Path) -> None:
    folder, _ = a_lost_tail(tmp_path)
    with open_(folder) as ledger:
        assert len(ledger.lost()) == 2
        (problem,) = ledger.verify()
        assert "--discard-lost" in problem
        assert len(ledger.discard_lost()) == 2
        assert ledger.verify() == []
        assert ledger.ids() == IDS


def random_bytes(file: Path) -> None:
    file.write_bytes(bytes(range(256)) * 40)


def cut_off(file: Path) -> None:
    os.truncate(file, 5000)


def stump(file: Path) -> None:
    os.truncate(file, 300)


def other_tables(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE requests")


def emptied(file: Path) -> None:
    os.truncate(file, 0)


@pytest.mark.parametrize("damage", [random_bytes, cut_off, stump, other_tables, emptied])
def test_a_damaged_database_is_set_aside_and_the_edits_come_back(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = three_edits(tmp_path / "ledger")
    with open_(folder) as ledger:
        expected = ledger.edits()
    damage(folder / DATABASE)
    damaged = (folder / DATABASE).read_bytes()
    run = CliRunner()
    refused = run.invoke(app, ["log", "--ledger", str(folder)])
    assert refused.exit_code == 1
    assert "errata log --recover" in " ".join(refused.output.split())
    back = run.invoke(app, ["log", "--ledger", str(folder), "--recover"])
    assert back.exit_code == 0, back.output
    assert "3 edits taken back" in " ".join(back.output.split())
    kept = [path.read_bytes() for path in folder.glob(f"{DATABASE}.damaged-1")]
    assert kept == ([damaged] if damaged else [])
    with open_(folder) as ledger:
        assert ledger.edits() == expected
        assert ledger.verify() == []


@pytest.mark.parametrize("begun", ["no byte", "its first page"])
def test_a_ledger_that_was_only_begun_is_none_and_is_made_by_the_next_edit(
    tmp_path: Path, begun: str
) -> None:
    # What is left by a process that is killed, or meets a full disk, while it makes a ledger.
    folder, run = tmp_path / "ledger", CliRunner()
    folder.mkdir()
    (folder / DATABASE).touch()
    if begun == "its first page":
        with closing(sqlite3.connect(folder / DATABASE)) as connection:
            connection.execute("PRAGMA journal_mode = WAL")
        assert (folder / DATABASE).stat().st_size > 0
    with pytest.raises(LedgerError, match="no ledger at"):
        open_(folder, readonly=True)
    place = ["--ledger", str(folder)]
    assert "There is no ledger in" in run.invoke(app, ["log", *place]).output
    words = ["edit", "{} lives in", "-s", "Ada", "-t", "Rome", "--method", "ice", "--no-apply"]
    made = run.invoke(app, [*words, "--model", "atlas-gpt2", *place])
    assert made.exit_code == 0, made.output
    with open_(folder, readonly=True) as ledger:
        assert len(ledger.edits()) == 1


def test_an_empty_database_beside_deltas_is_a_lost_one(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    for path in folder.glob(f"{DATABASE}*"):
        path.unlink()
    with closing(sqlite3.connect(folder / DATABASE)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    for readonly in (True, False):
        with pytest.raises(IntegrityError, match="has deltas but no"):
            open_(folder, readonly=readonly)
    with open_(folder, recover=True) as ledger:
        assert len(ledger.recover()[0]) == 3


def test_recovering_renames_no_sound_database_and_no_other_programs(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    with open_(folder, recover=True) as ledger:
        assert ledger.recover() == ([], {})
        assert len(ledger.edits()) == 3
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    with closing(sqlite3.connect(strangers / DATABASE)) as connection:
        connection.execute("PRAGMA application_id = 7")
        connection.execute("CREATE TABLE theirs (x)")
        connection.commit()
    before = (strangers / DATABASE).read_bytes()
    with pytest.raises(IntegrityError, match="not a ledger"):
        open_(strangers, recover=True)
    assert (strangers / DATABASE).read_bytes()[100:] == before[100:]
    assert not list(tmp_path.glob("*/*.damaged*"))


def test_edits_whose_files_are_gone_or_cut_off_are_not_shown_as_on(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    with open_(folder) as ledger:
        blobs = [edit.blob for edit in ledger.edits()]
    paths = [folder / "blobs" / blob[:2] / f"{blob}.safetensors" for blob in blobs]
    run = CliRunner()
    assert "damaged or missing" not in run.invoke(app, ["log", "--ledger", str(folder)]).output
    paths[0].unlink()
    os.truncate(paths[2], paths[2].stat().st_size - 1)
    log = run.invoke(app, ["log", "--ledger", str(folder)]).output
    for word in ("missing", "damaged", "off", "2 edits damaged or missing"):
        assert word in " ".join(log.split())
    data = json.loads(run.invoke(app, ["log", "--ledger", str(folder), "--json"]).stdout)
    assert [edit["file"] for edit in data["edits"]] == ["missing", "sound", "damaged"]
    shown = run.invoke(app, ["show", IDS[0], "--ledger", str(folder)]).output
    assert "its file is missing: it cannot be on the model" in shown
    data = run.invoke(app, ["show", IDS[2], "--ledger", str(folder), "--json"]).stdout
    assert json.loads(data)["file"] == "damaged"


def test_a_delta_that_counts_its_texts_as_well_is_sound_in_the_log(tmp_path: Path) -> None:
    folder, run = tmp_path / "ledger", CliRunner()
    request = {"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}
    with Editor("atlas-gpt2", ledger=folder, guards=QUIET) as editor:
        edit = editor.edit(request, method="ice")
    assert edit.nbytes > sum(t.numel() * t.element_size() for t in edit.delta.tensors().values())
    log = ["log", "--ledger", str(folder)]
    assert "damaged or missing" not in run.invoke(app, log).output
    assert json.loads(run.invoke(app, [*log, "--json"]).stdout)["edits"][0]["file"] == "sound"
    file = folder / "blobs" / edit.blob[:2] / f"{edit.blob}.safetensors"
    for damage in (file.read_bytes()[:-1], b"{" * 40, b""):
        file.write_bytes(damage)
        data = run.invoke(app, ["show", edit.id, "--ledger", str(folder), "--json"]).stdout
        assert json.loads(data)["file"] == "damaged"


def test_verify_names_a_damaged_edit_once(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    request = {"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}
    with Editor("atlas-gpt2", ledger=folder, guards=QUIET) as editor:
        edit = editor.edit(request, method="ft", steps=1)
        other = editor.edit({**request, "subject": "Grace"}, method="ft", steps=1)
    (folder / "blobs" / edit.blob[:2] / f"{edit.blob}.safetensors").unlink()
    damaged = folder / "blobs" / other.blob[:2] / f"{other.blob}.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    found = CliRunner().invoke(app, ["verify", "--ledger", str(folder)])
    assert found.exit_code == 4
    assert found.output.count("Problem:") == 2
    assert "Warning" not in found.output
    text = " ".join(found.output.split())
    assert "2 problems." in text
    for name in (edit.id, other.id):
        assert f"edit {name} is not on the model (reverting it retires it):" in text


def test_a_number_that_no_ledger_gives_is_damage(tmp_path: Path) -> None:
    folder = three_edits(tmp_path / "ledger")
    with sqlite3.connect(folder / DATABASE) as connection:
        connection.execute(f"UPDATE events SET number = {2**63 - 1} WHERE number = 1")
    with open_(folder) as ledger:
        before = content_of_rows(ledger)
        with pytest.raises(IntegrityError, match="too large"):
            commit(ledger, small_edit(), small_delta(9))
        with pytest.raises(IntegrityError, match="digest does not follow"):
            content_of(ledger)
        assert ledger.verify()
        assert content_of_rows(ledger) == before


def content_of_rows(ledger: Ledger) -> list[object]:
    return ledger._database.rows("SELECT * FROM edits") + ledger._database.rows(
        "SELECT * FROM events"
    )
