"""The lines of a results file: what a case, a state or a failure looks like as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from errata.bench.editing import CaseOutcome, error_text, traceback_text
from errata.bench.line_place import LinePlace
from errata.bench.results import Line
from errata.bench.run_spec import Case, RunSpec, case_name

if TYPE_CHECKING:
    from errata.evaluate import Measurement


def case_line(
    spec: RunSpec,
    place: LinePlace,
    case: Case,
    found: Sequence[Measurement],
    outcome: CaseOutcome | None,
    seconds: float,
) -> Line:
    """Return the line of a measured case.

    Args:
        spec: the run.
        place: where it belongs.
        case: its requests.
        found: its own numbers.
        outcome: what became of its edit; None for the base, and where nothing was to be edited.
        seconds: spent on measuring it (its share, where several were measured together).
    """
    # A checkpoint measures earlier edits again: their cost is on the line of the edit.
    now = outcome is not None and place.stage != "checkpoint"
    return {
        **place.fields(spec, "case"),
        "case_id": case_name(case),
        "requests": [r.model_dump(mode="json", exclude_defaults=True) for r in case],
        "edit": None if outcome is None else edit_json(outcome),
        "measurements": [item.as_json(cases=True) for item in found],
        "answers": [answer.as_json() for item in found for answer in item.answers],
        "seconds": {
            "edit": outcome.wall / outcome.shared if outcome is not None and now else 0.0,
            "measure": seconds,
        },
        "finished": timestamp(),
    }


def edit_json(outcome: CaseOutcome) -> dict[str, Any]:
    """Return what became of an edit, with one case's share of its cost."""
    shared = outcome.shared
    return {
        "ids": list(outcome.ids),
        "seconds": outcome.seconds / shared,
        "bytes": math.ceil(outcome.nbytes / shared),
        "refused": outcome.refused,
        **({"shared": shared} if shared > 1 else {}),
    }


def state_line(
    spec: RunSpec, place: LinePlace, found: Sequence[Measurement], seconds: float
) -> Line:
    """Return the line of a model as a whole."""
    return {
        **place.fields(spec, "state"),
        "case_id": None,
        "requests": [],
        "edit": None,
        "measurements": [item.as_json(cases=True) for item in found],
        "answers": [answer.as_json() for item in found for answer in item.answers],
        "seconds": {"edit": 0.0, "measure": seconds},
        "finished": timestamp(),
    }


def failure_line(
    spec: RunSpec, place: LinePlace, case: Case | None, error: BaseException | str, where: str = ""
) -> Line:
    """Return the line of a case (or a state, without one) that could not be carried out.

    Args:
        spec: the run.
        place: where it belongs.
        case: its requests.
        error: what was raised, or what it said.
        where: the traceback, where `error` is text and something was raised.
    """
    if isinstance(error, BaseException):
        where = traceback_text(error)
        error = error_text(error)
    return {
        **place.fields(spec, "failure"),
        "case_id": None if case is None else case_name(case),
        "requests": [
            r.model_dump(mode="json", exclude_defaults=True) for r in (case if case else ())
        ],
        "error": error,
        **({"traceback": where} if where else {}),
        "finished": timestamp(),
    }


def timestamp() -> str:
    """Return now, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """Return what the timings were measured on."""
    import os
    import platform

    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def versions(methods: Sequence[str]) -> dict[str, str]:
    """Return the versions of everything that computes."""
    from importlib.metadata import PackageNotFoundError, version

    from errata import __version__
    from errata.contract import plugins

    found = {"python": ".".join(map(str, sys.version_info[:3])), "errata": __version__}
    for name in ("torch", "transformers", "peft", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {**found, **{f"method {name}": plugins.version(name) for name in methods}}
