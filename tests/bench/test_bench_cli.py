"""`errata bench`: options over run files, what it shows, its exit codes; and the run files."""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from errata import bench
from errata.bench.report import read
from errata.cli import bench as command
from errata.cli.error_reports import FAILED
from errata.contract import plugins
from tests.bench.bench_helpers import SUBJECTS, short
from tests.helpers import ROOT

Run = Callable[..., Any]
EXAMPLES = sorted((ROOT / "examples" / "bench").glob("*.yaml"))


@pytest.fixture
def run(installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    app = typer.Typer()
    command.add(app)
    app.callback()(lambda: None)

    def call(*args: Any, code: int = 0) -> Any:
        result = CliRunner().invoke(app, ["bench", *map(str, args)])
        assert result.exit_code == code, f"{result.stdout}\n{result.stderr}\n{result.exception!r}"
        return result

    return call


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    methods = [{"method": "nudge", "variant": "far", "config": {"scale": 0.5}}, "nudge"]
    path.write_text(yaml.safe_dump(short(methods=methods)))
    return path


def planned(run: Run, *args: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--dry-run", "--json").stdout)
    return found


def test_a_dry_run_says_what_would_be_done_and_does_nothing(
    run: Run, file: Path, tmp_path: Path
) -> None:
    text = run(file, "--dry-run").stdout
    assert "far" in text
    assert "not known" in text
    assert "--probe" in text
    assert not (tmp_path / "runs").exists()


def test_options_override_the_run_file(run: Run, file: Path) -> None:
    plan = planned(run, file, "--limit", 2, "--seed", 3, "--seed", 4, "--method", "far",
                   "--regime", "sequential", "--checkpoint", 1)  # fmt: skip
    assert plan["seeds"] == [3, 4]
    assert plan["regime"] == "sequential"
    (base, far) = plan["columns"]
    assert (base["cases"], far["label"], far["method"]) == (4, "far", "nudge")
    assert far["measured"] == 2 * (2 + 1 + 2)


@pytest.mark.parametrize(
    ("overrides", "options"),
    [
        ({"limit": 2}, ["--limit", 2]),
        ({"regime": "single"}, ["--regime", "single"]),
        (
            {"regime": "single", "limit": 3, "seeds": 5},
            ["--regime", "single", "-n", 3, "--seed", 5],
        ),
        ({"methods": "far"}, ["--method", "far"]),
        ({"skip_bad": True, "limit": 2}, ["--skip-bad", "-n", 2]),
        ({"methods": ["spare", "nudge"]}, ["--method", "spare", "--method", "nudge"]),
        ({"datasets": ["atlas"], "limit": 2}, ["--dataset", "atlas", "--limit", 2]),
    ],
)
def test_overrides_in_python_do_what_the_options_do(
    run: Run, tmp_path: Path, overrides: dict[str, Any], options: list[Any]
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "model: atlas-gpt2\nregime: batch\nbatch_size: 2\nprotocols: generation\n"
        "datasets: [atlas, {name: atlas, label: four, limit: 4}]\n"
        "methods: [nudge, {method: nudge, variant: far, config: {scale: 0.8}}]\n"
        "optional_methods: {method: nudge, variant: spare, config: {scale: 0.1}}\n"
    )
    config = bench.read_config(file, overrides)
    assert planned(run, file, *options) == bench.plan(config).as_json()
    if "skip_bad" in overrides:
        assert all(spec.skip_bad for spec in config.datasets)
    if "limit" in overrides:
        assert {spec.limit or config.limit for spec in config.datasets} == {overrides["limit"]}
    if overrides.get("regime") == "single":
        assert config.batch_size is None
    if overrides.get("methods") == "far":
        assert config.methods[0].config == {"scale": 0.8}


def test_a_dry_run_refuses_the_folder_of_another_run_as_the_run_does(run: Run, file: Path) -> None:
    base = (file, "--limit", 2, "--out", "there", "-q")
    run(*base)
    assert "far" in run(*base, "--dry-run").stdout
    assert "far" in run(file, "--limit", 3, "--out", "there", "--dry-run").stdout  # it may grow
    for other in (
        ("--set", "far.scale=0.75"), ("--seed", 5), ("--limit", 1), ("--method", "far"),
        ("--regime", "sequential"), ("--set", "nudge.scale=0.75"),
    ):  # fmt: skip
        refused = run(*base, *other, code=1).stderr
        assert "holds another run" in " ".join(refused.split())
        assert run(*base, *other, "--dry-run", code=1).stderr == refused


def test_flags_alone_are_enough(run: Run) -> None:
    plan = planned(run, "--model", "atlas-gpt2", "--method", "nudge", "--dataset", "atlas", "-n", 5)
    assert [column["cases"] for column in plan["columns"]] == [5, 5]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--method", "nudge"], "Give --model, --dataset"),
        (["absent.yaml"], "Cannot read absent.yaml"),
        (["tiny.yaml", "--method", "nugde"], "Did you mean 'nudge'"),
        (["tiny.yaml", "--set", "scale=1"], "LABEL.NAME=VALUE"),
        (["tiny.yaml", "--set", "fra.scale=1"], "Did you mean 'far'"),
        (["tiny.yaml", "--set", "far.scael=1"], "Did you mean 'scale'"),
        (["tiny.yaml", "--engine", "rya"], "Did you mean 'ray'"),
        (["tiny.yaml", "--engine", "serial", "--jobs", "2"], "one process"),
        (["tiny.yaml", "--probe", "2"], "--dry-run"),
        (["tiny.yaml", "--dataset", "jsonl=absent.jsonl"], "absent.jsonl"),
    ],
)
def test_what_a_user_gets_wrong(run: Run, file: Path, args: list[str], message: str) -> None:
    assert message in " ".join(run(*args, code=1).stderr.split())


def test_a_run_shows_its_numbers_and_going_on_costs_nothing(
    run: Run, file: Path, tmp_path: Path
) -> None:
    args = (file, "--limit", 1, "--set", "far.scale=0.4")
    text = run(*args).stdout
    assert "rewrite_contained" in text
    assert "errata report" in text
    folder = tmp_path / "runs" / "tiny"
    info = json.loads((folder / "run.json").read_text())
    assert info["variants"][0]["config"]["scale"]["value"] == 0.4
    before = (folder / "results.jsonl").read_bytes()
    shown = json.loads(run(*args, "--json").stdout)
    assert (folder / "results.jsonl").read_bytes() == before
    assert shown["columns"]["far"] == {"cases": 1, "refused": 0, "failures": 0}
    values = {(m["variant"], m["metric"]): m["value"] for m in shown["measurements"]}
    assert ("base", "rewrite_exact") in values
    assert planned(run, *args)["seconds"] == 0
    assert "config.scale" in run(file, "--limit", 1, code=1).stderr


def test_its_json_holds_the_numbers_of_the_report(run: Run, file: Path) -> None:
    shown = json.loads(
        run(file, "--limit", 2, "--seed", 1, "--seed", 2, "--out", "out", "--json").stdout
    )
    rows = list(csv.DictReader(read("out").csv().splitlines()))
    named = ("variant", "metric", "value", "n")
    assert [tuple(str(one[name]) for name in named) for one in shown["measurements"]] == [
        (row["column"], row["metric"], row["value"], row["n"]) for row in rows
    ]
    assert {one["n"] for one in shown["measurements"] if one["metric"] == "rewrite_exact"} == {2}


def test_only_a_run_in_which_everything_failed_is_an_error(run: Run, file: Path) -> None:
    all_fail = ("--method", "nudge", "--set", f"nudge.fail_on={SUBJECTS[0]}")
    done = run(file, *all_fail, "--limit", 1, "--out", "all", code=1)
    assert "nudge: 1 failure" in done.stdout
    assert "ZeroDivisionError: on purpose" in " ".join(done.stdout.split())
    some = run(file, *all_fail, "--limit", 2, "--out", "some").stdout
    assert "1 failure" in some
    assert "with --retry-failed it tries them again" in " ".join(some.split())
    assert "some: every case, and why others failed" in " ".join(some.split())
    assert "Traceback" not in some
    again = run(file, *all_fail, "--limit", 2, "--out", "some", "--retry-failed", "--debug").stdout
    assert "Traceback (most recent call last)" in again


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(run: Run, file: Path, site: Path, tmp_path: Path) -> None:
    script = (
        "import typer; from errata.cli import bench; app = typer.Typer(); bench.add(app);"
        "app.callback()(lambda: None); app()"
    )
    marker = tmp_path / "log"
    args = ["bench", str(file), "--method", "nudge", "--set", "nudge.pause=60", "--set",
            f"nudge.log={marker}", "--limit", "1", "--out", "out", "--jobs", "2"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path])},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background of a shell ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everyone
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "the same command goes on from there" in " ".join(said.split())
    assert "Traceback" not in said
    assert len(list(bench.load(tmp_path / "out"))) == 1


def test_ctrl_c_before_anything_is_there_does_not_promise_finished_cases(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run", interrupted)
    said = " ".join(run(file, "--out", "out", code=130).stderr.split())
    assert "No case was finished and nothing is in out" in said
    assert "Every finished case" not in said


def test_a_damaged_line_comes_with_what_to_do(run: Run, file: Path) -> None:
    run(file, "--limit", 1, "--out", "out")
    results = Path("out/results.jsonl")
    whole = results.read_text()
    results.write_text("{damaged\n" + whole)
    said = " ".join(run(file, "--limit", 1, "--out", "out", code=1).stderr.split())
    assert "results.jsonl:1 is damaged" in said
    assert "Delete that line" in said
    results.write_text("".join(results.read_text().splitlines(keepends=True)[1:]))
    run(file, "--limit", 1, "--out", "out")
    assert results.read_text() == whole


def test_the_examples_of_the_help_are_valid_command_lines() -> None:
    app = typer.Typer()
    command.add(app)
    made: Any = get_command(app)
    for line in made.epilog.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["errata", "bench"]
        made.make_context("bench", words[2:]).close()


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem.startswith("atlas") else [pytest.mark.slow])
        for path in EXAMPLES
    ],
    ids=lambda path: path.stem,
)
def test_every_run_file_can_be_run_on_the_embedded_model(run: Run, path: Path) -> None:
    config = bench.read_config(path)
    rows = (*config.methods, *config.optional_methods)
    there = [v.label for v in rows if v.method in plugins.installed()]
    assert there
    only = [word for label in there for word in ("--method", label)]
    for spec in config.retain:  # what no edit may change has no option of its own
        held = Path(spec.path or "")
        held.parent.mkdir(parents=True, exist_ok=True)
        name = {
            "known_1000": "known.json", "knowedit": "knowedit_sanitation_test.json",
            "scotus": "scotus.csv",
        }[spec.name]  # fmt: skip
        shutil.copy(ROOT / "tests" / "data" / "datasets" / name, held)
    if config.train is not None:  # nor has what is trained on
        name = {"knowedit": "knowedit_wiki"}.get(config.train.name, config.train.name)
        records = json.loads((ROOT / "tests/data/datasets" / f"{name}.json").read_text())
        many = range(config.train.start + 2)
        file = Path(config.train.path or "")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([{**records[i % len(records)], "case_id": i} for i in many]))
    datasets = ["--dataset", "atlas"]
    if config.regime == "continual":  # it mixes several
        datasets += ["--dataset", f"counterfact={ROOT / 'tests/data/datasets/counterfact.json'}"]
    plan = planned(run, path, "--model", "atlas-gpt2", *datasets, "--no-corpus", "--limit", 3,
                   *only)  # fmt: skip
    assert [column["label"] for column in plan["columns"]] == ["base", *there]
    assert plan["columns"][0]["cases"] >= 3


def test_an_optional_method_is_run_where_it_is_named_alone(run: Run, file: Path) -> None:
    fields = yaml.safe_load(file.read_text())
    fields["optional_methods"] = ["lone", {"method": "nudge", "variant": "near"}]
    file.write_text(yaml.safe_dump(fields))
    labels = [c["label"] for c in planned(run, file)["columns"]]
    assert labels == ["base", "far", "nudge"]
    named = planned(run, file, "--method", "near", "--method", "far")["columns"]
    assert [(c["label"], c["method"]) for c in named] == [
        ("base", "base"), ("near", "nudge"), ("far", "nudge"),
    ]  # fmt: skip
    fields["optional_methods"] = ["lone", "lone"]
    file.write_text(yaml.safe_dump(fields))
    assert "'lone' is there twice" in " ".join(run(file, code=1).stderr.split())


def test_the_base_alone_is_a_run_that_methods_may_join(run: Run, file: Path) -> None:
    shown = run(file, "--method", "base", "--out", "out").stdout
    assert "base" in shown
    assert {line["variant"] for line in bench.load("out")} == {"base"}
    report = read("out")
    assert [head.label for head in report.parts[0].tables[0].heads] == ["base"]
    run(file, "--method", "base", "--method", "nudge", "--out", "out")
    kinds = bench.load("out").kinds
    assert {key.split("|")[0] for key in kinds} == {"base", "nudge"}
    fields = yaml.safe_load(file.read_text())
    for methods in ("base", ["base"], [{"method": "base"}]):
        file.write_text(yaml.safe_dump({**fields, "methods": methods}))
        assert [column["label"] for column in planned(run, file)["columns"]] == ["base"]
    file.write_text(yaml.safe_dump({**fields, "methods": []}))
    assert "name 'base'" in " ".join(run(file, code=1).stderr.split())


def test_a_base_that_cannot_be_measured_is_an_error(
    run: Run, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr("errata.bench.measuring.measure_base", fail)
    assert "3 failures" in run(file, "--method", "base", code=FAILED).stdout


def test_the_page_about_run_files_shows_them_as_they_are() -> None:
    page = (ROOT / "docs" / "bench.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert path.name in page
    for name in bench.BenchConfig.model_fields:
        assert f"`{name}`" in page, f"docs/bench.md does not explain {name}"
