"""Damaged, forged and impossible ledgers: one clear error of errata's own, and nothing changed."""

from __future__ import annotations

import pickle
import shutil
import sqlite3
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.common import storage
from errata.edits.delta import DenseDelta, Factor, LowRankDelta
from errata.edits.ledger import content
from errata.errors import ErrataError, IntegrityError, LedgerError, StorageError, UnknownNameError
from tests.ledger.ledger_helpers import (
    IDS,
    KINDS,
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


def blob_file(folder: Path, name: str = IDS[1]) -> Path:
    with open_(folder, readonly=True) as ledger:
        digest = ledger.get(name).blob
    return folder / "blobs" / digest[:2] / f"{digest}.safetensors"


# -- blobs -----------------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "bit of the header flipped": lambda data: data[:20] + bytes([data[20] ^ 4]) + data[21:],
    "bit of a tensor flipped": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "oversized header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "pickle": lambda data: pickle.dumps({"w:u": [1.0]}),
    "another delta": lambda data: content.encode(content.take(small_delta(99)), {}),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_blob_is_an_error_for_its_edit_alone(
    folder: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = blob_file(folder)
    path.write_bytes(damage(path.read_bytes()))
    with open_(folder) as ledger:
        before = content_of(ledger)
        for use in (ledger.delta, lambda name: ledger.export([name], folder / "x.errata")):
            with pytest.raises(IntegrityError, match="SHA-256"):
                use(IDS[1])
        assert isinstance(ledger.delta(IDS[0]), LowRankDelta)
        (problem,) = ledger.verify()
        assert IDS[1] in problem
        assert content_of(ledger) == before
    assert not (folder / "x.errata").exists()


def test_a_missing_blob_is_named(folder: Path) -> None:
    path = blob_file(folder)
    path.unlink()
    with open_(folder) as ledger:
        with pytest.raises(IntegrityError, match=f"{IDS[1]} is missing"):
            ledger.delta(IDS[1])
        assert len(ledger.verify()) == 1


# A forger can make hashes fit; then what is inside must still be a delta.

FORGED: dict[str, content.Parts] = {
    "NaN": content.Parts(
        "low_rank",
        {"transposed": {"w": False}},
        {"w:u": torch.full((4, 1), float("nan")), "w:v": torch.ones(3, 1)},
    ),
    "infinite": content.Parts("dense", {}, {"w": torch.tensor([[float("inf")]])}),
    "infinite in one byte": content.Parts(
        "dense", {}, {"w": torch.tensor([float("nan")]).to(torch.float8_e4m3fn)}
    ),
    "wrong shapes": content.Parts(
        "low_rank",
        {"transposed": {"w": False}},
        {"w:u": torch.ones(4, 1), "w:v": torch.ones(3, 2)},
    ),
    "no matrix": content.Parts(
        "low_rank", {"transposed": {"w": 0}}, {"w:u": torch.tensor(1.0), "w:v": torch.tensor(1.0)}
    ),
    "tensor missing": content.Parts(
        "low_rank", {"transposed": {"w": False}}, {"w:u": torch.ones(4, 1)}
    ),
    "metadata of another type": content.Parts("low_rank", {"transposed": [1]}, {}),
    "integers": content.Parts("dense", {}, {"w": torch.ones(2, dtype=torch.int64)}),
    "nothing": content.Parts("dense", {}, {}),
    "another kind": content.Parts("pickle", {}, {"w": torch.ones(1)}),
}


def forge_blob(folder: Path, parts: content.Parts) -> None:
    """Give the second edit a delta that its record and the file's name vouch for."""
    header = {"kind": parts.kind, "metadata": parts.metadata}
    data = storage.to_bytes(parts.tensors, header)
    digest = storage.sha256(data)
    path = folder / "blobs" / digest[:2] / f"{digest}.safetensors"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    kind = parts.kind if parts.kind in KINDS else "low_rank"
    forge_record(folder, IDS[1], blob=digest, delta_kind=kind)


def forge_record(folder: Path, name: str, **fields: Any) -> None:
    """Replace fields of a record, with a fitting SHA-256."""
    with raw(folder) as database:
        (text,) = database.execute("SELECT record FROM edits WHERE id = ?", (name,)).fetchone()
        text = storage.canonical({**storage.parse_json(text), **fields})
        values = (text, storage.sha256(text.encode()), name)
        database.execute("UPDATE edits SET record = ?, digest = ? WHERE id = ?", values)


@contextmanager
def raw(folder: Path) -> Iterator[sqlite3.Connection]:
    database = sqlite3.connect(folder / "ledger.sqlite")
    try:
        with database:
            yield database
    finally:
        database.close()


@pytest.mark.parametrize("parts", FORGED.values(), ids=FORGED.keys())
def test_a_forged_delta_is_refused_although_its_hash_fits(
    folder: Path, parts: content.Parts
) -> None:
    forge_blob(folder, parts)
    with open_(folder) as ledger:
        with pytest.raises(IntegrityError):
            ledger.delta(IDS[1])
        assert any(IDS[1] in problem for problem in ledger.verify())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_a_delta_that_is_not_finite_is_not_recorded(folder: Path, kind: str, value: float) -> None:
    bad = torch.tensor([[value]])
    delta = (
        DenseDelta({"w": bad})
        if kind == "dense"
        else LowRankDelta({"w": Factor(bad, torch.ones(1, 1))})
    )
    with unchanged(folder) as ledger, pytest.raises(IntegrityError, match="NaN or infinite"):
        ledger.commit([(small_edit(), small_delta(50), True), (small_edit(kind=kind), delta, True)])


# -- ids and records -------------------------------------------------------------------------------

STRANGE = [
    "../../../etc/passwd", "..", ".", "/", "", "a\0b", "%", "*", "a%", "AAAA00000001",
    "' OR 1=1 --", "aaaa00000001/..", "aaaa00000001x", "🙂", "\ud800", "a" * 10_000, None, 7, b"aa",
]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: ascii(name)[:30])
def test_strange_ids_are_unknown_and_touch_nothing(folder: Path, name: Any) -> None:
    with unchanged(folder) as ledger:
        uses: list[Callable[[], Any]] = [
            lambda: ledger.get(name),
            lambda: ledger.delta(name),
            lambda: ledger.is_active(name),
            lambda: ledger.activate([name]),
            lambda: ledger.deactivate([IDS[0], name]),
            lambda: ledger.export([name], folder.parent / "x.errata"),
        ]
        for use in uses:
            with pytest.raises(UnknownNameError, match="Unknown edit") as caught:
                use()
            assert len(str(caught.value)) < 600
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ledger"]


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "../../../../x"},
        {"id": IDS[0]},
        {"blob": "../../../../etc/passwd"},
        {"blob": ""},
        {"sequence": 7},
        {"sequence": -1},
        {"requests": []},
        {"requests": [{"prompt": "no place", "subject": "x", "target_new": "y"}]},
        {"unknown": 1},
        {"nbytes": "many"},
        {"fingerprint": 5},
    ],
    ids=lambda fields: ascii(fields)[:40],
)
def test_a_forged_record_is_refused_although_its_hash_fits(
    folder: Path, fields: dict[str, Any]
) -> None:
    forge_record(folder, IDS[1], **fields)
    with open_(folder) as ledger:
        for use in (ledger.edits, lambda: ledger.get(IDS[1]), lambda: ledger.delta(IDS[1])):
            with pytest.raises(IntegrityError, match="record 2"):
                use()
        assert ledger.get(IDS[0]).id == IDS[0]
        assert ledger.verify()


TAMPERED = {
    "record": "UPDATE edits SET record = replace(record, 'Rome', 'Bonn') WHERE sequence = 2",
    "record that is no text": "UPDATE edits SET record = x'00ff' WHERE sequence = 2",
    "record that is no Unicode": "UPDATE edits SET record = CAST(x'00ff' AS TEXT) WHERE id > 'b'",
    "active": "UPDATE edits SET active = 1 WHERE sequence = 2",
    "active that is no flag": "UPDATE edits SET active = 'yes' WHERE sequence = 2",
    "id": "UPDATE edits SET id = '../../etc/pwd' WHERE sequence = 2",
    "last edit gone": "DELETE FROM edits WHERE sequence = 3",
    "middle edit gone": "DELETE FROM edits WHERE sequence = 2",
    "event": "UPDATE events SET kind = 'apply' WHERE number = 7",
    "event's detail": "UPDATE events SET detail = '{\"x\": NaN}' WHERE number = 1",
    "first event gone": "DELETE FROM events WHERE number = 1",
    "middle event gone": "DELETE FROM events WHERE number = 4",
    "last event gone": "DELETE FROM events WHERE number = 7",
    "event added": "INSERT INTO events VALUES (8, 'now', 'apply', NULL, '{}', 'x')",
    "index of requests": "DELETE FROM requests WHERE sequence = 2",
}


@pytest.mark.parametrize("statement", TAMPERED.values(), ids=TAMPERED.keys())
def test_verify_notices_every_change_by_another_program(folder: Path, statement: str) -> None:
    with raw(folder) as database:
        database.execute(statement)
    with open_(folder) as ledger:
        assert ledger.verify()
        for use in (ledger.edits, ledger.events):
            try:
                use()
            except ErrataError:
                pass


# -- databases -------------------------------------------------------------------------------------


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("text")
    with pytest.raises(IntegrityError, match="is a file"):
        open_(path)
    with pytest.raises(StorageError):
        open_(path / "below")
    (tmp_path / "odd" / "ledger.sqlite").mkdir(parents=True)
    with pytest.raises(IntegrityError, match="is not a file"):
        open_(tmp_path / "odd")
    for name in ("a\0b", "n" * 300):
        with pytest.raises(StorageError):
            open_(tmp_path / name)
    assert path.read_text() == "text"


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("data", [b"text, not SQLite " * 100, pickle.dumps([1] * 1000)])
def test_a_database_that_is_none(tmp_path: Path, data: bytes, readonly: bool) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(data)
    with pytest.raises(IntegrityError):
        open_(tmp_path, readonly=readonly)
    assert (tmp_path / "ledger.sqlite").read_bytes() == data


def test_a_foreign_a_newer_and_a_booby_trapped_database(folder: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with raw(foreign) as database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(IntegrityError, match="not a ledger"):
        open_(foreign)
    for trap in (
        "CREATE TRIGGER t AFTER INSERT ON events BEGIN DELETE FROM edits; END",
        "CREATE VIEW v AS SELECT 1",
        "ALTER TABLE edits ADD COLUMN more TEXT",
        "DROP TABLE requests",
    ):
        trapped = tmp_path / "trapped"
        shutil.copytree(folder, trapped)
        with raw(trapped) as database:
            database.execute(trap)
        with pytest.raises(IntegrityError, match="does not have the tables"):
            open_(trapped)
        shutil.rmtree(trapped)
    with raw(folder) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(LedgerError, match="format 99"):
        open_(folder)


def test_a_lost_database_is_not_replaced_by_an_empty_one(folder: Path) -> None:
    database = folder / "ledger.sqlite"
    copy = database.read_bytes()
    for loss in (database.unlink, lambda: database.write_bytes(b"")):
        loss()
        with pytest.raises(IntegrityError, match="restore"):
            open_(folder)
        database.write_bytes(copy)
    with open_(folder) as ledger:
        assert ledger.verify() == []


def test_an_older_copy_put_back_while_open_is_noticed(folder: Path) -> None:
    with open_(folder) as ledger:
        ledger._database.head += 5
        with pytest.raises(IntegrityError, match="older copy"):
            ledger.note("x", {})


def survives(path: Path, before: tuple[Any, ...]) -> None:
    """Read everything: only our errors come, and what verifies is what was written."""
    try:
        with open_(path) as ledger:
            problems = ledger.verify()
            for use in (ledger.edits, ledger.events, ledger.active_ids, ledger.find):
                try:
                    use()
                except ErrataError:
                    assert problems
            if not problems:
                assert content_of(ledger) == before
    except ErrataError:
        pass


@pytest.mark.parametrize("length", [1, 15, 99, 511])
def test_a_database_cut_to_a_stump_is_not_taken_for_a_new_one(folder: Path, length: int) -> None:
    database = folder / "ledger.sqlite"
    database.write_bytes(database.read_bytes()[:length])
    with pytest.raises(IntegrityError, match="cut off"):
        open_(folder)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_damaged_database_raises_only_our_errors(folder: Path, data: st.DataObject) -> None:
    with open_(folder) as ledger:
        before = content_of(ledger)
    good = (folder / "ledger.sqlite").read_bytes()
    bits = st.lists(st.integers(0, len(good) * 8 - 1), min_size=1, max_size=40)
    damaged = bytearray(good)
    for position in data.draw(bits):
        damaged[position // 8] ^= 1 << position % 8
    length = data.draw(st.one_of(st.just(len(good)), st.integers(1, len(good))))
    other = folder.with_name("damaged")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(folder, other)
    (other / "ledger.sqlite").write_bytes(bytes(damaged[:length]))
    survives(other, before)
