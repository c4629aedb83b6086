"""Tensors as files: what is written is read back, and nothing else is believed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.common import storage
from errata.errors import ErrataError, IntegrityError, StorageError

TENSORS = {
    "weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}
METADATA = {"kind": "dense", "name": "zażółć → 道", "values": [1, 2.5, None, True]}
DATA = storage.to_bytes(TENSORS, METADATA)


def read_tensors(path: Path, digest: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    return storage.from_bytes(storage.read_bytes(path, digest), str(path))


def file_of(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_content_comes_back_bit_for_bit() -> None:
    tensors, metadata = storage.from_bytes(DATA)
    assert metadata == METADATA
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_equal_content_gives_equal_bytes_in_any_order() -> None:
    reordered = dict(reversed(list(TENSORS.items())))
    assert storage.to_bytes(reordered, dict(reversed(list(METADATA.items())))) == DATA


def test_views_and_shared_tensors_are_stored_by_value() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    given = {"all": base, "again": base, "row": base[1], "column": base[:, 1], "turned": base.T}
    tensors, _ = storage.from_bytes(storage.to_bytes(given, {}))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in given.items())


@pytest.mark.parametrize(
    "metadata", [{"x": float("nan")}, {"x": [float("inf")]}, {"x": torch.zeros(1)}, {"x": {1, 2}}]
)
def test_metadata_that_json_cannot_say_is_refused(metadata: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="JSON"):
        storage.to_bytes({}, metadata)


def test_what_could_not_be_read_back_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_HEADER", 1000)
    with pytest.raises(IntegrityError, match="at most 1000"):
        storage.to_bytes({}, {"long": "x" * 2000})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", storage.MAX_HEADER + 1) + b" " * 64,
        struct.pack("<Q", 100) + b"{}",
        pickle.dumps({"weight": [1.0, 2.0]}),
        file_of(b"[" * 100_000),
        file_of({}),
        file_of([]),
        file_of({"__metadata__": {"errata": 5}}),
        file_of({"__metadata__": {"errata": "[]"}}),
        file_of({"__metadata__": {"errata": '{"x": NaN}'}}),
        file_of({"__metadata__": {"errata": '{"x": 1e999}'}}),
        file_of({"__metadata__": {"errata": "{}"}, "a": {"dtype": "F32"}}),
        file_of(
            {
                "__metadata__": {"errata": "{}"},
                "a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]},
            },
            b"\0" * 4,
        ),
        file_of(
            {
                "__metadata__": {"errata": "{}"},
                "a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
            },
            b"\0" * 4,
        ),
        DATA + b"\0",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_anything_else_is_one_clear_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match="the file"):
        storage.from_bytes(data, "the file")


@pytest.mark.parametrize("length", range(0, len(DATA), 7))
def test_every_truncation_is_noticed(length: int) -> None:
    with pytest.raises(IntegrityError):
        storage.from_bytes(DATA[:length])


def test_an_exploit_in_a_renamed_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Exploit:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(marker),)

    path = tmp_path / "edit.safetensors"
    path.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(IntegrityError):
        read_tensors(path)
    assert not marker.exists()


@given(st.binary(max_size=300))
def test_random_bytes_raise_only_our_errors(data: bytes) -> None:
    with pytest.raises(ErrataError):
        storage.from_bytes(data)


@given(st.binary(max_size=200), st.binary(max_size=40))
def test_random_headers_raise_only_our_errors(header: bytes, body: bytes) -> None:
    with pytest.raises(ErrataError):
        storage.from_bytes(file_of(header, body))


@given(st.lists(st.integers(0, len(DATA) * 8 - 1), min_size=1, max_size=4))
def test_flipped_bits_raise_only_our_errors(positions: list[int]) -> None:
    damaged = bytearray(DATA)
    for position in positions:
        damaged[position // 8] ^= 1 << position % 8
    try:
        storage.from_bytes(bytes(damaged))
    except ErrataError:
        pass


# -- files -----------------------------------------------------------------------------------------


def test_a_file_is_verified_against_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    digest = storage.write_tensors(path, TENSORS, METADATA)
    assert read_tensors(path, digest)[1] == METADATA
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(bytes(damaged))
    with pytest.raises(IntegrityError, match="SHA-256"):
        read_tensors(path, digest)


@pytest.mark.parametrize("step", ["fsync", "replace", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    path = tmp_path / "x.bin"
    storage.write_bytes(path, b"before")

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    if step == "open":
        monkeypatch.setattr(storage, "open", refuse, raising=False)
    else:
        monkeypatch.setattr(storage.os, step, refuse)
    with pytest.raises(StorageError, match=os.strerror(code)):
        storage.write_bytes(path, b"after")
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(tmp_path / "x.bin", b"data")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/x.bin", "file/x.bin", "n" * 300, "a\0b"])
def test_impossible_paths_are_storage_errors(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        storage.write_bytes(tmp_path / name, b"data")
    with pytest.raises(StorageError):
        read_tensors(tmp_path / name)
