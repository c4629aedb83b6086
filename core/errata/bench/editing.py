"""Carrying out one case's edit: all of it, or nothing and the reason."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from errata.bench.results import RESULTS
from errata.errors import EditRefused, LedgerError, SelfComparisonError, StorageError

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.edits.request import Request

logger = logging.getLogger("errata")

FATAL = (StorageError, LedgerError, SelfComparisonError)
"""Errors that are about the run, not about one case: they end it."""


@dataclass(frozen=True)
class CaseOutcome:
    """What became of the edit of a case, or of several in one call.

    Attributes:
        ids: the edits that carry it out.
        seconds: time the method took to compute them.
        nbytes: bytes of their deltas.
        refused: why a guard refused it; None where none did.
        error: why it could not be carried out; None where it could.
        traceback: where that was raised; "" where nothing was.
        wall: wall-clock time of the whole transaction: computing, applying, guards, recording.
        shared: how many cases it carries out together, by which its cost is divided.
        right: the model gave the answers already, so that nothing was edited.
    """

    ids: tuple[str, ...] = ()
    seconds: float = 0.0
    nbytes: int = 0
    refused: str | None = None
    error: str | None = None
    traceback: str = ""
    wall: float = 0.0
    shared: int = 1
    right: bool = False

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "ids": list(self.ids)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CaseOutcome:
        """Return the outcome that `as_json` wrote."""
        return cls(**{**data, "ids": tuple(data["ids"])})


def edit_case(
    editor: Editor,
    requests: Sequence[Request],
    *,
    method: str,
    config: Mapping[str, Any],
    before: Sequence[str] = (),
) -> CaseOutcome:
    """Edit the model with requests that belong together; leave it alone if any of them fails.

    Args:
        editor: whose model is edited.
        requests: of one case, or of a batch of cases.
        method: name of the method.
        config: its hyper-parameters.
        before: ids of edits that carry out some of the requests already: a run that was killed
            between two of them goes on there.

    Raises:
        StorageError, LedgerError: the run cannot go on.
    """
    former = [edit_id for edit_id in editor.model.stack.ids if edit_id not in before]
    known = [editor.ledger.get(edit_id) for edit_id in before]
    there = {request.digest for edit in known for request in edit.requests}
    wanted = [request for request in requests if request.digest not in there]
    started = time.perf_counter()
    refused = error = None
    where = ""
    try:
        if wanted:
            can = editor.registry.method(method).capabilities
            size = len(wanted) if can.batch and len(wanted) > 1 else None
            known += editor.edit(wanted, method=method, config=config, batch_size=size)
    except EditRefused as problem:
        refused = problem.reason
    except FATAL:
        raise
    except Exception as problem:
        logger.debug("A case failed", exc_info=True)
        error, where = error_text(problem), traceback_text(problem)
    wall = time.perf_counter() - started
    if refused is not None or error is not None:
        left = [edit_id for edit_id in editor.model.stack.ids if edit_id not in former]
        if left:
            editor.revert(*left)
        return CaseOutcome(refused=refused, error=error, traceback=where, wall=wall)
    return CaseOutcome(
        ids=tuple(edit.id for edit in known),
        seconds=sum(edit.seconds for edit in known),
        nbytes=sum(edit.nbytes for edit in known),
        wall=wall,
    )


def error_text(error: BaseException) -> str:
    """Return an error in one line: its type and what it says."""
    said = " ".join(str(error).split()).replace(
        "(the traceback shows where)", f"({RESULTS} has the traceback)"
    )
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def traceback_text(error: BaseException) -> str:
    """Return where an error was raised, as Python prints it."""
    return "".join(traceback.format_exception(error))
