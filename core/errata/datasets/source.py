"""Where records come from: a JSON file, a table, a folder, or the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from errata.common.storage import file_sha256
from errata.datasets import streams
from errata.datasets.cells import DELIMITERS, read_cells, suffix_of
from errata.datasets.record import Record
from errata.errors import DatasetError, MissingExtraError

log = logging.getLogger("errata")

TABLES = {".parquet": "parquet", ".arrow": "arrow"}
"""Files that the `datasets` library reads, and what it calls them."""
FILES = (".json", ".jsonl", ".gz", ".txt", *DELIMITERS, *TABLES)
_HUB = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*?)(@(?P<revision>[\w.-]+))?(/(?P<file>.+))?")


class Source:
    """Records of one dataset, readable any number of times.

    Attributes:
        name: path or hub id, as given.
        path: where it is on this machine; None for a table of the hub.
        split: part to read ("train", "test" …); None for all there is.
        seen: how many records the last reading has yielded.
        mute: how many of these the reader made no item of.
    """

    seen = mute = 0

    def __init__(self, name: str, path: Path | None, split: str | None = None) -> None:
        self.name = name
        self.path = path
        self.split = split
        self._state = _state(path)
        self._remarks: set[str] = set()
        self._notes: list[str] | None = []

    def remark(self, text: str) -> None:
        """Warn of something about the source; once, however often it is read."""
        if text not in self._remarks:
            self._remarks.add(text)
            log.warning("%s: %s", self.name, text)

    def note(self, text: str) -> None:
        """Take note of a text that lost white space, in the first reading."""
        if self._notes is not None:
            self._notes.append(text)

    def taken_notes(self) -> list[str]:
        """Return what the first reading has noted; later ones note nothing."""
        notes, self._notes = self._notes, None
        return notes or []

    def records(self) -> Iterator[Record]:
        """Yield every record.

        Raises `DatasetError` where the source is damaged, gone, or changed since it was opened.
        """
        if _state(self.path) != self._state:
            what = "folder" if self.path and self.path.is_dir() else "file"
            raise DatasetError(f"the {what} has changed since it was loaded", file=self.name)
        self.seen = self.mute = 0
        for record in self._records():
            self.seen += 1
            yield record

    def _records(self) -> Iterator[Record]:
        raise NotImplementedError

    def digest(self) -> str:
        """Return the SHA-256 of the bytes read; of a hub table's records after `records`."""
        raise NotImplementedError


class LocalFile(Source):
    """A file that errata reads itself; `split` picks the records whose own field "split" says so.

    Attributes:
        cells: whether its values are the cells of a table of text.
    """

    cells = False

    def __init__(self, name: str, path: Path, split: str | None = None) -> None:
        super().__init__(name, path, split)
        self._path = path

    def _records(self) -> Iterator[Record]:
        """Yield every record, reading the file once more."""
        for index, data in enumerate(self._values()):
            record = Record(data, self.name, index, cells=self.cells, note=self.note)
            if self.split is None or is_of_split(record, self.split):
                yield record

    def digest(self) -> str:
        """Return the SHA-256 of the file's bytes."""
        return file_sha256(self._path)

    def _values(self) -> Iterator[Any]:
        raise NotImplementedError


class JsonFile(LocalFile):
    """A JSON array or JSON lines, plain or gzip, as it was published."""

    def _values(self) -> Iterator[Any]:
        return streams.read_json(self._path, self.name)


class TextTable(LocalFile):
    """A CSV or TSV file, plain or gzip: every cell is text."""

    cells = True

    def _values(self) -> Iterator[Any]:
        return read_cells(self._path, self.name)


class GivenRecords(Source):
    """Records that are in memory already: mappings, as a file of the dataset holds them.

    `split` picks the records whose own field "split" says so.
    """

    def __init__(self, given: Iterable[Any], split: str | None = None) -> None:
        super().__init__("the records given", None, split)
        self._given = [given] if isinstance(given, Mapping) else list(given)

    def _records(self) -> Iterator[Record]:
        for index, data in enumerate(self._given):
            record = Record(data, self.name, index, note=self.note)
            if self.split is None or is_of_split(record, self.split):
                yield record

    def digest(self) -> str:
        """Return the SHA-256 of the records as JSON."""
        text = json.dumps(self._given, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


class TabularSource(Source):
    """Rows read by the `datasets` library: Parquet or Arrow files, a folder, or a hub id."""

    def __init__(self, name: str, path: Path | None, split: str | None = None) -> None:
        super().__init__(name, path, split)
        self._rows = hashlib.sha256()

    def _records(self) -> Iterator[Record]:
        rows = hashlib.sha256()
        with _explained(self.name, hub=self.path is None):
            for index, row in enumerate(self._open()):
                rows.update(json.dumps(row, sort_keys=True, default=str).encode())
                yield Record(row, self.name, index, note=self.note)
        self._rows = rows

    def digest(self) -> str:
        """Return the SHA-256 of the file, of a folder's files, or of the rows that were read."""
        if self.path is None:
            return self._rows.hexdigest()
        if self.path.is_file():
            return file_sha256(self.path)
        return digest_of_folder(self.path)

    def _open(self) -> Any:
        if find_spec("datasets") is None:
            raise MissingExtraError(f"Reading {self.name!r}", "datasets", "data")
        import datasets

        # Versions before 4 could run a script that lies beside the data.
        load = partial(datasets.load_dataset, trust_remote_code=False)
        if self.path is None:
            return self._one(load(self.name, split=self.split))
        if self.path.is_file():
            kind = TABLES[suffix_of(self.path)]
            # One file is one split, whatever its name says.
            return load(kind, data_files=str(self.path), split="train", streaming=True)
        if (self.path / "state.json").exists() or (self.path / "dataset_dict.json").exists():
            return self._one(datasets.load_from_disk(str(self.path)))
        return self._one(load(str(self.path), split=self.split, streaming=True))

    def _one(self, loaded: Any) -> Any:
        """Return the one split that is meant."""
        if not isinstance(loaded, dict):
            return loaded
        if self.split is None and len(loaded) == 1:
            return next(iter(loaded.values()))
        if self.split not in loaded:
            raise DatasetError(
                f"has the splits {', '.join(loaded)}: choose one with split=…"
                + (f" ({self.split!r} is not among them)" if self.split else ""),
                file=self.name,
            )
        return loaded[self.split]


def open_source(path: str | Path | Iterable[Any], split: str | None = None) -> Source:
    """Return the source for a local path, for an id of the Hugging Face hub, or for records.

    A hub id is "owner/name" (read as a table by the `datasets` library) or
    "owner/name/path/to/file.json" (that file, as published); "owner/name@revision" pins it.

    Raises:
        DatasetError: there is no such file, and it does not look like a hub id; or what is given
            is neither a path nor a collection of records.
    """
    if not isinstance(path, (str, os.PathLike)):
        if isinstance(path, bytes) or not isinstance(path, Iterable):
            raise DatasetError(
                f"{path!r} is no path: give a file, a folder or a hub id as text or pathlib.Path, "
                "or the records themselves as a list of mappings"
            )
        return GivenRecords(path, split)
    given = str(path)
    if not given.strip():
        raise DatasetError("the path is empty: give a file, a folder or a hub id")
    local = Path(path).expanduser()
    if local.is_dir():
        return TabularSource(given, local, split)
    if local.exists():
        return _of_file(given, local, split)
    match = _HUB.fullmatch(given)
    if isinstance(path, Path) or match is None or not _may_be_hub(given, match):
        raise DatasetError(
            "no such file or folder (a dataset on the Hugging Face hub is named owner/name, or "
            "owner/name/path/to/file.json)",
            file=given,
        )
    if match["file"] is None:
        if match["revision"]:
            raise DatasetError(
                "a revision can only be given with a file: owner/name@revision/path/to/file.json",
                file=given,
            )
        return TabularSource(given, None, split)
    return _of_file(given, _download(given, match), split)


def _of_file(given: str, path: Path, split: str | None) -> Source:
    """Return the source for one file, by what its name ends with."""
    suffix = suffix_of(path)
    if suffix in DELIMITERS:
        return TextTable(given, path, split)
    if suffix not in TABLES:
        return JsonFile(given, path, split)
    if split is not None:
        raise DatasetError(f"a single table has no split {split!r}: leave it out", file=given)
    return TabularSource(given, path)


def is_of_split(record: Record, split: str) -> bool:
    """Say whether a record's own field "split" names a split; raise where it has no such field."""
    if not record.has("split"):
        raise DatasetError(
            f"split={split!r} was asked for, but the records have no field 'split'",
            file=record.file,
            index=record.index,
        )
    return bool(record.get("split") == split)


def digest_of_folder(path: Path) -> str:
    """Return the SHA-256 over the names and bytes of a folder's files."""
    found = hashlib.sha256()
    for file in _files_in(path):
        found.update(f"{file.relative_to(path).as_posix()} {file_sha256(file)}\n".encode())
    return found.hexdigest()


def _may_be_hub(given: str, match: re.Match[str]) -> bool:
    """Say whether a path that does not exist here is meant for the hub."""
    first = Path(given).parts[0]
    is_file_name = match["file"] is None and Path(given).suffix.lower() in FILES
    return not is_file_name and not Path(first).is_dir()


def _download(given: str, match: re.Match[str]) -> Path:
    if find_spec("huggingface_hub") is None:
        raise MissingExtraError(f"Reading {given!r}", "huggingface_hub", "data")
    from huggingface_hub import hf_hub_download

    with _explained(given, hub=True):
        return Path(
            hf_hub_download(
                match["repo"], match["file"], repo_type="dataset", revision=match["revision"]
            )
        )


@contextmanager
def _explained(name: str, *, hub: bool) -> Iterator[None]:
    """Turn whatever the libraries raise into an error that says what to do."""
    try:
        yield
    except (DatasetError, MissingExtraError, GeneratorExit):
        raise
    except Exception as error:
        text = str(error).strip()
        said = f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
        advice = (
            "; if this machine is offline, download the data elsewhere and give its local path"
            if hub
            else ""
        )
        raise DatasetError(f"could not be read ({said}){advice}", file=name) from error


def _files_in(folder: Path) -> list[Path]:
    return sorted(item for item in folder.rglob("*") if item.is_file())


def _state(path: Path | None) -> list[tuple[str, int, int]]:
    """Return the name, bytes and time (ns) of a file, or of every file of a folder."""
    if path is None:
        return []
    try:
        files = _files_in(path) if path.is_dir() else [path]
        found = [(str(file), file.stat()) for file in files]
    except OSError as error:
        raise DatasetError(f"cannot be read: {error}", file=str(path)) from error
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
