"""Requests that a command is given: as a file of its own, or as a dataset with its file."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from errata.common.display import plural
from errata.edits.request import Request, parse_noting, warn_of_white_space
from errata.errors import ConfigError, DatasetError, RequestError

if TYPE_CHECKING:
    from errata.datasets import Dataset
    from errata.model.model import Model

logger = logging.getLogger("errata")

Limit = Annotated[
    int | None,
    typer.Option("--limit", "-n", min=1, help="Only the first N of --file or --dataset."),
]
SkipBad = Annotated[
    bool,
    typer.Option(
        "--skip-bad",
        help="Leave out records that cannot be read or that the model cannot be asked.",
    ),
]
Join = Annotated[
    str | None,
    typer.Option(
        "--join",
        metavar="TEXT",
        help='What stands between prompt and answer, "" or " "; by default a space where the '
        "scripts use one.",
    ),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Each prompt is a user's turn: render the chat template.")
]


@dataclass(frozen=True)
class RequestSource:
    """Where a command's requests are read from: a file of errata's own schema, or a dataset.

    Attributes:
        file: of --file; None where a dataset is named.
        dataset: "NAME=PATH" of --dataset; "" where a file is given.
        limit: only the first so many.
        skip_bad: leave out what cannot be read.
    """

    file: Path | None
    dataset: str
    limit: int | None
    skip_bad: bool

    def load(self, options: Mapping[str, Any] | None = None) -> Dataset:
        """Return the dataset; `options` go to its reader."""
        return read_dataset(self.dataset, self.limit, skip_bad=self.skip_bad, options=options)

    def requests(self, *, repeated: bool = False) -> list[Request]:
        """Return the requests.

        Raises `RequestError` for one that stands in the file twice, unless they may be `repeated`.
        """
        if self.file is not None:
            return read_requests(self.file, self.skip_bad, repeated)[: self.limit]
        return list(self.load().requests())


def request_source(
    file: Path | None,
    dataset: str,
    limit: int | None,
    skip_bad: bool,
    instead: Sequence[str] = (),
) -> RequestSource | None:
    """Return where requests are to be read from; None where no option says so.

    Args:
        file: of --file.
        dataset: of --dataset.
        limit: of --limit.
        skip_bad: of --skip-bad.
        instead: what was given that says which requests by itself: ids, a prompt.

    Raises:
        RequestError: more than one of them says which requests, or --limit or --skip-bad stands
            without a source.
    """
    named = [name for name, on in (("--file", file), ("--dataset", dataset)) if on]
    if named:
        first, *others = [*named, *instead]
        if others:
            raise RequestError(
                f"{first} beside {', '.join(others)}: each says which requests are meant. Give "
                "one of them."
            )
        return RequestSource(file, dataset, limit, skip_bad)
    if limit is not None or skip_bad:
        option = "--skip-bad" if limit is None else "--limit"
        raise RequestError(f"{option} goes with --file or --dataset.")
    return None


def read_requests(file: Path, skip_bad: bool = False, repeated: bool = False) -> list[Request]:
    """Read requests in errata's own schema: a JSON array, or one object a line; - is stdin.

    Raises `RequestError` naming what is wrong as file:line; with `skip_bad` a warning says it.
    Unless requests may be `repeated`, it is wrong that one is the same as an earlier one.
    """
    from errata.datasets.cells import DELIMITERS, suffix_of
    from errata.datasets.source import TABLES

    if suffix_of(file) in (*DELIMITERS, *TABLES):
        raise RequestError(f"{file} is a table: --dataset jsonl={file} reads it.")
    if str(file) != "-":
        return _requests_of(file, str(file), skip_bad, repeated)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "stdin"
        copy.write_bytes(sys.stdin.buffer.read())
        return _requests_of(copy, "stdin", skip_bad, repeated)


def _requests_of(file: Path, name: str, skip_bad: bool, repeated: bool) -> list[Request]:
    from errata.datasets.streams import read_numbered

    found: list[Request] = []
    notes: list[str] = []
    bad: list[str] = []
    seen: dict[str, int] = {}
    try:
        for line, data in read_numbered(file, name):
            try:
                request, noted = _request(data, f"{name}:{line}")
                first = seen.setdefault(request.digest, line)
                if first != line and not repeated:
                    raise RequestError(f"{name}:{line}: the same request as in line {first}.")
            except RequestError as error:
                if not skip_bad:
                    raise
                bad.append(str(error))
                continue
            notes += [f"{name}:{line}: {note}" for note in noted]
            found.append(request)
    except DatasetError as error:
        raise RequestError(f"{name}: {error.problem}") from None
    if not found:
        raise RequestError(bad[0] if bad else f"{name} holds no request.")
    if bad:
        logger.warning("%d left out as bad; the first: %s", len(bad), bad[0])
    warn_of_white_space(notes)
    return found


def _request(data: object, where: str) -> tuple[Request, list[str]]:
    if not isinstance(data, dict):
        shown = repr(data)[:60]
        raise RequestError(f"{where}: a request is a JSON object, not {shown}.")
    try:
        return parse_noting({key: value for key, value in data.items() if value is not None})
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from None


def read_dataset(
    given: str,
    limit: int | None = None,
    *,
    start: int = 0,
    option: str = "--dataset",
    skip_bad: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Dataset:
    """Load the dataset that NAME=PATH names, or a NAME that needs no file.

    `options`: of the dataset's reader.
    """
    from errata.datasets import load

    name, _, path = given.partition("=")
    if not name:
        raise ConfigError(f"{option} {given!r}: give NAME=PATH, a dataset and its file.")
    return load(name, path or None, start=start, limit=limit, skip_bad=skip_bad, **(options or {}))


def each_once(requests: Sequence[Request]) -> list[Request]:
    """Return requests without repetitions; warn of how many were left out.

    Records without ids may repeat, and a change is made once.
    """
    kept = list(dict.fromkeys(requests))
    if left_out := len(requests) - len(kept):
        logger.warning("%s left out: the same as an earlier one.", plural(left_out, "request"))
    return kept


def askable(model: Model, requests: Sequence[Request], *, skip_bad: bool = False) -> list[Request]:
    """Return the requests that a model can be asked about.

    Raises `RequestError` naming the first that it cannot be; with `skip_bad` a warning names them.
    """
    from errata.datasets.askable import named, unaskable

    found = unaskable(model, requests)
    if not found:
        return list(requests)
    said = named([(requests[place], why) for place, why in found.items()])
    problem = f"{model.name} cannot be asked {len(found)} of {len(requests)} requests"
    if not skip_bad or len(found) == len(requests):
        raise RequestError(f"{problem}: {said}. --skip-bad leaves such requests out.")
    logger.warning("%s; left out: %s.", problem, said)
    return [request for place, request in enumerate(requests) if place not in found]


def asked_as(requests: Sequence[Request], join: str | None, chat: bool) -> list[Request]:
    """Return requests with what --join and --chat say; without them, as they are."""
    said: dict[str, Any] = {} if join is None else {"join": join}
    if chat:
        said["chat"] = True
    if not said:
        return list(requests)
    return [
        Request.parse({**request.model_dump(exclude_unset=True), **said}) for request in requests
    ]
