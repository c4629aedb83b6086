"""Reports: the numbers equal those computed by hand, and nothing is dropped without a word."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import errata.bench.report
from errata.bench.report import MetricCell, MetricTable, Report
from errata.errors import ConfigError, IntegrityError, UnknownNameError
from errata.evaluate import Measurement
from tests.bench import report_runs as runs
from tests.helpers import ROOT

HAND = ROOT / "tests" / "data" / "runs"


def table(report: Report, protocol: str, part: int = 0) -> MetricTable:
    return next(one for one in report.parts[part].tables if one.protocol == protocol)


def row(found: MetricTable, metric: str) -> dict[str, MetricCell | None]:
    """Return a row's cells by "label" or "label moment"."""
    cells = next(one for one in found.rows if one.metric == metric).cells
    names = (f"{head.label} {head.moment}".strip() for head in found.heads)
    return dict(zip(names, cells, strict=True))


def numbers(found: MetricTable, metric: str) -> dict[str, float | None]:
    return {k: c.measurement.value if c else None for k, c in row(found, metric).items()}


@pytest.fixture(scope="module")
def single() -> Report:
    return errata.bench.report.read(HAND / "single")


# -- tables ----------------------------------------------------------------------------------------


def test_means_are_over_the_cases_of_each_column(single: Report) -> None:
    assert [head.label for head in table(single, "generation").heads] == ["base", "one", "two"]
    found = row(table(single, "generation"), "rewrite_exact")
    assert {k: c and (c.measurement.value, c.measurement.n) for k, c in found.items()} == {
        "base": (0.0, 4),
        "one": (0.75, 4),
        "two": (pytest.approx(1 / 3), 3),  # its fourth case failed
    }
    assert found["one"] is not None
    # Wilson's interval of 3 in 4, from a table.
    assert found["one"].measurement.interval == pytest.approx((0.3006, 0.9544), abs=1e-4)


def test_harmonic_means_are_of_the_joined_cases_not_means_of_the_cases_own(single: Report) -> None:
    found = table(single, "counterfact")
    assert numbers(found, "ES")["one"] == 0.75
    assert numbers(found, "PS")["one"] == 0.5
    assert numbers(found, "NS")["one"] == 0.75
    assert numbers(found, "Score")["one"] == pytest.approx(3 / (4 / 3 + 2 + 4 / 3))
    assert numbers(found, "Score")["two"] == 0.0  # no paraphrase was right


def test_the_best_of_the_edited_columns_is_marked_and_the_base_never(single: Report) -> None:
    found = table(single, "counterfact")
    assert [k for k, c in row(found, "ES").items() if c and c.best] == ["one"]
    assert [k for k, c in row(found, "NS").items() if c and c.best] == ["two"]  # base has 1.0 too


def test_differences_are_paired_and_adjusted_for_the_number_of_columns(single: Report) -> None:
    found = row(table(single, "generation"), "rewrite_exact")
    assert found["base"] is not None
    assert found["base"].difference is None
    one, two = found["one"], found["two"]
    assert one is not None
    assert two is not None
    assert one.difference is not None
    assert two.difference is not None
    assert one.difference.difference == 0.75
    assert one.difference.p == pytest.approx(0.25)  # three of three up: 2 × (1/2)³
    assert one.p == pytest.approx(0.5)  # the smaller of two
    assert two.difference.n == 3  # the cases that both have
    assert two.p == 1.0
    assert not one.differs


def test_another_reference_can_be_chosen() -> None:
    report = errata.bench.report.read(HAND / "single", reference="one")
    found = row(table(report, "generation"), "rewrite_exact")
    assert found["one"] is not None
    assert found["one"].difference is None
    assert found["two"] is not None
    assert found["two"].difference is not None
    assert found["two"].difference.difference == pytest.approx(-2 / 3)  # on a, b, c
    with pytest.raises(UnknownNameError, match="Did you mean 'two'"):
        errata.bench.report.read(HAND / "single", reference="twoo")


def test_a_significant_difference_is_marked_and_an_insignificant_one_is_not(tmp_path: Path) -> None:
    lines = []
    for i in range(8):
        case = f"c{i}"
        lines += [
            runs.line(method="base", variant="base", stage="base", step=0, case_id=case,
                      measurements=[runs.measured(case, "rewrite_exact", 0.0)]),
            runs.line(case_id=case, measurements=[runs.measured(case, "rewrite_exact", 1.0)]),
            runs.line(variant="two", case_id=case,
                      measurements=[runs.measured(case, "rewrite_exact", float(i < 5))]),
        ]  # fmt: skip
    report = errata.bench.report.read(runs.write(tmp_path / "run", runs.info(), lines))
    found = row(table(report, "generation"), "rewrite_exact")
    # 8 of 8 up: p = 2/2⁸, times two columns; 5 of 5 up: p = 2/2⁵ = 0.0625.
    assert found["one"] is not None
    assert found["one"].p == pytest.approx(2 * 2 / 2**8)
    assert found["one"].differs
    assert found["two"] is not None
    assert found["two"].p == pytest.approx(2 / 2**5)
    assert not found["two"].differs


def test_numbers_measured_differently_never_share_a_row(tmp_path: Path) -> None:
    lines = [
        runs.line(measurements=[runs.measured("a", "ES", 1.0, "counterfact: this way")]),
        runs.line(variant="two", measurements=[runs.measured("a", "ES", 0.0, "counterfact: that")]),
    ]
    report = errata.bench.report.read(runs.write(tmp_path / "run", runs.info(), lines))
    rows = table(report, "counterfact").rows
    found = {one.protocol: [cell is None for cell in one.cells] for one in rows}
    assert found == {
        "counterfact: this way": [True, False, True],
        "counterfact: that": [True, True, False],
    }


# -- streams ---------------------------------------------------------------------------------------


def test_a_stream_shows_right_after_each_edit_and_at_the_end() -> None:
    report = errata.bench.report.read(HAND / "stream")
    found = table(report, "generation")
    assert numbers(found, "rewrite_exact") == {
        "base": 0.0,
        "one immediate": pytest.approx(2 / 3),  # a and b right, c wrong
        "one final": pytest.approx(1 / 3),  # only b is left
    }
    assert [head.steps for head in found.heads] == ["", "", "3"]
    general = table(report, "general")
    assert [head.moment for head in general.heads] == ["", "final"]
    assert numbers(general, "perplexity_ratio") == {"base": None, "one final": 3.0}


def test_curves_are_over_all_earlier_edits() -> None:
    (part,) = errata.bench.report.read(HAND / "stream").parts
    by_metric = {curve.metric: curve for curve in part.curves}
    (line,) = by_metric["rewrite_exact"].lines
    assert [(p.step, p.value, p.n) for p in line.points] == [
        (1, 1.0, 1),
        (3, pytest.approx(1 / 3), 3),
    ]
    base = by_metric["rewrite_exact"].base
    assert base is not None
    assert (base.value, base.n) == (0.0, 3)
    (line,) = by_metric["perplexity_ratio"].lines
    assert [(p.step, p.value, p.interval) for p in line.points] == [
        (1, 1.5, pytest.approx((1.4, 1.6))),
        (3, 3.0, pytest.approx((2.9, 3.1))),
    ]


def test_a_checkpoint_that_is_half_done_is_not_taken_for_the_end(tmp_path: Path) -> None:
    folder = shutil.copytree(HAND / "stream", tmp_path / "run")
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [one for one in lines if '"state"' not in one]
    assert json.loads(kept[-1])["stage"] == "checkpoint"
    (folder / "results.jsonl").write_text("".join(kept[:-1]), encoding="utf-8")
    found = table(errata.bench.report.read(folder), "generation")
    assert [head.steps for head in found.heads] == ["", "", "1"]
    assert numbers(found, "rewrite_exact")["one final"] == 1.0


def test_states_of_batches_are_joined(tmp_path: Path) -> None:
    def state(index: int, ratio: float) -> dict[str, Any]:
        value = runs.Measurement("perplexity_ratio", ratio, 20, runs.RATIO, unit="ratio",
                                 direction="lower").as_json()  # fmt: skip
        return runs.line("state", regime="batch", stage="batch", step=2, case_id=None,
                         key=f"state-{index}", measurements=[value])  # fmt: skip

    lines = [
        runs.line(regime="batch", stage="batch", step=2, case_id=case, index=i,
                  measurements=[runs.measured(case, "rewrite_exact", 1.0)],
                  edit={"ids": [f"batch-{i // 2}"], "seconds": 3.0 + i // 2, "bytes": 10,
                        "refused": None, "shared": 2})
        for i, case in enumerate("abcd")
    ]  # fmt: skip
    folder = runs.write(tmp_path / "run", runs.info(), [*lines, state(0, 1.25), state(2, 2.25)])
    report = errata.bench.report.read(folder)
    assert numbers(table(report, "general"), "perplexity_ratio")["one"] == 1.75
    (cost,) = report.parts[0].costs
    assert (cost.edits, cost.cases) == (2, 4)
    assert cost.seconds is not None
    assert cost.seconds.value == 3.5  # of the two batches, not of the four lines


# -- several runs ----------------------------------------------------------------------------------


def seeded(folder: Path, seed: int, hits: dict[str, float], **config: Any) -> Path:
    about = runs.info(name=f"seed-{seed}", config={"name": f"seed-{seed}", "seeds": [seed],
                                                   **config})  # fmt: skip
    lines = [
        runs.line(seed=seed, case_id=case, index=i, measurements=[
            runs.measured(case, "rewrite_exact", hit),
            runs.measured(case, "GE", hit, f"counterfact: sampled, seed {seed}", unit="bits"),
        ])
        for i, (case, hit) in enumerate(hits.items())
    ] + [
        runs.line(method="base", variant="base", stage="base", step=0, seed=seed, case_id=case,
                  measurements=[runs.measured(case, "rewrite_exact", 0.0)])
        for case in hits
    ]  # fmt: skip
    return runs.write(folder, about, lines)


def test_seeds_of_one_configuration_are_pooled_case_by_case(tmp_path: Path) -> None:
    one = seeded(tmp_path / "0", 0, {"a": 1.0, "b": 1.0})
    two = seeded(tmp_path / "1", 1, {"a": 0.0, "b": 1.0})
    report = errata.bench.report.read(one, two)
    (part,) = report.parts
    assert [(c.label, c.seeds) for c in part.section.edited] == [("one", (0, 1))]
    found = row(table(report, "generation"), "rewrite_exact")
    assert found["one"] is not None
    assert found["one"].measurement.cases == (0.5, 1.0)  # a: mean of 1 and 0
    assert found["one"].measurement.value == 0.75
    assert found["one"].measurement.n == 2  # cases, not answers
    assert found["base"] is not None
    assert found["base"].measurement.n == 2
    # What was sampled with the run's own seed is one row, not one per seed.
    assert numbers(table(report, "counterfact"), "GE")["one"] == 0.75


def test_different_configurations_stand_side_by_side(tmp_path: Path) -> None:
    one = seeded(tmp_path / "0", 0, {"a": 1.0, "b": 1.0}, limit=2)
    two = seeded(tmp_path / "1", 1, {"a": 0.0, "b": 1.0}, limit=3)
    report = errata.bench.report.read(one, two)
    assert numbers(table(report, "generation"), "rewrite_exact") == {
        "base": 0.0,
        "one (seed-0)": 1.0,
        "one (seed-1)": 0.5,
    }


def about(digest: str, source: str, **dataset: Any) -> dict[str, Any]:
    read = {"name": "facts", "source": source, "digest": digest, "cases": 2, "skipped": 0}
    config = {"seeds": [0], "datasets": [{"name": "jsonl", "label": "facts", **dataset}]}
    return {"datasets": [read], "config": config, "digest": f"{digest}{dataset}"}


def of_data(folder: Path, base: float, edited: float, **about_run: Any) -> Path:
    lines = []
    for case in "ab":
        for name, value in (("base", base), ("one", edited)):
            lines.append(
                runs.line(method=name, variant=name, stage="base" if name == "base" else "single",
                          step=int(name != "base"), case_id=case,
                          measurements=[runs.measured(case, "rewrite_exact", value)])
            )  # fmt: skip
    return runs.write(folder, runs.info(name=folder.name, **about_run), lines)


@pytest.mark.parametrize(
    ("one", "two", "titles"),
    [
        (about("d1", "x/left.json"), about("d2", "x/right.json"),
         ["facts (left.json)", "facts (right.json)"]),
        (about("d1", "x/a.json"), about("d2", "y/a.json"), ["facts (d1)", "facts (d2)"]),
        (about("d1", "a.json"), about("d1", "a.json", chat=True), ["facts", "facts (chat on)"]),
        (about("d1", "a.json"), about("d1", "a.json", join=""), ["facts", 'facts (join "")']),
        (about("d1", "a.json", options={"target": "alt"}),
         about("d1", "a.json", options={"target": "answers"}),
         ["facts (target alt)", "facts (target answers)"]),
        (about("d1", "a.json"), about("d1", "a.json", view="relation"),
         ["facts", "facts (view relation)"]),
    ],
)  # fmt: skip
def test_other_data_of_one_name_stand_apart(
    one: dict[str, Any], two: dict[str, Any], titles: list[str], tmp_path: Path
) -> None:
    report = errata.bench.report.read(
        of_data(tmp_path / "left", 0.2, 0.9, **one), of_data(tmp_path / "right", 0.6, 0.7, **two)
    )
    assert [part.section.dataset for part in report.parts] == titles
    found = [numbers(table(report, "generation", i), "rewrite_exact") for i in (0, 1)]
    assert found == [{"base": 0.2, "one": 0.9}, {"base": 0.6, "one": 0.7}]


def test_the_same_data_stand_together_wherever_they_lay(tmp_path: Path) -> None:
    one = about("d1", "here/a.json", limit=2, path="here/a.json")
    two = about("d1", "there/b.json", limit=3, path="there/b.json")
    report = errata.bench.report.read(
        of_data(tmp_path / "left", 0.2, 0.9, **one), of_data(tmp_path / "right", 0.2, 0.7, **two)
    )
    (part,) = report.parts
    assert part.section.dataset == "facts"
    assert [column.label for column in part.section.edited] == ["one (left)", "one (right)"]


def test_other_retained_probes_stand_apart_and_none_stand_with_some(tmp_path: Path) -> None:
    def of_probes(name: str, digest: str | None) -> Path:
        made = about("d1", "a.json")
        if digest is not None:
            made["config"]["retain"] = {"name": "jsonl"}
        return of_data(tmp_path / name, 0.2, 0.9, identity={"x": name, "retained": digest}, **made)

    left, none, right = of_probes("l", "abcdef12"), of_probes("n", None), of_probes("r", "99887766")
    assert len(errata.bench.report.read(left, none).parts) == 1
    report = errata.bench.report.read(left, right)
    assert [part.section.dataset for part in report.parts] == [
        "facts (retained abcdef)", "facts (retained 998877)",
    ]  # fmt: skip


def test_retained_probes_are_one_value_per_edit(tmp_path: Path) -> None:
    def trr(value: float) -> dict[str, Any]:
        ids = [f"retain-{i}" for i in range(100)]
        return Measurement.mean("TRR", [value] * 100, "lifelong: x", case_ids=ids).as_json()

    lines = []
    for i, case in enumerate("abcdefghij"):
        once = Measurement.mean(
            "TRR", [1.0], "lifelong: x; mean over evaluations", case_ids=[case]
        ).as_json()
        lines += [
            runs.line(method="base", variant="base", stage="base", step=0, case_id=case,
                      measurements=[once]),
            runs.line(case_id=case, index=i, measurements=[trr(float(i == 0))]),
            runs.line(variant="two", case_id=case, index=i, measurements=[trr(0.0)]),
        ]  # fmt: skip
    folder = runs.write(tmp_path / "run", runs.info(), lines)
    report = errata.bench.report.read(folder)
    found = row(table(report, "lifelong"), "TRR")
    one = found["one"]
    assert one is not None
    assert (one.measurement.value, one.measurement.n) == (0.1, 10)
    assert one.difference is not None
    assert (one.difference.n, one.difference.lower) == (10, 9)
    other = row(table(errata.bench.report.read(folder, reference="two"), "lifelong"), "TRR")["one"]
    assert other is not None
    assert other.p == 1.0  # they differ in one edit of ten


def test_retained_probes_after_batches_are_one_value_per_state(tmp_path: Path) -> None:
    ids = ["retain-0", "retain-1"]
    lines = [
        runs.line("state", regime="batch", stage="batch", step=2, case_id=None, key=f"state-{i}",
                  measurements=[Measurement.mean("TRR", [hit] * 2, "lifelong: x",
                                                 case_ids=ids).as_json()])
        for i, hit in enumerate((1.0, 0.0, 0.0))
    ]  # fmt: skip
    report = errata.bench.report.read(runs.write(tmp_path / "run", runs.info(), lines))
    cell = row(table(report, "lifelong"), "TRR")["one"]
    assert cell is not None
    assert (cell.measurement.n, cell.measurement.cases) == (3, (1.0, 0.0, 0.0))


def test_one_regime_each_gives_a_section_each(single: Report) -> None:
    report = errata.bench.report.read(HAND / "single", HAND / "stream")
    assert [part.section.title for part in report.parts] == ["facts · single", "facts · sequential"]
    for index, n in ((0, 4), (1, 3)):  # the base only on the cases of its section, each once
        base = row(table(report, "generation", index), "rewrite_exact")["base"]
        assert base is not None
        assert base.measurement.n == n
    assert table(report, "generation").rows == table(single, "generation").rows


def test_one_directory_named_twice_counts_once_and_a_copy_is_refused(tmp_path: Path) -> None:
    copy = shutil.copytree(HAND / "single", tmp_path / "copy")
    report = errata.bench.report.read(HAND / "single", HAND / "single" / ".." / "single")
    assert len(report.runs) == 1
    with pytest.raises(ConfigError, match="hold the same cases of 'one' with seed 0"):
        errata.bench.report.read(HAND / "single", copy)


# -- outcomes --------------------------------------------------------------------------------------


def test_error_types_are_counted_per_answer(single: Report) -> None:
    counts = {one.label: dict(one.counts) for one in single.parts[0].errors}
    assert counts == {
        "one": {"right": 3, "missing_tokens": 1},
        "two": {"right": 1, "meaningless_tokens": 1, "knowledge_irrelevant": 1},
    }


def test_costs_are_of_the_edits_that_were_made(single: Report) -> None:
    one, two = single.parts[0].costs
    assert one.seconds is not None
    assert one.seconds.value == pytest.approx(0.3)  # 0.1, 0.2, 0.3, 0.6
    assert one.median == pytest.approx(0.25)
    assert one.size is not None
    assert one.size.value == 1000
    assert (two.edits, two.cases) == (2, 2)  # one was refused, one failed


def test_failures_and_refusals_are_listed(single: Report) -> None:
    (part,) = single.parts
    assert [(one.case_id, one.reason) for one in part.failures] == [
        ("d", "ValueError: D has no tokens")
    ]
    assert [one.case_id for one in part.refusals] == ["c"]
    assert part.failures[0].request == "The capital of D is → Rome"


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path) -> None:
    folder = shutil.copytree(HAND / "single", tmp_path / "run")
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:6]), encoding="utf-8")
    (progress,) = errata.bench.report.read(folder).progress
    assert (progress.done, progress.planned) == (2, 8)  # of two variants × four cases
    assert not progress.is_complete
    (progress,) = errata.bench.report.read(HAND / "single").progress
    assert progress.is_complete  # a failed case is done too


def test_a_run_with_nothing_but_its_base_is_reported(tmp_path: Path) -> None:
    folder = shutil.copytree(HAND / "single", tmp_path / "run")
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "results.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    report = errata.bench.report.read(folder)
    assert numbers(table(report, "generation"), "rewrite_exact") == {"base": 0.0}
    assert report.html()
    assert "0 of 8 cases" in report.markdown()


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("{not json", "damaged"),
        ("[1, 2]", "damaged"),
        ('{"schema": 9, "kind": "case"}', "schema 9"),
        ('{"schema": 1, "kind": "case"}', "missing"),
        (json.dumps(runs.line(key="x", measurements=[{"metric": "ES"}])), "damaged"),
        (json.dumps(runs.line(key="x", answers=[{"prompt": "p"}])), "damaged"),
        (json.dumps(runs.line(key="x", step="three")), "damaged"),
    ],
)
def test_a_damaged_line_is_named_or_skipped_and_named(tmp_path: Path, bad: str, why: str) -> None:
    folder = shutil.copytree(HAND / "single", tmp_path / "run")
    file = folder / "results.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([*lines[:2], bad, *lines[2:], ""]), encoding="utf-8")
    with pytest.raises(IntegrityError, match=rf"results\.jsonl:3.*{why}.*--skip-bad"):
        errata.bench.report.read(folder)
    report = errata.bench.report.read(folder, skip_bad=True)
    assert [len(run.damaged) for run in report.runs] == [1]
    assert "results.jsonl:3" in report.runs[0].damaged[0]
    assert "1 damaged line left out" in report.markdown().replace("\\", "")
    assert numbers(table(report, "generation"), "rewrite_exact")["one"] == 0.75


def test_a_line_that_is_still_being_written_is_left_out_and_said(tmp_path: Path) -> None:
    folder = shutil.copytree(HAND / "single", tmp_path / "run")
    with (folder / "results.jsonl").open("a", encoding="utf-8") as handle:
        handle.write('{"schema": 1, "kind": "ca')
    report = errata.bench.report.read(folder)
    assert report.runs[0].cut_off
    assert "half written" in report.markdown()


def test_what_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run directory: it has no run\.json"):
        errata.bench.report.read(tmp_path)
    with pytest.raises(ConfigError, match="Give at least one"):
        errata.bench.report.read()
    empty = runs.write(tmp_path / "empty", runs.info(), [])
    with pytest.raises(ConfigError, match="holds no results yet"):
        errata.bench.report.read(empty)
    other = runs.write(tmp_path / "other", runs.info(schema=2), [runs.line()])
    with pytest.raises(IntegrityError, match="schema 2"):
        errata.bench.report.read(other)
    (other / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(IntegrityError, match="damaged"):
        errata.bench.report.read(other)


# -- data out --------------------------------------------------------------------------------------


def test_csv_and_json_hold_the_numbers_of_the_tables(single: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(single.csv())))
    found = {(one["column"], one["metric"]): one for one in rows}
    assert float(found["one", "rewrite_exact"]["value"]) == 0.75
    assert found["one", "rewrite_exact"]["n"] == "4"
    assert found["one", "rewrite_exact"]["reference"] == "base"
    assert float(found["one", "rewrite_exact"]["p"]) == pytest.approx(0.5)
    assert found["one", "rewrite_exact"]["how"] == runs.EXACT
    data = single.as_json()
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    (section,) = data["sections"]
    generation = next(one for one in section["tables"] if one["protocol"] == "generation")
    values = [cell["value"] for cell in generation["rows"][0]["cells"]]
    assert values == [0.0, 0.75, pytest.approx(1 / 3)]
    assert section["failures"][0]["case_id"] == "d"


def test_the_points_of_curves_are_in_the_csv() -> None:
    rows = csv.DictReader(io.StringIO(errata.bench.report.read(HAND / "stream").csv()))
    points = [
        (one["after_edits"], float(one["value"]))
        for one in rows
        if one["moment"] == "checkpoint" and one["metric"] == "perplexity_ratio"
    ]
    assert points == [("1", 1.5), ("3", 3.0)]


def test_reading_loads_no_model_library_on_import() -> None:
    import subprocess
    import sys

    heavy = "{'torch', 'numpy', 'jinja2'}"
    script = f"import sys, errata.bench.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# -- what is looked at first -----------------------------------------------------------------------

FIRST = {
    "generation": ("rewrite_contained", "paraphrase_contained", "neighbourhood_exact",
                   "neighbourhood_unchanged"),
    "locality": ("locality_exact", "locality_unchanged"),
    "portability": ("portability_contained",),
    "counterfact": ("ES", "PS", "NS", "Score"),
}  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A run with every metric that an overview knows, and one that none shows."""
    lines = []
    for variant, value in (("base", 0.0), ("one", 1.0), ("memit-published", 0.5)):
        for case in "abc":
            made = [
                runs.measured(case, metric, value, f"{protocol}: how")
                for protocol, metrics in FIRST.items()
                for metric in (*metrics, "rewrite_teacher_forced")
            ]
            about = {"method": variant, "variant": variant, "stage": "single", "case_id": case}
            lines.append(runs.line(**about, measurements=made))
    labels = [{"label": v, "method": v, "config": {}} for v in ("one", "memit-published")]
    folder = tmp_path_factory.mktemp("runs") / "wide"
    return errata.bench.report.read(runs.write(folder, runs.info(variants=labels), lines))


def printed(thing: Any, width: int) -> list[str]:
    from rich.console import Console

    from errata.cli.render import THEME

    console = Console(width=width, theme=THEME, highlight=False)
    with console.capture() as captured:
        console.print(thing)
    return [line.rstrip() for line in captured.get().splitlines()]


@pytest.mark.parametrize("width", [72, 80, 100, 120, 200])
def test_headers_at_a_glance_stand_apart_and_none_is_cut(wide: Report, width: int) -> None:
    lines = printed(wide.terminal(width), width)
    start = next(i for i, line in enumerate(lines) if line.startswith("At a glance"))
    end = next(i for i, line in enumerate(lines) if line.startswith("How each was measured"))
    heads: list[tuple[str, str]] = []
    block: list[str] = []
    for line in lines[start + 1 : end]:
        assert len(line) <= width
        if line.startswith("──"):
            first, second = (re.split(r" {2,}", text.strip()) for text in block[-2:])
            second = [part for part in second if part != "column"]
            heads += zip(first[-len(second) :], second, strict=True)
            block = []
        elif line:
            block.append(line)
    assert len(heads) == len(wide.parts[0].overview)
    names = [head.row.metric for head in wide.parts[0].overview]
    assert {"locality_exact", "locality_unchanged", "neighbourhood_exact"} <= set(names)
    for name, (first, last) in zip(names, heads, strict=True):
        one_line = "_" not in name
        assert last.endswith("↑")
        assert (name == last.removesuffix(" ↑")) if one_line else (name == first + last[:-2])


def test_a_run_ends_with_its_first_numbers_their_intervals_and_n(wide: Report) -> None:
    from errata.bench.report.terminal import summary

    for width in (80, 120):
        lines = printed(summary(wide, width), width)
        assert max(map(len, lines)) <= width
        for protocol, metrics in FIRST.items():
            place = lines.index(protocol)
            for offset, metric in enumerate(metrics):
                line, below = lines[place + 1 + 2 * offset : place + 3 + 2 * offset]
                assert line.split()[0] == metric
                assert line.split()[-1] == "3"  # n
                assert below.count("–") >= 2  # an interval under each column
        assert not any("teacher_forced" in line for line in lines)
