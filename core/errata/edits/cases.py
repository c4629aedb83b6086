"""Which cases the requests of edits are, where their files gave different facts the same id."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.edits.request import Request


def requests_of_edits(edits: Iterable[Edit]) -> list[Request]:
    """Return the requests of edits, in order; those of different edits are different cases.

    Files number their cases alike: an id that an earlier edit has becomes "0 (the edit's id)". But
    the edits of one chain (MQuAKE), made one by one, stay one case: they follow the edit that is
    asked about the whole case, by probes whose group is the case.
    """
    found: list[Request] = []
    owners: dict[str, str] = {}
    chain, head = "", ""
    for edit in edits:
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
    return found
