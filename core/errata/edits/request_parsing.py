"""Requests from what callers pass: one or many, as requests, mappings or keyword arguments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from errata.common.arguments import is_list, mapping_of
from errata.edits.request import Request, parse_noting, warn_of_white_space
from errata.edits.request_problems import naming_place, refuse
from errata.errors import RequestError


def parse_requests(
    value: Request | Mapping[str, Any] | Iterable[Request | Mapping[str, Any]],
    repeated: bool = False,
) -> list[Request]:
    """Return requests from one or many; refuse an empty list, and unless `repeated` duplicates.

    Errors say which of several requests they are about.
    """
    if not is_list(value) and not isinstance(value, Request):
        raise RequestError(f"{value!r} is no request and no list of requests.")
    many = [value] if isinstance(value, (Request, Mapping)) else list(value)
    parsed = []
    for index, item in enumerate(many):
        with naming_place(index, len(many), item):
            parsed.append(parse_noting(item))
    requests = [request for request, _ in parsed]
    if not requests:
        raise RequestError("No requests were given: pass at least one.")
    warn_of_white_space([note for _, notes in parsed for note in notes])
    seen: dict[str, int] = {}
    for index, request in enumerate(() if repeated else requests):
        if (first := seen.setdefault(request.digest, index)) != index:
            raise RequestError(
                f"Requests {first} and {index} are the same "
                f"({request.text!r} → {request.wish!r}): give each change once."
            )
    return requests


def parse_arguments(
    request: Any, config: Mapping[str, Any], fields: Mapping[str, Any], repeated: bool = False
) -> tuple[bool, list[Request], dict[str, Any]]:
    """Tell request fields from hyper-parameters among keyword arguments.

    Returns (whether one request was meant, the requests, the hyper-parameters).
    """
    mine = {key: value for key, value in fields.items() if key in Request.model_fields}
    overrides = mapping_of(config, "config") | {k: v for k, v in fields.items() if k not in mine}
    if isinstance(request, str):
        if request:
            mine["prompt"] = request
        if not mine:
            raise RequestError("Say what to edit: a prompt with {}, subject=… and target_new=….")
        try:
            return True, [Request.parse(mine)], overrides
        except RequestError as error:
            refuse(str(error), overrides, Request.model_fields.keys() - mine)
    if mine:
        raise RequestError(
            f"{', '.join(mine)} given beside whole requests: put fields of requests into them, and "
            "hyper-parameters that are called so into config={…}."
        )
    return isinstance(request, (Request, Mapping)), parse_requests(request, repeated), overrides
