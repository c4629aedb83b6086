"""Running a benchmark: the base first, then everything else, every finished case on the disk."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from errata.bench.config import BenchConfig
from errata.bench.engines import Engine, SerialEngine
from errata.bench.planning import check_run
from errata.bench.results import (
    INFO,
    RESULTS,
    Line,
    ResultsFile,
    RunDirectory,
    load,
    read_info,
    write_info,
)
from errata.bench.run_spec import RunSpec
from errata.bench.work_units import (
    WorkUnit,
    base_state_units,
    base_units,
    edit_units,
    keys_of,
    left_over,
    prepare_units,
    to_retry,
)
from errata.common.progress import Progress
from errata.errors import IntegrityError

logger = logging.getLogger("errata")


def run(
    config: BenchConfig | Mapping[str, Any],
    directory: str | Path,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
    on_line: Callable[[Line], None] | None = None,
    trust_remote_code: bool = False,
    retry_failed: bool = False,
) -> RunDirectory:
    """Carry out a run, or what is left of it, and return its results.

    Killed at any instant it loses no finished case: the same call goes on where it was, and ends
    with the results that an uninterrupted run has, timings aside.

    Args:
        config: the run, or a mapping of its fields.
        directory: where results are kept; made when missing.
        engine: where cases are carried out; None: in this process. It is closed at the end.
        progress: where long work reports to.
        on_line: called with each line after it is on the disk.
        trust_remote_code: run Python code that comes with the model; it can do whatever you can.
        retry_failed: try again what failed before: cases, batches with one that did, and what was
            measured of the model as a whole. An edit that failed in a stream stays a failure: the
            edits after it were made without it.

    Raises:
        ConfigError: a bad configuration, or the directory holds another run.
        UnknownNameError: a method, dataset or protocol that does not exist.
        CapabilityError: a method cannot do what the regime asks.
        StorageError: the disk refuses; everything finished is kept.
    """
    spec = RunSpec(BenchConfig.parse(config), Path(directory).resolve(), trust_remote_code)
    progress = Progress.of(progress)
    engine = engine or SerialEngine(progress)
    try:
        check_run(spec)
        _warn_of_what_is_lost(spec)
        made = _run(spec, engine, progress, on_line, retry_failed)
    except BaseException:
        with suppress(Exception):  # the error that is on its way says more
            engine.close()
        raise
    engine.close()
    return made


def _warn_of_what_is_lost(spec: RunSpec) -> None:
    for dataset in range(len(spec.config.datasets)):
        lost = spec.unmeasured(dataset)
        if lost:
            logger.warning(
                "%s: what %s says of the model as a whole (retained probes, texts) belongs to no "
                "case, and with state: [] nothing is measured of the whole: it is left out. Name "
                "a protocol under state to have it, for example state: [%s].",
                spec.title(dataset), " and ".join(lost), lost[0],
            )  # fmt: skip


def _run(
    spec: RunSpec,
    engine: Engine,
    progress: Progress,
    on_line: Callable[[Line], None] | None,
    retry_failed: bool,
) -> RunDirectory:
    from errata.bench.run_identity import check_same, info_of

    folder = spec.folder()
    there = read_info(folder)  # before anything is written: the folder may be somebody else's
    if there is None and (folder / RESULTS).is_file() and (folder / RESULTS).stat().st_size:
        raise IntegrityError(
            f"{folder} has results but no {INFO} that says what they are: restore it, or give "
            "another folder."
        )
    with closing(ResultsFile.open(folder)) as results:
        (description,) = engine.run(spec, [WorkUnit("describe")])
        info = info_of(spec, description)
        there = read_info(folder)
        if there is None:
            write_info(folder, info)
        else:
            check_same(folder, there, info)
            if there["digest"] != info["digest"]:  # it has more cases or methods now
                write_info(folder, info)
        kinds = load(folder).kinds
        if retry_failed:
            again = to_retry(spec, kinds)
            results.drop(again)
            kinds = {key: kind for key, kind in kinds.items() if key not in again}
        edits = left_over(spec, edit_units(spec), kinds)
        phases = [
            ("Measuring the base", left_over(spec, base_units(spec), kinds)),
            ("Measuring the base as a whole", left_over(spec, base_state_units(spec), kinds)),
            ("Preparing", prepare_units(spec, edits)),
            ("Editing and measuring", edits),
        ]
        for text, units in phases:
            with closing(_lines(spec, engine, units, progress, text)) as lines:
                for line in lines:
                    results.add(line)
                    if on_line is not None:
                        on_line(line)
    return load(folder)


def _lines(
    spec: RunSpec, engine: Engine, units: Sequence[WorkUnit], progress: Progress, text: str
) -> Generator[Line, None, None]:
    """Yield the lines of units, telling how many of them are there."""
    if not units:
        return
    total = sum(1 for unit in units for key in keys_of(spec, unit) if key not in unit.done)
    lines = engine.run(spec, units)
    with closing(lines):
        yield from progress.track(lines, text, total) if total else lines
