"""Benchmark runs: `bench` measures methods on datasets, a line per case, resumable."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from errata.cli import render
from errata.cli.command import OUTPUT, command
from errata.cli.error_reports import FAILED
from errata.cli.name_values import pairs
from errata.cli.prechecks import check_model
from errata.cli.requests import SkipBad
from errata.cli.session import Session, calm_transformers
from errata.errors import ConfigError, UnknownNameError

if TYPE_CHECKING:
    from errata.bench import BenchConfig, BenchPlan, Engine, RunDirectory
    from errata.bench.report import Report

PANEL = "Measure"
ENGINES = ("serial", "processes", "ray")
RUNS = Path("runs")
LISTED = 3
"""Failures that are shown when a run ends; `errata report` shows them all."""


def add(app: typer.Typer) -> None:
    """Add the command of this module."""
    command(
        app,
        "bench",
        panel=PANEL,
        shared=("device", "dtype", "trust_remote_code", *OUTPUT),
        examples=(
            "errata bench examples/bench/atlas-single.yaml --limit 20\n"
            "errata bench --model atlas-gpt2 --method rome --method grace --dataset atlas "
            "--limit 20 --out runs/first\n"
            "errata bench run.yaml --dry-run --probe 2\n"
            "errata bench run.yaml --jobs 4"
        ),
    )(bench)


def bench(
    session: Session,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="RUN.yaml", help="A run file; the options below override it."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder of the results; by default runs/NAME."),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run; by default the file's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="NAME|FOLDER", help="Zoo name, checkpoint folder or hub name."
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--method", help="A method, a label of the run file, or base alone (repeatable)."
        ),
    ] = None,
    values: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="LABEL.NAME=VALUE",
            help="A hyper-parameter of one variant (repeatable).",
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option("--dataset", metavar="NAME[=PATH]", help="A dataset (repeatable)."),
    ] = None,
    corpus: Annotated[
        str | None,
        typer.Option(
            "--corpus", metavar="FILE", help="Text for second moments; by default errata's."
        ),
    ] = None,
    no_corpus: Annotated[
        bool, typer.Option("--no-corpus", help="errata's own text, whatever the run file says.")
    ] = False,
    regime: Annotated[
        str | None,
        typer.Option("--regime", help="single, batch, sequential, continual or cross-domain."),
    ] = None,
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="Repeat with each (repeatable).")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=1, help="The first N cases of each dataset.")
    ] = None,
    skip_bad: SkipBad = False,
    protocols: Annotated[
        list[str] | None,
        typer.Option("--protocol", "-p", help="How a case is measured (repeatable)."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Cases edited at once, in batches or a stream."),
    ] = None,
    checkpoints: Annotated[
        list[int] | None,
        typer.Option("--checkpoint", min=1, help="Of a stream: measure all so far (repeatable)."),
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", "-j", min=1, help="Worker processes, each with the model.")
    ] = 1,
    engine: Annotated[
        str | None, typer.Option("--engine", help="serial, processes or ray.")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try again what failed before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")
    ] = False,
    probe: Annotated[
        int,
        typer.Option("--probe", min=0, help="With --dry-run: time N cases per variant."),
    ] = 0,
) -> None:
    """Measure methods on datasets: a line for each case, on the disk as soon as it is done.

    The base is measured first, with every edit off. Give the same command again after an
    interruption, however it came: it goes on where it was. What failed stays failed unless
    --retry-failed is given.
    """
    from errata.bench import plan, run
    from errata.bench.results import INFO

    given: dict[str, Any] = {
        "name": name, "model": model, "device": session.device, "dtype": session.dtype,
        "corpus": corpus, "regime": regime, "seeds": seeds, "limit": limit, "protocols": protocols,
        "batch_size": batch_size, "checkpoints": checkpoints, "skip_bad": skip_bad or None,
    }  # fmt: skip
    config = _config(file, given, methods or (), datasets or (), values or ())
    if no_corpus:
        config = config.model_copy(update={"corpus": None})
    folder = out or RUNS / config.name
    if probe and not dry_run:
        raise ConfigError("--probe needs --dry-run: give both, or neither.")
    if corpus and no_corpus:
        raise ConfigError("Give --corpus or --no-corpus, not both.")
    check_model(config.model)
    with session.status("Loading"):
        calm_transformers()
        chosen = None if dry_run else _engine(engine, jobs, session)
    if dry_run:
        with session.status("Planning"):
            there = folder if folder.exists() else None
            trust = session.trust_remote_code
            planned = plan(
                config, there, probe=probe, trust_remote_code=trust, retry_failed=retry_failed
            )
            _show_plan(session, planned)
        return
    try:
        done = run(
            config, folder, engine=chosen, progress=session.progress,
            trust_remote_code=session.trust_remote_code, retry_failed=retry_failed,
        )  # fmt: skip
    except KeyboardInterrupt:
        session.say(
            f"Every finished case is in {folder}: the same command goes on from there."
            if (folder / INFO).is_file()
            else f"No case was finished and nothing is in {folder}: the same command begins anew."
        )
        raise
    _show_run(session, done)


# -- the configuration -----------------------------------------------------------------------------


def _config(
    file: Path | None,
    given: Mapping[str, Any],
    methods: Sequence[str],
    datasets: Sequence[str],
    values: Sequence[str],
) -> BenchConfig:
    """Return the run file's configuration with the options that were given."""
    from errata.bench import BenchConfig
    from errata.bench.config import overridden, read_fields

    options = {key: value for key, value in given.items() if value is not None}
    if methods:
        options["methods"] = list(methods)
    if datasets:
        options["datasets"] = [_dataset(item) for item in datasets]
    fields = overridden({} if file is None else read_fields(file), options)
    if fields.get("regime") == "continual" and datasets and len(datasets) == 1:
        raise ConfigError("A continual run mixes datasets: give --dataset twice or more.")
    missing = [option for key, option in
               (("model", "--model"), ("methods", "--method"), ("datasets", "--dataset"))
               if key not in fields]  # fmt: skip
    if missing:
        raise ConfigError(f"Give {', '.join(missing)}, or a run file that names it.")
    config = BenchConfig.parse(fields, "" if file is None else str(file))
    return BenchConfig.parse({**fields, "methods": _set(config, values)}) if values else config


def _dataset(item: str) -> dict[str, Any]:
    name, sign, path = item.partition("=")
    return {"name": name, **({"path": path} if sign else {})}


def _set(config: BenchConfig, values: Sequence[str]) -> list[Any]:
    """Return the variants with the hyper-parameters of --set."""
    variants = {variant.label: variant for variant in config.methods}
    for key, value in pairs(values, "--set").items():
        label, sign, name = key.rpartition(".")
        if not sign:
            raise ConfigError(f"--set {key}={value}: write LABEL.NAME=VALUE.")
        if label not in variants:
            raise UnknownNameError("variant", label, variants)
        former = variants[label]
        variants[label] = former.model_copy(update={"config": {**former.config, name: value}})
    return list(variants.values())


def _engine(name: str | None, jobs: int, session: Session) -> Engine:
    from errata.bench import ProcessEngine, RayEngine, SerialEngine

    name = name or ("serial" if jobs == 1 else "processes")
    if name not in ENGINES:
        raise UnknownNameError("engine", name, ENGINES)
    if name == "ray":
        return RayEngine(jobs, address=os.environ.get("RAY_ADDRESS"))
    if name == "processes":
        return ProcessEngine(jobs)
    if jobs > 1:
        raise ConfigError(f"--engine serial is one process; --jobs {jobs} needs another engine.")
    return SerialEngine(session.progress)


# -- what is shown ---------------------------------------------------------------------------------


def _show_plan(session: Session, plan: BenchPlan) -> None:
    if session.json:
        session.emit(plan.as_json())
        return
    right: dict[str, Any] = {"justify": "right", "no_wrap": True}
    grid = render.table(
        ("variant", {"no_wrap": True}), ("method", {"no_wrap": True}), ("cases", right),
        ("edits", right), ("measured", right), ("states", right), ("done", right),
        ("left", right),
    )  # fmt: skip
    for column in plan.columns:
        total = column.measured + column.states
        spent = "–" if column.seconds is None else render.seconds(column.seconds)
        grid.add_row(
            Text(column.label, style="accent"), column.method, str(column.cases),
            str(column.edits), str(column.measured), str(column.states),
            f"{column.done} of {total}", spent,
        )  # fmt: skip
    config = plan.config
    seeds = render.count(len(config.seeds), "seed")
    session.show(render.heading(config.name, f"{config.model}, {config.regime}, {seeds}"), grid)
    for title, how in plan.protocols.items():
        whole = f"; the model as a whole: {', '.join(how['state'])}" if how["state"] else ""
        session.show(Text(f"{title}: {', '.join(how['cases']) or 'no case'}{whole}", style="muted"))
    for column in plan.columns:
        if column.cannot:
            session.show(
                Text(
                    f"{column.label} cannot carry out {column.cannot} of {column.cases} cases "
                    "(their kind): they become failures",
                    style="warn",
                )
            )
    if plan.seconds is not None:
        session.show(f"About {render.seconds(plan.seconds)} in one process, from {plan.estimate}.")
    else:
        session.show(Text("How long it takes is not known: time a few cases with --probe 2",
                          style="muted"))  # fmt: skip


def _show_run(session: Session, run: RunDirectory) -> None:
    """Show the results of a run; leave with an error only if nothing could be carried out."""
    from errata.bench.report import read

    counted = _counts(run)
    measured = any(count["cases"] for count in counted.values())
    found = read(run.directory) if measured else None
    if session.json:
        session.emit(
            {
                "directory": str(run.directory),
                "digest": run.info["digest"],
                "columns": counted,
                "measurements": [] if found is None else _measurements(found),
            }
        )
    elif found is not None:
        from errata.bench.report.terminal import summary

        session.show(summary(found, session.out.width))
    failed = [
        f"{label}: {render.count(count['failures'], 'failure')}"
        for label, count in counted.items()
        if count["failures"]
    ]
    refused = [f"{k}: {c['refused']} refused" for k, c in counted.items() if c["refused"]]
    for text in (*failed, *refused):
        session.show(Text(text, style="warn"))
    if failed:
        _show_failures(session, list(run.failures()))
    every = "every case, and why others failed" if failed else "every case"
    session.show(
        Text(f"{run.directory}: {every}", style="muted"),
        Text(f"Tables and figures: errata report {run.directory}", style="muted"),
    )
    wanted = [count for label, count in counted.items() if label != "base"] or counted.values()
    if not any(count["cases"] for count in wanted):
        raise typer.Exit(FAILED)


def _show_failures(session: Session, lines: Sequence[Mapping[str, Any]]) -> None:
    """Show the first failures, with --debug where they were raised, and how to try them again."""
    for line in lines[:LISTED]:
        session.show(Text(f"  {line['key']}: {render.quoted(line['error'], 200)}", style="muted"))
        if session.debug and "traceback" in line:
            session.show(Text(line["traceback"], style="muted"))
    if any("traceback" in line for line in lines) and not session.debug:
        session.show(Text("  The same command with --debug shows where.", style="muted"))
    if len(lines) > LISTED:
        session.show(Text(f"  … and {len(lines) - LISTED} more", style="muted"))
    session.show(
        Text("The same command leaves them as they are; with --retry-failed it tries them again.",
             style="muted")
    )  # fmt: skip


def _measurements(report: Report) -> list[dict[str, Any]]:
    """Return every number of a report's tables, each with its dataset, variant and moment."""
    return [
        {
            "dataset": part.section.dataset,
            "variant": head.label,
            "moment": head.moment,
            **cell.measurement.as_json(cases=False),
        }
        for part in report.parts
        for table in part.tables
        for row in table.rows
        for head, cell in zip(table.heads, row.cells, strict=True)
        if cell is not None
    ]


def _counts(run: RunDirectory) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    labels = ["base", *(variant["label"] for variant in run.info["variants"])]
    for label in labels:
        found[label] = {"cases": 0, "refused": 0, "failures": 0}
    for line in run:
        count = found[line["variant"]]
        if line["kind"] == "failure":
            count["failures"] += 1
        elif line["kind"] == "case" and line["stage"] != "checkpoint":
            count["cases"] += 1
            count["refused"] += bool((line.get("edit") or {}).get("refused"))
    return found
