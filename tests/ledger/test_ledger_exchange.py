"""Edits as files: what one ledger exports another takes over, and nothing else."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from errata.common import storage
from errata.edits.delta import LowRankDelta
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger, content, read_export
from errata.errors import ErrataError, IntegrityError, LedgerError, StorageError, UnknownNameError
from tests.ledger.ledger_helpers import KINDS, add, commit, same_delta, small_delta, small_edit


@pytest.fixture(params=["folder", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    where = tmp_path / "ledger" if request.param == "folder" else None
    with Ledger.open(where, kinds=KINDS) as opened:
        yield opened
        assert opened.verify() == []


def test_edits_move_to_another_ledger_as_one_file(ledger: Ledger, tmp_path: Path) -> None:
    edits = add(ledger, 3)
    dense = commit(ledger, small_edit("Dense", "dense"), small_delta(9, "dense"))
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
        taken = other.import_(both, active=True)
        assert [edit.id for edit in taken] == [first.id, second.id]
        assert other.active_ids() == [second.id, first.id]
        head = other.head
        assert other.import_(both) == taken
        assert other.head == head
    with Ledger.open(None, kinds=KINDS) as other:
        commit(other, small_edit("Other", id=second.id), small_delta(77))
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
        ledger.export([first.id], path / "in-a-file.errata")


def test_an_export_replaces_what_a_link_names_and_writes_into_a_pipe(tmp_path: Path) -> None:
    with Ledger.open(None, kinds=KINDS) as ledger:
        (edit,) = add(ledger, 1)
        there = ledger.export([edit.id], tmp_path / "there.errata")
        link, pipe = tmp_path / "link", tmp_path / "pipe"
        link.symlink_to(there)
        ledger.export([edit.id], link, overwrite=True)
        assert link.is_symlink()
        os.mkfifo(pipe)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        ledger.export([edit.id], pipe, overwrite=True)
        assert os.read(reader, 2**20) == there.read_bytes()
        os.close(reader)
        assert pipe.is_fifo()


@pytest.mark.slow
def test_hundreds_of_edits_fit_into_one_file(tmp_path: Path) -> None:
    with Ledger.open(None, kinds=KINDS) as ledger, Ledger.open(None, kinds=KINDS) as other:
        edits = add(ledger, 300)
        path = ledger.export([edit.id for edit in edits], tmp_path / "many.errata")
        assert [edit.id for edit in other.import_(path)] == [edit.id for edit in edits]


# -- hostile files ---------------------------------------------------------------------------------

IDS = ["aaaa00000001", "bbbb00000002"]


def exported() -> tuple[bytes, list[tuple[Edit, Any]]]:
    edits = [
        (small_edit("A", id=IDS[0]), small_delta(1)),
        (small_edit("B", "dense", id=IDS[1]), small_delta(2, "dense")),
    ]
    with tempfile.TemporaryDirectory() as scratch, Ledger.open(None, kinds=KINDS) as ledger:
        for edit, delta in edits:
            commit(ledger, edit, delta)
        path = ledger.export(IDS[:2], Path(scratch) / "x.errata")
        return path.read_bytes(), read_export(path, KINDS)


EXPORT, PAIRS = exported()


def read_back(folder: Path, data: bytes) -> None:
    """Only our errors come; what is believed is what was written."""
    path = folder / "hostile.errata"
    path.write_bytes(data)
    try:
        pairs = read_export(path, KINDS)
    except ErrataError:
        return
    assert [edit for edit, _ in pairs] == [edit for edit, _ in PAIRS]
    for (_, found), (_, wanted) in zip(pairs, PAIRS, strict=True):
        assert content.digest(content.take(found)) == content.digest(content.take(wanted))


QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(st.binary(max_size=300))
def test_random_bytes_as_an_export(tmp_path: Path, data: bytes) -> None:
    read_back(tmp_path, data)


@QUICK
@given(st.lists(st.integers(0, len(EXPORT) * 8 - 1), max_size=3), st.integers(1, len(EXPORT)))
def test_flipped_bits_and_truncations_of_an_export(
    tmp_path: Path, positions: list[int], length: int
) -> None:
    damaged = bytearray(EXPORT)
    for position in positions:
        damaged[position // 8] ^= 1 << position % 8
    read_back(tmp_path, bytes(damaged))
    read_back(tmp_path, bytes(damaged[:length]))


def forged_export(change: Callable[[list[Any], dict[str, Any], dict[str, Any]], None]) -> bytes:
    """Return the export with its records, tensors or header changed, and hashes that fit."""
    tensors, header = storage.from_bytes(EXPORT)
    entries = storage.parse_json(tensors["records"].numpy().tobytes())
    change(entries, tensors, header)
    text = storage.canonical(entries).encode()
    tensors["records"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return storage.to_bytes(tensors, {**header, "records": storage.sha256(text)})


def drop_tensor(entries: list[Any], tensors: dict[str, Any], header: dict[str, Any]) -> None:
    del tensors["1/w"]


def nan_with_its_hash(entries: list[Any], tensors: dict[str, Any], header: Any) -> None:
    tensors["1/w"] = torch.full((4, 3), float("nan"))
    entries[1]["content"] = content.digest(content.Parts("dense", {}, {"w": tensors["1/w"]}))


HOSTILE: dict[str, Callable[[list[Any], dict[str, Any], dict[str, Any]], Any]] = {
    "traversal in an id": lambda e, t, h: e[0]["record"].update(id="../../../x"),
    "traversal in a blob": lambda e, t, h: e[0]["record"].update(blob="../../../x"),
    "one id twice": lambda e, t, h: e[1]["record"].update(id=IDS[0]),
    "record changed": lambda e, t, h: e[0]["record"].update(unknown=1),
    "size changed": lambda e, t, h: e[0]["record"].update(nbytes=1),
    "no record": lambda e, t, h: e[0].pop("record"),
    "no list": lambda e, t, h: e[0].update(tensors={"w": 1}),
    "tensor names": lambda e, t, h: e[0].update(tensors=["../w", 5]),
    "tensor missing": drop_tensor,
    "tensor left over": lambda e, t, h: t.update({"2/w": torch.ones(1)}),
    "tensor exchanged": lambda e, t, h: t.update({"1/w": torch.ones(4, 3)}),
    "NaN": nan_with_its_hash,
    "fewer than announced": lambda e, t, h: e.pop(),
    "no export": lambda e, t, h: h.update(format="other"),
    "no version": lambda e, t, h: h.update(version="1"),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_forged_export_is_refused_whole(change: Any, tmp_path: Path) -> None:
    path = tmp_path / "forged.errata"
    path.write_bytes(forged_export(change))
    with Ledger.open(None, kinds=KINDS) as ledger:
        (kept,) = add(ledger)
        for use in (ledger.read_export, ledger.import_):
            with pytest.raises(IntegrityError, match=r"forged\.errata"):
                use(path)
        assert ledger.edits() == [kept]
        assert ledger.verify() == []


def test_an_export_of_another_kind_version_or_place(tmp_path: Path) -> None:
    path = tmp_path / "x.errata"
    path.write_bytes(EXPORT)
    with pytest.raises(UnknownNameError, match="dense"):
        read_export(path, {"low_rank": LowRankDelta})
    path.write_bytes(forged_export(lambda e, t, h: h.update(version=2)))
    with Ledger.open(tmp_path / "ledger", kinds=KINDS) as ledger:
        (edit,) = add(ledger)
        with pytest.raises(LedgerError, match="Upgrade"):
            ledger.import_(path)
        for missing in (tmp_path / "none.errata", tmp_path):
            with pytest.raises(StorageError, match="Cannot read"):
                ledger.import_(missing)
        (blob,) = (tmp_path / "ledger" / "blobs").glob("*/*.safetensors")
        with pytest.raises(IntegrityError, match="no exported edit"):
            ledger.import_(blob)
        assert ledger.edits() == [edit]
        assert ledger.verify() == []
