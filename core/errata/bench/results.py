"""The run directory: `run.json`, and `results.jsonl` with one finished case a line."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from errata.common.storage import make_folder, write_bytes
from errata.errors import (
    ConfigError,
    IntegrityError,
    LedgerBusyError,
    StorageError,
    disk,
    reason_of,
)

SCHEMA = 1
INFO, RESULTS, LOCK = "run.json", "results.jsonl", "run.lock"
REMEDY = (
    "Delete that line, and `errata bench` carries out again what it was about; `errata report "
    "--skip-bad` leaves it out."
)
KINDS = ("case", "state", "failure")
NEEDED = ("key", "method", "variant", "seed", "regime", "stage", "step", "dataset", "finished")

Line = dict[str, Any]


@dataclass(frozen=True)
class RunDirectory:
    """A run directory, read.

    Attributes:
        directory: the folder.
        info: its `run.json`.
    """

    directory: Path
    info: Mapping[str, Any]

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines in the order they were written, each checked.

        Raises `IntegrityError` naming the line that is damaged. A last line that was cut off is
        left out: the run was killed while it was written, and resuming writes it again.
        """
        path = self.directory / RESULTS
        if not path.exists():
            return
        seen: set[str] = set()
        with _reading(path) as handle:
            for number, raw in enumerate(handle, start=1):
                if not raw.endswith(b"\n"):
                    return
                try:
                    line = checked_line(raw, f"{path}:{number}")
                except IntegrityError as error:
                    raise IntegrityError(f"{error} {REMEDY}") from None
                if line["key"] in seen:
                    raise IntegrityError(
                        f"{path}:{number}: the key {line['key']!r} is there twice. {REMEDY}"
                    )
                seen.add(line["key"])
                yield line

    @cached_property
    def kinds(self) -> dict[str, str]:
        """Key → kind of every line."""
        return {line["key"]: line["kind"] for line in self}

    def cases(self) -> Iterator[Line]:
        """Yield the measured cases."""
        return (line for line in self if line["kind"] == "case")

    def failures(self) -> Iterator[Line]:
        """Yield the cases that could not be carried out."""
        return (line for line in self if line["kind"] == "failure")


def load(directory: str | Path) -> RunDirectory:
    """Read a run directory.

    Raises `ConfigError` where there is none and `IntegrityError` where it is damaged.
    """
    folder = Path(directory)
    info = read_info(folder)
    if info is None:
        raise ConfigError(
            f"{str(folder)!r} is no run directory: it has no {INFO}. `errata bench` writes one."
        )
    return RunDirectory(folder, info)


def read_info(folder: Path) -> Mapping[str, Any] | None:
    """Return a folder's `run.json`, None where there is none."""
    path = folder / INFO
    try:
        info = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {reason_of(error)}.") from error
    except ValueError as error:
        raise IntegrityError(
            f"{path} is damaged: {error}. Restore it, or give another folder."
        ) from None
    if not isinstance(info, dict) or info.get("schema") != SCHEMA:
        found = info.get("schema") if isinstance(info, dict) else None
        raise IntegrityError(f"{path} has schema {found!r}; this errata reads {SCHEMA}.")
    return info


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    text = json.dumps(info, indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(folder / INFO, (text + "\n").encode("utf-8", "backslashreplace"))


def checked_line(raw: bytes, where: str) -> Line:
    """Return the JSON of one line; raise `IntegrityError` saying what is wrong with it."""
    try:
        line = json.loads(raw)
    except ValueError as error:
        raise IntegrityError(f"{where} is damaged: {error}.") from None
    if not isinstance(line, dict):
        raise IntegrityError(f"{where} is damaged: an object is wanted.")
    if line.get("schema") != SCHEMA:
        raise IntegrityError(f"{where}: schema {line.get('schema')!r}; this errata reads {SCHEMA}.")
    missing = [name for name in NEEDED if name not in line]
    if missing or line.get("kind") not in KINDS:
        what = f"{', '.join(missing)} missing" if missing else f"kind {line.get('kind')!r}"
        raise IntegrityError(f"{where} is damaged: {what}.")
    return line


class ResultsFile:
    """The results file, open for adding lines. Made by `ResultsFile.open`.

    A line is on the disk before `add` returns. One process at a time may have it open.
    """

    def __init__(self, folder: Path, handle: int, lock: contextlib.ExitStack) -> None:
        """Take an open file; use `ResultsFile.open`."""
        self._path = folder / RESULTS
        self._handle = handle
        self._lock = lock

    @classmethod
    def open(cls, folder: Path) -> ResultsFile:
        """Open a run directory for writing and drop a line that was only half written.

        Raises `LedgerBusyError` when another process writes to it and `StorageError` when the
        disk refuses.
        """
        make_folder(folder)
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(folder / LOCK))
            path = folder / RESULTS
            with disk(f"write {path}"):
                handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                stack.callback(os.close, handle)
                _drop_half_line(handle)
            return cls(folder, handle, stack.pop_all())

    def add(self, line: Line) -> None:
        """Append one line and wait until the disk has it; all or nothing.

        Raises `StorageError` when the disk refuses.
        """
        data = json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        before = os.fstat(self._handle).st_size
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self._handle, left) :]
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, before)
            raise StorageError(
                f"Cannot write {self._path}: {reason_of(error)}. Every line before is "
                "kept: make room, then give the same command again to go on."
            ) from error
        except BaseException:  # Ctrl-C between two writes
            os.ftruncate(self._handle, before)
            raise

    def drop(self, keys: Collection[str]) -> None:
        """Take lines out, all of them or none: what they are about is to be done again.

        Raises `StorageError` when the disk refuses.
        """
        if not keys:
            return
        fresh = self._path.with_name(f"{self._path.name}.new")
        try:
            with self._path.open("rb") as old, fresh.open("wb") as new:
                new.writelines(raw for raw in old if json.loads(raw)["key"] not in keys)
                new.flush()
                os.fsync(new.fileno())
            os.replace(fresh, self._path)
            opened = os.open(self._path, os.O_RDWR | os.O_APPEND)
            os.dup2(opened, self._handle)
            os.close(opened)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise StorageError(f"Cannot write {self._path}: {reason_of(error)}.") from error

    def close(self) -> None:
        """Close the file and let others have it."""
        self._lock.close()


def _drop_half_line(handle: int) -> None:
    """Cut the file behind its last line break."""
    end = os.fstat(handle).st_size
    position, step = end, 65536
    while position:
        start = max(0, position - step)
        os.lseek(handle, start, os.SEEK_SET)
        found = os.read(handle, position - start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position != end:
        os.ftruncate(handle, position)
        os.fsync(handle)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with path.open("rb") as handle:
            yield handle
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {reason_of(error)}.") from error


@contextlib.contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock file for the block; the system frees it when the process ends, however.

    Args:
        path: the lock file.
        wait: seconds to wait for another process to let it go.

    Raises:
        LedgerBusyError: another process has it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise LedgerBusyError(
            f"Another process is at work in {path.parent}: wait for it, stop it, or write to "
            "another folder."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StorageError(f"Cannot write {path}: {reason_of(error)}.") from error
    try:
        yield
    finally:
        lock.release()
