"""The requests of edits, as cases: those of different edits are different, whatever their ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from errata.common.arguments import is_list
from errata.edits.edit import Edit
from errata.edits.request import Request
from errata.edits.request_problems import naming_place
from errata.errors import RequestError


def requests_of(items: Request | Edit | Iterable[Request | Edit]) -> list[Request]:
    """Return requests and those of edits, in order, with ids that tell different edits apart.

    Files number their cases alike: an id that an earlier edit has becomes "0 (the edit's id)". But
    the edits of one chain (MQuAKE), made one by one, stay one case: they follow the edit that is
    asked about the whole case, by probes whose group is the case.

    Raises:
        RequestError: there is none, or something else among them.
    """
    if not is_list(items) and not isinstance(items, (Request, Edit)):
        raise RequestError(f"{items!r} is no request, no edit and no list of them.")
    many = [items] if isinstance(items, (Request, Edit, Mapping)) else list(items)
    requests: list[Request] = []
    told_apart = _told_apart(item for item in many if isinstance(item, Edit))
    for index, item in enumerate(many):
        with naming_place(index, len(many), item):
            requests += next(told_apart) if isinstance(item, Edit) else [Request.parse(item)]
    if not requests:
        raise RequestError("There is no request here: no edit is active and none was named.")
    return requests


def _told_apart(edits: Iterable[Edit]) -> Iterator[list[Request]]:
    """Yield the requests of each edit, with ids that no other fact has."""
    owners: dict[str, str] = {}
    chain, head = "", ""
    for edit in edits:
        found = []
        for request in edit.requests:
            case = request.case_id or ""
            owner = edit.id
            if case and any(probe.group == case for probe in request.portability):
                chain, head = case, edit.id
            elif case == chain:
                owner = head
            else:
                chain = ""
            if case and owners.setdefault(case, owner) != owner:
                request = request.model_copy(update={"case_id": f"{case} ({owner})"})
            found.append(request)
        yield found
