"""What a report counts: cases and not their seeds or columns, and the best on the same cases."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import errata.bench.report
from errata.bench.report.run_facts import unmatched, warnings
from errata.bench.report.terminal import summary
from errata.cli.render import console
from tests.bench import report_runs as runs

LABELS = ("one", "two", "three")
ABOUT = runs.info(
    variants=[{"label": label, "method": label, "config": {}} for label in LABELS],
    config={"name": "small", "regimes": ["single"], "seeds": [0, 1]},
)


def entry(label: str, case: str, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    return runs.line(
        method=label, variant=label, case_id=case, seed=seed,
        measurements=[runs.measured(case, "ES", value, runs.FORCED)], **more,
    )  # fmt: skip


def failure(label: str, case: str, seed: int = 0) -> dict[str, Any]:
    return runs.line(
        "failure", method=label, variant=label, case_id=case, seed=seed, error="ValueError: no"
    )


def columns(folder: Path, values: Mapping[str, Mapping[str, float]]) -> Any:
    lines = [
        entry(label, case, value)
        for label, cases in values.items()
        for case, value in cases.items()
    ]
    return errata.bench.report.read(runs.write(folder, ABOUT, lines)).parts[0]


def best(part: Any) -> list[str]:
    (row,) = part.tables[0].rows
    return [
        head.label
        for head, cell in zip(part.tables[0].heads, row.cells, strict=True)
        if cell and cell.best
    ]


def test_a_case_that_fails_in_several_columns_is_one_case(tmp_path: Path) -> None:
    lines = [entry("one", "b", 1.0)]
    lines += [failure(label, "a", seed) for label in LABELS for seed in (0, 1)]
    report = errata.bench.report.read(runs.write(tmp_path / "run", ABOUT, lines))
    (said,) = (text for text in warnings(report) if "failed" in text)
    assert said == (
        "facts · single: 1 case failed, in 3 columns: what failed in a column is missing from its "
        "numbers (listed below)."
    )


def test_the_best_is_the_best_on_the_cases_that_all_have(tmp_path: Path) -> None:
    same = {"a": 1.0, "b": 1.0, "c": 0.0}
    # Without the hard case c, which failed in it, "two" only looks better.
    part = columns(tmp_path / "one", {"one": same, "two": {"a": 1.0, "b": 0.9}})
    assert part.tables[0].rows[0].cells[2].measurement.value > 0.9
    assert best(part) == ["one"]
    assert unmatched(part) == (
        "The columns cover different cases: one 3, two 2; all of them have 2. Which one is the "
        "best goes by these."
    )
    # As many cases, but others.
    part = columns(tmp_path / "two", {"one": same, "two": {"a": 1.0, "b": 1.0, "d": 1.0}})
    assert best(part) == []
    assert "all of them have 2" in unmatched(part)
    assert best(columns(tmp_path / "three", {"one": same, "two": {"d": 1.0}})) == []


def test_means_that_only_rounding_tells_apart_are_both_best(tmp_path: Path) -> None:
    values = {"one": {"a": (0.1 + 0.2) / 2}, "two": {"a": 0.15}, "three": {"a": 0.1}}
    assert values["one"] != values["two"]
    assert best(columns(tmp_path / "run", values)) == ["one", "two"]


def test_costs_count_a_case_once_however_many_seeds_ran_it(tmp_path: Path) -> None:
    spent = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 4.0, ("b", 1): 4.0}
    lines = [
        entry(
            "one", case, 1.0, seed,
            edit={"ids": [f"{case}{seed}"], "seconds": seconds, "bytes": 10 * seconds},
        )
        for (case, seed), seconds in spent.items()
    ]  # fmt: skip
    (cost,) = errata.bench.report.read(runs.write(tmp_path / "run", ABOUT, lines)).parts[0].costs
    assert (cost.cases, cost.edits) == (2, 4)
    assert cost.seconds is not None
    assert (cost.seconds.n, cost.seconds.cases, cost.seconds.value) == (2, (2.0, 4.0), 3.0)
    assert cost.median == 3.0
    assert cost.size is not None
    assert cost.size.cases == (20.0, 40.0)


def test_the_table_at_the_end_of_a_run_explains_its_signs(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the extra 'measure' is not installed")
    cases = [f"c{i}" for i in range(12)]
    lines = [entry("base", case, 0.0, stage="base", step=0) for case in cases]
    lines += [entry("one", case, 1.0) for case in cases]
    report = errata.bench.report.read(runs.write(tmp_path / "run", ABOUT, lines))
    out = io.StringIO()
    console(file=out).print(summary(report, 100))
    text = " ".join(out.getvalue().split())
    assert "1.000†" in text
    assert "† differs from base at p < 0.05: paired by case, McNemar" in text
    assert "★" not in text


def test_tables_for_a_paper_are_whole_and_escaped(tmp_path: Path) -> None:
    about = {**ABOUT, "model": {"name": "a_b & 100%", "fingerprint": "f"}}
    values = {"one": {"a": 1.0, "b": 1.0}, "two": {"a": 1.0, "b": 0.0}}
    lines = [entry(label, case, v) for label, cases in values.items() for case, v in cases.items()]
    text = errata.bench.report.read(runs.write(tmp_path / "run", about, lines)).latex()
    assert text.startswith("% Made by `errata report`\n")
    assert r"\caption{On a\_b \& 100\%: facts \textperiodcentered{} single, generation." in text
    assert "\n & ES $\\uparrow$ \\\\\n\\midrule\nbase & -- \\\\\n" in text
    assert r"one & \textbf{1.000} {\scriptsize (0.342--1.000)} \\" in text
    assert r"two & 0.500 {\scriptsize (0.095--0.905)} \\" in text
    assert "Bold: best of the edited columns" in text
    assert "★" not in text
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 1
