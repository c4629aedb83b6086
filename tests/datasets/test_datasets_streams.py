"""JSON files are read like `json.load`, one record at a time; a damaged one is never half read."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.datasets import streams
from errata.datasets.streams import read_json
from errata.errors import DatasetError
from tests.helpers import shared_path

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=12)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=6), values, max_size=4)
records = st.lists(objects, max_size=6)
chunks = st.integers(min_value=1, max_value=60)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams") / "data.json"


def read_in_chunks(path: Path, chunk: int) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", chunk)
        return list(read_json(path))


def array(data: list[Any], indent: int | None, ascii_: bool) -> bytes:
    return json.dumps(data, indent=indent, ensure_ascii=ascii_).encode()


def lines(data: list[Any], ascii_: bool) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=ascii_) + "\n" for item in data).encode()


@given(st.lists(values, max_size=6), chunks, st.sampled_from([None, 1]), st.booleans())
def test_an_array_reads_as_json_load_reads_it(
    file: Path, data: list[Any], chunk: int, indent: int | None, ascii_: bool
) -> None:
    file.write_bytes(array(data, indent, ascii_))
    assert read_in_chunks(file, chunk) == json.loads(file.read_bytes())


@given(records.filter(bool), chunks, st.booleans(), st.booleans())
def test_json_lines_read_as_each_line_does(
    file: Path, data: list[Any], chunk: int, ascii_: bool, packed: bool
) -> None:
    content = lines(data, ascii_)
    file.write_bytes(gzip.compress(content, mtime=0) if packed else b"\xef\xbb\xbf" + content)
    assert read_in_chunks(file, chunk) == data


@given(records.filter(bool), chunks, st.booleans(), st.booleans(), st.data())
def test_a_cut_file_never_gives_a_wrong_record(
    file: Path, data: list[Any], chunk: int, as_lines: bool, ascii_: bool, draw: st.DataObject
) -> None:
    content = lines(data, ascii_) if as_lines else array(data, None, ascii_)
    cut = draw.draw(st.integers(min_value=0, max_value=len(content) - 1))
    file.write_bytes(content[:cut])
    found: list[Any] = []
    said = ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "CHUNK", chunk)
        try:
            found.extend(read_json(file))
        except DatasetError as error:
            said = str(error)
    assert found == data[: len(found)]
    # Only between two lines can a cut not be seen; an array always shows it.
    whole = len(found) - content[:cut].count(b"\n") in (0, 1)
    assert str(file) in said or (as_lines and found and whole)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b" \n\t ", "empty"),
        (b'[{"a": 1},]', "line 1: expecting value"),
        (b'[{"a": 1}\n {"b": 2}]', "line 2: expected ',' or ']'"),
        (b'[{"a": 1}] tail', "more follows: 'tail'"),
        (b'[{"a": 1},\n {"b": "x', "line 2: unterminated string; the file ends here"),
        (b'[{"a": 1}', "the file ends here: it is cut off"),
        (b'{"a": 1}\n{"b"', "line 2"),
        (b'{"a": "x\ny"}', "invalid control character"),
        (b'[{"a": 1},\n{"b": "\xff"}]', "record 1 (counted from 0): damaged at line 2: not UTF-8"),
        ('[{"a": 1}]'.encode("utf-16"), "not UTF-8"),
        (b"<html><body>", "not JSON"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (gzip.compress(b'[{"a": 1}]' * 40, mtime=0)[:-14], "gzip stream is broken"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1}\n{"b": {"c": 1,\n"c": 2}}', "line 2: the key 'c' stands twice in one object"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(DatasetError) as caught:
        list(read_json(path))
    assert says in str(caught.value)
    assert caught.value.file == str(path)


def test_a_syntax_error_is_found_without_reading_on(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_bytes(b'[{"a": tru, ' + b'"b": 1, ' * 2_000_000)
    tracemalloc.start()
    with pytest.raises(DatasetError, match="expecting value"):
        list(read_json(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * streams.CHUNK


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    record = {"text": "x" * 2000}
    peaks = []
    for count in (4_000, 16_000):
        path = tmp_path / f"{count}.json"
        path.write_bytes(b"[" + b",".join([json.dumps(record).encode()] * count) + b"]")
        tracemalloc.start()
        assert sum(1 for _ in read_json(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]


def test_real_counterfact_reads_as_json_load_reads_it() -> None:
    path = shared_path("data", "counterfact", "counterfact_full_2393.json")
    assert list(read_json(path)) == json.loads(path.read_text(encoding="utf-8"))
