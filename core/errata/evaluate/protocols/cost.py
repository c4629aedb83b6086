"""The `cost` protocol: what the active edits took to compute, and take to store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from errata.contract.measurement import Measurement
from errata.contract.protocol import Protocol

if TYPE_CHECKING:
    from errata.edits.edit import Edit
    from errata.evaluate.reader import Reader


def _mean(metric: str, rows: Sequence[tuple[Edit, float]], unit: str, how: str) -> Measurement:
    return Measurement.mean(
        metric,
        [value for _, value in rows],
        how,
        case_ids=[_case(edit) for edit, _ in rows],
        unit=unit,
        direction="lower",
    )


def _case(edit: Edit) -> str:
    """Return the case that an edit is of, so that methods can be compared; else its own id."""
    names = {request.case_id or request.digest[:12] for request in edit.requests}
    return names.pop() if len(names) == 1 else edit.id


def measurements(edits: Sequence[Edit]) -> list[Measurement]:
    """Return seconds, bytes and (where it was recorded) peak memory per edit; [] without any.

    A case is an edit: one that was computed for several requests at once is one case. What is
    computed beforehand (statistics, a trained network), applying and checking are not counted.
    """
    if not edits:
        return []
    several = sum(len(edit.requests) > 1 for edit in edits)
    what = f"{len(edits)} active edits" + (f", {several} of several requests" * bool(several))
    found = [
        _mean(
            "seconds_per_edit", [(e, e.seconds) for e in edits], "seconds",
            f"cost: wall time to compute the change, {what}; edits computed together share it "
            "equally",
        ),
        _mean(
            "bytes_per_edit", [(e, e.nbytes) for e in edits], "bytes",
            f"cost: bytes of the stored tensors, {what}",
        ),
    ]  # fmt: skip
    metered = [(edit, peak) for edit in edits if (peak := edit.outcome.peak_memory) is not None]
    for how in dict.fromkeys(peak.how for _, peak in metered):
        rows = [(edit, float(peak.bytes)) for edit, peak in metered if peak.how == how]
        found.append(
            _mean(
                "peak_memory", rows, "bytes",
                f"cost: growth of memory while the change was computed ({how}), {what}; edits "
                "computed together each carry the whole",
            )
        )  # fmt: skip
    return found


def _measure(reader: Reader) -> list[Measurement]:
    return measurements(list(reader.model.stack.entries))


PROTOCOL = Protocol(
    "cost",
    "seconds and peak memory to compute an edit, and bytes to store it",
    "Yao et al. 2023, Editing Large Language Models: Problems, Methods, and Opportunities, "
    "section 5.3",
    _measure,
)
