"""Loading a dataset: checked as a whole first, then streamed request by request."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from errata.common.display import plural
from errata.datasets.catalogue import READERS
from errata.datasets.reader import DatasetReader, Item
from errata.datasets.source import Source, open_source
from errata.edits.request import Probe, Request, warn_of_white_space
from errata.errors import ConfigError, DatasetError, UnknownNameError

log = logging.getLogger("errata")


@dataclass(frozen=True)
class Dataset:
    """Requests of one dataset: iterate over it as often as you like; nothing is kept in memory.

    Attributes:
        name: of the reader.
        source: path or hub id, as given; "the records given" for records in memory.
        digest: SHA-256 of the bytes read.
        protocols: what is measured on it by default.
        retain: probes of the dataset as a whole, which no edit may change.
        problems: the records that were left out, each with its reason.
        size: number of requests.
        case_count: number of cases; requests of one case are edited together.
    """

    name: str
    source: str
    digest: str
    protocols: tuple[str, ...]
    retain: tuple[Probe, ...]
    problems: tuple[DatasetError, ...]
    size: int
    case_count: int
    _stream: Callable[[], Iterator[tuple[int, Request]]] = field(repr=False, compare=False)

    @property
    def skipped(self) -> int:
        """Number of bad records that were left out."""
        return len(self.problems)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in self._stream())

    def __len__(self) -> int:
        return self.size

    def requests(self, limit: int | None = None) -> list[Request]:
        """Return the first `limit` requests, by default all."""
        return list(itertools.islice(self, _checked(limit)))

    def cases(self, limit: int | None = None) -> Iterator[tuple[Request, ...]]:
        """Yield the first `limit` cases: the neighbouring requests of one `case_id`."""
        return (case for _, case in self.placed_cases(limit))

    def placed_cases(self, limit: int | None = None) -> Iterator[tuple[int, tuple[Request, ...]]]:
        """Yield what `cases` does, each with the place of its first request in the source.

        Counted from 0, and bad records and cases before `start` count: the place is the same
        however much of the source is read.
        """
        places: deque[int] = deque()

        def requests() -> Iterator[Request]:
            for place, request in self._stream():
                places.append(place)
                yield request

        for case in itertools.islice(cases_of(requests()), _checked(limit)):
            first, *_ = [places.popleft() for _ in case]
            yield first, case


def load(
    name: str,
    path: str | Path | Iterable[Mapping[str, Any]] | None = None,
    *,
    split: str | None = None,
    start: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
    **options: Any,
) -> Dataset:
    """Load a dataset by the name of its format.

    The file is read once here, so that a bad record shows now and not in the middle of a run, and
    again at each iteration; memory does not grow with the file.

    >>> from errata.datasets import load
    >>> data = load("atlas", limit=2)
    >>> [request.relation for request in data]
    ['instrument', 'born_in']

    Args:
        name: a reader of `READERS`.
        path: a local file or folder, or a hub id: "owner/name", "owner/name/path/to/file.json";
            or records in memory, as such a file holds them: an iterable of mappings.
        split: "train", "test" …, where the source has splits.
        start: cases left out at the beginning: to train on what is not tested, of one file.
        limit: number of cases; what comes after them is not read.
        skip_bad: leave bad records out, count and log them. Never done for a damaged file.
        **options: of the reader (`READERS[name].options`).

    Raises:
        UnknownNameError: there is no such reader or option.
        DatasetError: a file or record cannot be read; names file, index and field.
    """
    reader = READERS[name]
    for option in options:
        if option not in reader.options:
            raise UnknownNameError(f"option of {name}", option, reader.options)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1, or None for all cases.")
    if start < 0:
        raise ConfigError(f"start is {start}; it must be 0 or more.")
    source = _source(reader, path, split)
    read = partial(reader.read, source, **options)
    found = _Contents()
    for _, item in _sound(_part(read(), start, limit), source.name):
        if isinstance(item, DatasetError):
            if not skip_bad:
                raise _with_advice(item)
            log.info("Left out: %s", item)
        found.add(item)
    silent = source.seen > 0 and source.mute == source.seen
    if start and not found.size and not found.problems and not silent:
        raise ConfigError(f"start is {start}, and {source.name} has no more cases than that.")
    if not found.size:
        raise _empty(found, source, name)
    if source.mute:
        log.warning(
            "%s: of %d of the %s read, the reader %r made no case.",
            source.name, source.mute, plural(source.seen, "record"), name,
        )  # fmt: skip
    warn_of_white_space(source.taken_notes())
    if found.problems:
        log.warning(
            "%s: %d left out as bad; the first: %s",
            source.name, len(found.problems), found.problems[0],
        )  # fmt: skip
    return Dataset(
        name=reader.name,
        source=source.name,
        digest=_digest(source, [options[o] for o in reader.files if options.get(o) is not None]),
        protocols=reader.protocols,
        retain=tuple(found.retain),
        problems=tuple(found.problems),
        size=found.size,
        case_count=found.cases,
        _stream=partial(_requests, read, start, limit),
    )


def cases_of(requests: Iterable[Request]) -> Iterator[tuple[Request, ...]]:
    """Group neighbouring requests of one `case_id`; one without an id is a case by itself."""
    case: list[Request] = []
    for request in requests:
        if case and not (request.case_id is not None and request.case_id == case[-1].case_id):
            yield tuple(case)
            case = []
        case.append(request)
    if case:
        yield tuple(case)


class _Contents:
    """What one reading of the whole dataset has shown."""

    def __init__(self) -> None:
        self.retain: list[Probe] = []
        self.problems: list[DatasetError] = []
        self.size = 0
        self.cases = 0
        self._last: str | None = None

    def add(self, item: Item) -> None:
        """Count an item."""
        if isinstance(item, DatasetError):
            self.problems.append(item)
        elif isinstance(item, Probe):
            self.retain.append(item)
        else:
            self.size += 1
            new = item.case_id is None or item.case_id != self._last
            self.cases += new
            self._last = item.case_id


def _requests(
    read: Callable[[], Iterator[Item]], start: int, limit: int | None
) -> Iterator[tuple[int, Request]]:
    # Bad records have been counted, logged or refused when the dataset was loaded.
    items = _sound(_part(read(), start, limit))
    return ((place, item) for place, item in items if isinstance(item, Request))


def _sound(items: Iterable[tuple[int, Item]], name: str = "") -> Iterator[tuple[int, Item]]:
    """Yield items with their places, with errors in place of misplaced requests.

    Misplaced are a request that repeats one of its case, and one whose case goes on after another.
    """
    case: str | None = None
    cases: dict[str, int] = {}
    places: dict[Request, int] = {}
    for place, item in items:
        if not isinstance(item, Request) or item.case_id is None:
            case = None if isinstance(item, Request) else case
            yield place, item
            continue
        if item.case_id != case:
            if item.case_id in cases:
                yield place, DatasetError(_comes_back(item, place, cases[item.case_id]), file=name)
                continue
            case, places = item.case_id, {}
            cases[case] = place
        first = places.setdefault(item, place)
        if first == place:
            yield place, item
        else:
            yield place, DatasetError(_twice(item, place, first), file=name)


def _comes_back(request: Request, place: int, before: int) -> str:
    return (
        f"the case_id {request.case_id!r} comes back after other cases: request {place} "
        f"({request.text!r}) has it, as request {before} (counted from 0). Requests that are "
        "edited together must be neighbours, and other cases need other ids"
    )


def _twice(request: Request, place: int, before: int) -> str:
    return (
        f"the case {request.case_id!r} has the same request twice, as requests {before} and "
        f"{place} (counted from 0; {request.text!r} → {request.wish!r}): give each change once"
    )


def _part(items: Iterator[Item], start: int, limit: int | None) -> Iterator[tuple[int, Item]]:
    """Yield what belongs to `limit` cases after the first `start`, and all probes on the way.

    Each has its place: how many requests and bad records stand before it.
    """
    end = None if limit is None else start + limit
    cases, last, place = 0, None, -1
    for item in items:
        place += not isinstance(item, Probe)
        if isinstance(item, Request):
            if cases == 0 or item.case_id is None or item.case_id != last:
                cases += 1
            last = item.case_id
        number = cases if isinstance(item, Request) else cases + 1  # of the case it belongs to
        if end is not None and number > end:
            return
        if number > start or isinstance(item, Probe):
            yield place, item


def _source(
    reader: DatasetReader, path: str | Path | Iterable[Mapping[str, Any]] | None, split: str | None
) -> Source:
    if path is not None and reader.needs_path:
        return open_source(path, split)
    if reader.needs_path:
        raise ConfigError(
            f"The dataset {reader.name!r} is read from a file, a folder or a hub id: give its "
            f"path. It was published at: {reader.source}."
        )
    if path is not None or split is not None:
        raise ConfigError(f"The dataset {reader.name!r} is shipped with errata: it takes no path.")
    from errata.datasets.atlas import Shipped

    return Shipped()


def _digest(source: Source, others: list[str | Path]) -> str:
    """Return the digest of all bytes that were read: the source's, and other files' with it."""
    parts = [source.digest(), *(open_source(other).digest() for other in others)]
    return parts[0] if not others else hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _with_advice(error: DatasetError) -> DatasetError:
    problem = f"{error.problem}; skip_bad=True leaves such records out and counts them"
    return DatasetError(problem, file=error.file, index=error.index, field=error.field)


def _empty(found: _Contents, source: Source, reader: str) -> DatasetError:
    if found.problems:
        more = f", and of {source.mute} more no case was made" if source.mute else ""
        bad = len(found.problems)
        why = f"none of {bad} records could be read{more}; the first: {found.problems[0]}"
    elif source.seen:
        count = plural(source.seen, "record")
        why = f"the reader {reader!r} made no case of any of its {count}"
    else:
        why = "holds no records" + (f" of the split {source.split!r}" if source.split else "")
    return DatasetError(why, file=source.name)


def _checked(limit: int | None) -> int | None:
    if limit is not None and limit < 0:
        raise ConfigError(f"limit is {limit}; it must be 0 or more, or None for all.")
    return limit
