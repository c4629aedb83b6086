"""JSON files read one record at a time: an array of any length, or one object after the other.

Only the standard library's decoder is used, over a window that moves through the file, so memory
does not grow with the file and an error says at which line and record the file is broken.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from errata.errors import DatasetError

CHUNK = 1 << 20
"""Bytes read at a time."""
LONGEST = 1 << 28
"""A record of more characters is taken for a damaged file."""
_SPACE = re.compile(r"[ \t\r\n]*")
_DIGITS = re.compile(r"[0-9.eE+-]*")
_GZIP = b"\x1f\x8b"
_POINTER = b"version https://git-lfs"
_TAIL = 12
"""An error this close to the window's end may only mean that the rest is not read yet."""


def read_json(path: Path, name: str = "") -> Iterator[Any]:
    """Yield the records of a JSON file; see `read_numbered`."""
    return (value for _, value in read_numbered(path, name))


def read_numbered(path: Path, name: str = "") -> Iterator[tuple[int, Any]]:
    """Yield (line, record): the items of an array, or top-level values (JSON lines).

    UTF-8 with or without a byte order mark; gzip is recognised by its first bytes.

    Args:
        path: the file.
        name: how errors call it; by default its path.

    Raises:
        DatasetError: the file is empty, cut off, not JSON or not text, or a key stands twice in one
            object; says where.
    """
    name = name or str(path)
    with opened(path, name) as handle:
        window = _DecodedText(handle, name)
        first = window.peek()
        if not first:
            raise DatasetError("the file is empty", file=name)
        if first == "[":
            yield from _array(window)
        elif first == "{" or first == '"':
            while window.peek():
                yield window.line, window.value()
        else:
            raise DatasetError(
                f"starts with {window.ahead(40)!r}: not JSON (expected '[' for an array or '{{' "
                "for JSON lines)",
                file=name,
            )


@contextmanager
def opened(path: Path, name: str) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, unpacked where it is gzip.

    Raises `DatasetError` where it cannot be read, or is a Git LFS pointer and not the data.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(len(_POINTER))
        if head == _POINTER:
            raise DatasetError(
                "this is a Git LFS pointer, not the data: run `git lfs pull` where it comes from",
                file=name,
            )
        if head.startswith(_GZIP):
            with gzip.open(path, "rb") as unpacked:
                yield unpacked  # type: ignore[misc]  # reads like any binary file
        else:
            with path.open("rb") as handle:
                yield handle
    except OSError as error:
        raise DatasetError(f"cannot be read: {error}", file=name) from error


def _array(window: _DecodedText) -> Iterator[tuple[int, Any]]:
    window.skip()
    if window.peek() == "]":
        window.skip()
    else:
        while True:
            window.peek()
            yield window.line, window.value()
            mark = window.peek()
            if mark not in (",", "]"):
                window.fail("expected ',' or ']' after a record")
            window.skip()
            if mark == "]":
                break
    if window.peek():
        window.fail(f"the array has ended, but more follows: {window.ahead(40)!r}")


class _KeyTwice(Exception):
    """A key that stands twice in one object: one of its two values would be lost."""


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _KeyTwice(next(name for name in names if names.count(name) > 1))
    return found


class _DecodedText:
    """The part of a text file that is being decoded."""

    def __init__(self, handle: IO[bytes], name: str) -> None:
        self._handle = handle
        self._name = name
        self._utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        self._undecodable = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=_each_key_once)
        self._text = ""
        self._at = 0
        self._ended = False
        self._lines = 1  # number of the line that the character `_counted` stands on
        self._counted = 0
        self._records = 0

    @property
    def line(self) -> int:
        """Number of the line that is being read."""
        self._lines += self._text.count("\n", self._counted, self._at)
        self._counted = self._at
        return self._lines

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end of the file."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def ahead(self, length: int) -> str:
        """Return the next few characters."""
        return self._text[self._at : self._at + length]

    def skip(self) -> None:
        """Go past one character."""
        self._at += 1

    def value(self) -> Any:
        """Decode the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if self._ended or not self._may_go_on(error):
                    self._broken(error)
            except RecursionError:
                self.fail("nested too deeply")
            except _KeyTwice as error:
                self.fail(f"the key {str(error)[:60]!r} stands twice in one object: give it once")
            except ValueError:  # Python reads no whole number of more than 4,300 digits
                self.fail("a number has more digits than are read: put it in quotes")
            else:
                # A number at the window's end may have more digits.
                if self._ended or _DIGITS.fullmatch(self._text, end) is None:
                    self._at = end
                    self._records += 1
                    return value
            self._more()

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        """Raise a `DatasetError` with the line and the record."""
        line = self.line + self._text.count("\n", self._at, self._at if at is None else at)
        cut = self._ended and (self._at if at is None else at) >= len(self._text.rstrip())
        raise DatasetError(
            f"damaged at line {line}: {problem}"
            + ("; the file ends here: it is cut off" if cut else ""),
            file=self._name,
            index=self._records,
        )

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        """Say whether the text is right as far as it has been read."""
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _TAIL

    def _broken(self, error: json.JSONDecodeError) -> NoReturn:
        problem = error.msg.removesuffix(" at").removesuffix(" starting")
        at = len(self._text) if problem.startswith("Unterminated string") else error.pos
        self.fail(problem[0].lower() + problem[1:], at)

    def _more(self) -> None:
        """Drop what is decoded and read on; the more, the longer the unfinished record."""
        rest = len(self._text) - self._at
        if rest > LONGEST:
            self.fail(f"a record of more than {LONGEST:,} characters")
        new = self._read(max(CHUNK, rest))
        self._lines, self._counted = self.line, 0
        self._text = self._text[self._at :] + new
        self._at = 0

    def _read(self, size: int) -> str:
        """Return more text; the right part of a wrong piece first, then the error."""
        if self._undecodable:
            self.fail(self._undecodable, len(self._text))
        try:
            block = self._handle.read(size)
            self._ended = not block
            return self._utf8.decode(block, final=self._ended)
        except UnicodeDecodeError as error:
            self._undecodable = (
                f"not UTF-8 ({error.reason}, byte {error.object[error.start]:#04x}): "
                "save the file as UTF-8"
            )
            return error.object[: error.start].decode("utf-8-sig")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            self.fail(f"the gzip stream is broken ({error})", len(self._text))
