"""A reader: how one published format becomes requests, and where the format comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from errata.common.display import shortened
from errata.datasets.record import Record
from errata.datasets.source import Source
from errata.edits.request import Probe, Request, parse_noting
from errata.errors import DatasetError, PluginError, RequestError, blaming

Item = Request | Probe | DatasetError
"""What reading yields: a request; a probe of the dataset as a whole; a record that is bad.

A `DatasetError` that is *raised* instead ends the reading: the file itself is damaged.
"""
Read = Callable[..., Iterator[Item]]
"""`read(source, **options)`."""
Parse = Callable[..., Request | Mapping[str, Any] | Iterable[Request | Probe]]
"""`parse(record, **options)`: one record as a request, as fields of one, or as several."""
_END = object()


@dataclass(frozen=True)
class DatasetReader:
    """How to read one format.

    Attributes:
        name: what `load` and the command line call it.
        summary: what the data is.
        source: where it was published: paper, repository or hub id.
        licence: of the data.
        protocols: what is measured on it by default.
        read: from a `Source` and the options to items.
        options: name and meaning of what `load` takes besides.
        needs_path: whether it reads files; False for data that is shipped.
        files: options that name further files; the dataset's digest covers them.
    """

    name: str
    summary: str
    source: str
    licence: str
    protocols: tuple[str, ...]
    read: Read
    options: Mapping[str, str] = field(default_factory=dict)
    needs_path: bool = True
    files: tuple[str, ...] = ()


def per_record(parse: Parse) -> Read:
    """Return a `read` that turns each record of the source into requests by itself."""

    def read(source: Source, **options: Any) -> Iterator[Item]:
        for record in source.records():
            items = parsed(record, parse, **options)
            source.mute += not items
            yield from items

    return read


def parsed(record: Record, parse: Parse, **options: Any) -> list[Item]:
    """Return what a record gives: all of it, or the error that says what is wrong with it.

    Raises `PluginError`, naming function and record, where `parse` itself fails or returns
    something else.
    """
    name = f"{getattr(parse, '__module__', '?')}.{getattr(parse, '__qualname__', parse)}"
    try:
        with blaming(f"The reader {name} failed at {record.where}"):
            made = parse(record, **options)
            several = not isinstance(made, (Request, Mapping)) and isinstance(made, Iterable)
            items = list(made) if several else [made]
        return [
            _item(item, f"The reader {name} returned", record.where, record.note) for item in items
        ]
    except DatasetError as error:
        return [error]
    except (RequestError, ValidationError) as error:
        return [record.bad("", str(error))]


def checked(read: Read, called: str) -> Read:
    """Return another package's `read` whose mistakes become a `PluginError` that names it."""

    def reading(source: Source, **options: Any) -> Iterator[Item]:
        with blaming(f"{called} failed"):
            items = iter(read(source, **options))
        while True:
            with blaming(f"{called} failed"):
                item = next(items, _END)
            if item is _END:
                return
            yield _item(item, f"{called} gives", source.name, source.note)

    return reading


def _item(made: Any, gives: str, where: str, note: Callable[[str], None]) -> Item:
    if isinstance(made, (Request, Probe, DatasetError)):
        return made
    if isinstance(made, Mapping):
        request, tidied = parse_noting(made)
        for text in tidied:
            note(f"{text} in {where}")
        return request
    raise PluginError(
        f"{gives} {shortened(repr(made), 60)} for {where}: it must be a Request, the fields of "
        "one, or several requests."
    )
