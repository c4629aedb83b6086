"""Runs that are killed, interrupted, run out of disk, or are given another configuration."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from errata import bench
from errata.bench.results import ResultsFile
from errata.datasets import atlas
from errata.edits.ledger import Ledger
from errata.errors import ConfigError, IntegrityError, LedgerBusyError, StorageError
from tests.bench.bench_helpers import SUBJECTS, Runner, runner, short, values

STREAM = short(
    regime="sequential",
    limit=4,
    checkpoints=[2],
    state=["general"],
    methods=[{"method": "nudge", "config": {"refuse_on": SUBJECTS[1], "fail_on": SUBJECTS[2]}}],
)


pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture(scope="module")
def runs(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with runner(site, tmp_path_factory.mktemp("cache")) as made:
        yield made


@pytest.fixture(scope="module")
def whole(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the stream."""
    return ran(STREAM, site, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def took(runs: Runner, tmp_path_factory: pytest.TempPathFactory) -> float:
    """Seconds that the stream takes where runs are killed."""
    started = time.monotonic()
    runs.start(STREAM, tmp_path_factory.mktemp("took") / "run")
    assert runs.wait() == 0
    return time.monotonic() - started


def ran(config: dict[str, Any], site: Path, folder: Path) -> Path:
    """Carry out a run for all tests of this file; return its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        patch.setenv("ERRATA_CACHE", str(folder / "cache"))
        bench.run(config, folder / "run")
    return folder / "run"


def lines_of(folder: Path) -> int:
    file = folder / "results.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stream_killed_at_random_instants_ends_as_if_it_had_not_been(
    runs: Runner, whole: Path, took: float, tmp_path: Path
) -> None:
    folder, choose = tmp_path / "run", random.Random(1)
    before: list[str] = []
    for _ in range(5):
        child = runs.start(STREAM, folder)
        time.sleep(choose.uniform(0, took))
        with_signal = signal.SIGKILL
        try:
            os.kill(child, with_signal)
        except ProcessLookupError:
            pass
        runs.wait()
        if (folder / "run.json").exists():
            now = [line["key"] for line in bench.load(folder)]
            assert now[: len(before)] == before  # nothing that was finished is lost or repeated
            before = now
    runs.start(STREAM, folder)
    assert runs.wait() == 0
    assert values(folder) == values(whole)
    with Ledger.open(folder / "ledgers" / "nudge-atlas-seed0", readonly=True) as ledger:
        subjects = [edit.requests[0].subject for edit in ledger.edits()]
    assert subjects == [SUBJECTS[0], SUBJECTS[3]]  # each computed and recorded once


@pytest.mark.slow
def test_a_stream_of_batches_goes_on_wherever_it_was_killed(runs: Runner, tmp_path: Path) -> None:
    stream = {**STREAM, "methods": ["nudge"], "batch_size": 2, "limit": 3}
    reference = tmp_path / "whole"
    started = time.monotonic()
    runs.start(stream, reference)
    assert runs.wait() == 0
    took, choose = time.monotonic() - started, random.Random(2)
    folder = tmp_path / "run"
    for _ in range(3):
        child = runs.start(stream, folder)
        time.sleep(choose.uniform(0.3, 1) * took)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        runs.wait()
    runs.start(stream, folder)
    assert runs.wait() == 0
    assert values(folder) == values(reference)
    lines = (reference / "results.jsonl").read_bytes().splitlines(keepends=True)
    for kept in (3, 5):  # results behind the ledger: nothing is edited again
        (folder / "results.jsonl").write_bytes(b"".join(lines[:kept]))
        bench.run(stream, folder)
        assert values(folder) == values(reference)
    with Ledger.open(folder / "ledgers" / "nudge-atlas-seed0", readonly=True) as ledger:
        assert len(ledger.edits()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0, 3, 8])
def test_a_results_file_that_lost_its_end_is_completed(
    whole: Path, tmp_path: Path, kept: int
) -> None:
    # As if the results were behind the ledger, which holds all edits of the stream already.
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    lines = (whole / "results.jsonl").read_bytes().splitlines(keepends=True)
    half = lines[kept][: len(lines[kept]) // 2] if kept else b""
    (folder / "results.jsonl").write_bytes(b"".join(lines[:kept]) + half)
    bench.run(STREAM, folder)
    assert values(folder) == values(whole)
    assert (folder / "results.jsonl").read_bytes().startswith(b"".join(lines[:kept]))
    with Ledger.open(folder / "ledgers" / "nudge-atlas-seed0", readonly=True) as ledger:
        assert len(ledger.edits()) == 2


@pytest.mark.slow
def test_an_edit_that_was_recorded_but_not_noted_is_not_computed_again(
    whole: Path, tmp_path: Path
) -> None:
    # Killed between the edit's transaction and the note about it: the narrowest of gaps.

    folder = tmp_path / "run"
    from errata.bench import sequential

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequential, "NOTE", "no such thing!")  # the ledger refuses this kind
        with pytest.raises(Exception, match="no kind for a note"):
            bench.run(STREAM, folder)
    ledger = folder / "ledgers" / "nudge-atlas-seed0"
    with Ledger.open(ledger, readonly=True) as opened:
        (first,) = opened.ids()
    bench.run(STREAM, folder)
    assert values(folder) == values(whole)
    with Ledger.open(ledger, readonly=True) as opened:
        assert opened.ids()[0] == first
        assert len(opened.ids()) == 2


def test_single_edits_go_on_where_they_were(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_after(count: int) -> Any:
        seen: list[str] = []

        def on_line(line: dict[str, Any]) -> None:
            seen.append(line["key"])
            if len(seen) == count:
                raise Stop

        return on_line

    log = tmp_path / "log"
    config = short(methods=[{"method": "nudge", "config": {"log": str(log)}}])
    for count in (2, 2, 1):
        with pytest.raises(Stop):
            bench.run(config, tmp_path / "run", on_line=stop_after(count))
    assert lines_of(tmp_path / "run") == 5
    bench.run(config, tmp_path / "run")
    bench.run(config, tmp_path / "run")  # nothing is left to do
    assert [line["index"] for line in bench.load(tmp_path / "run").cases()] == [0, 1, 2, 0, 1, 2]
    assert log.read_text().split("\n")[:-1] == SUBJECTS[:3]


def test_ctrl_c_leaves_whole_lines_and_the_lock_free(tmp_path: Path) -> None:
    def interrupt(line: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(short(limit=1), tmp_path, on_line=interrupt)
    assert lines_of(tmp_path) == 1
    bench.run(short(limit=1), tmp_path)
    assert len(values(tmp_path)) == 2


# -- other configurations --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ran(short(limit=1), site, tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seeds": [1]}, r"config\.seeds"),
        (
            {"settings": {**STREAM["settings"], "max_new_tokens": 3}},
            r"config\.settings\.max_new_tokens: 2 there, 3 here",
        ),
        ({"protocols": ["generation", "locality"]}, r"protocols\.atlas\.cases"),
        (
            {"methods": [{"method": "nudge", "config": {"scale": 0.3}}]},
            r"variants\.nudge\.config\.scale: 0\.4 there, 0\.3 here",
        ),
        ({"methods": [{"method": "nudge", "variant": "x"}]}, r"variants\.nudge: there only"),
        (
            {"datasets": [{"name": "atlas", "options": {"kind": "modify"}}]},
            r'config\.datasets\.atlas\.options\.kind: null there, "modify" here',
        ),
        ({"dtype": "fp64"}, r"model\.dtype: \"float32\" there, \"float64\" here"),
    ],
)
def test_results_of_different_runs_are_never_mixed(
    small: Path, changes: dict[str, Any], named: str
) -> None:
    before = (small / "results.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=named):
        bench.run(short(**{"limit": 1, **changes}), small)
    assert (small / "results.jsonl").read_bytes() == before


def test_a_run_of_single_edits_grows_by_cases_and_methods(tmp_path: Path) -> None:
    folder, more = tmp_path / "run", ["nudge", {"method": "nudge", "variant": "x"}]
    bench.run(short(limit=1), folder)
    begun = (folder / "results.jsonl").read_bytes()
    bench.run(short(limit=2, methods=more), folder)
    assert (folder / "results.jsonl").read_bytes().startswith(begun)
    assert bench.load(folder).info["identity"]["config"]["limit"] == 2
    bench.run(short(limit=2, methods=more), tmp_path / "at once")
    assert values(folder) == values(tmp_path / "at once")
    with pytest.raises(ConfigError, match=r"cases of atlas: 2 there, 1 here, and a run does not"):
        bench.run(short(limit=1, methods=more), folder)


def test_training_data_come_with_the_first_method_that_learns(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    learner = {"method": "learner", "config": {"seen": str(tmp_path / "seen")}}
    train = {"name": "atlas", "start": 6, "limit": 2}
    bench.run(short(limit=1), folder)
    begun = (folder / "results.jsonl").read_bytes()
    absent = {"name": "counterfact", "path": str(tmp_path / "absent.json")}
    bench.run(short(limit=1, train=absent), folder)  # nobody learns from it: it is not read
    assert (folder / "results.jsonl").read_bytes() == begun
    bench.run(short(limit=1, methods=["nudge", learner], train=train), folder)
    assert (folder / "results.jsonl").read_bytes().startswith(begun)
    bench.run(short(limit=1, methods=["nudge", learner], train=train), tmp_path / "at once")
    assert values(folder) == values(tmp_path / "at once")
    other = {**train, "limit": 3}
    with pytest.raises(ConfigError, match=r"training: "):
        bench.run(short(limit=1, methods=["nudge", learner], train=other), folder)


def test_a_retained_dataset_may_be_written_alone_or_in_a_list(tmp_path: Path) -> None:
    retain = {"name": "atlas", "start": 7, "limit": 2}
    bench.run(short(limit=1, retain=retain), tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    bench.run(short(limit=1, retain=[retain]), tmp_path)
    assert (tmp_path / "results.jsonl").read_bytes() == before


def test_a_run_whose_weights_are_fitted_on_its_cases_does_not_grow(tmp_path: Path) -> None:
    from errata.bench.run_growth import blocking
    from errata.bench.run_identity import info_of
    from errata.bench.run_spec import RunSpec

    facts = [
        request.model_copy(update={"references": (f"{request.subject} is known.",)})
        for request in atlas.requests(3)
    ]
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(fact.model_dump_json() for fact in facts))
    described = {"model": {"fingerprint": "f", "dtype": "float32"}, "variants": []}

    def identity(limit: int, **changes: Any) -> dict[str, Any]:
        given = {
            "datasets": [{"name": "jsonl", "path": str(file)}], "limit": limit,
            "protocols": ["counterfact"], "state": None, **changes,
        }  # fmt: skip
        spec = RunSpec(bench.BenchConfig.parse(short(**given)))
        found: dict[str, Any] = info_of(spec, described)["identity"]
        return found

    one, two = identity(1), identity(2)
    (said,) = blocking(one, two)
    assert re.fullmatch(
        r"references\.jsonl: \w{8}… there, \w{8}… here \(the texts of all cases, on which RS is "
        r"fitted\)", said,
    )  # fmt: skip
    for fixed in (
        {"settings": {"references": ["One text for all."]}},
        {"settings": {"leave_out": ["RS"]}},
        {"protocols": ["generation"]},
    ):
        assert not list(blocking(identity(1, **fixed), identity(2, **fixed))), fixed


def test_a_run_grows_by_seeds(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    bench.run(short(limit=2, shuffle=True), folder)
    begun = (folder / "results.jsonl").read_bytes()
    bench.run(short(limit=2, shuffle=True, seeds=[0, 1]), folder)
    assert (folder / "results.jsonl").read_bytes().startswith(begun)
    bench.run(short(limit=2, shuffle=True, seeds=[0, 1]), tmp_path / "at once")
    assert values(folder) == values(tmp_path / "at once")
    with pytest.raises(ConfigError, match=r"seeds: \[0, 1\] there, \[1\] here .*pooled by"):
        bench.run(short(limit=2, shuffle=True, seeds=[1]), folder)


def test_only_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    long = {f"method-{i}": {"method": "nudge", "variant": f"method-{i}"} for i in range(9)}
    methods = [*long.values()]
    fields = {"regime": "sequential", "limit": 2, "checkpoints": [1]}
    bench.run(short(methods=methods[:4], **fields), tmp_path)
    changed = {**methods[3], "batch_size": 2}  # it says nothing about hyper-parameters
    with pytest.raises(ConfigError) as raised:
        bench.run(short(methods=[*methods[:3], changed, *methods[4:]], **fields), tmp_path)
    assert "What differs: config.methods.method-3.batch_size: null there, 2 here. G" in str(
        raised.value
    )


def test_long_values_are_shown_where_they_differ() -> None:
    from errata.bench.run_growth import differences

    texts = ["The same beginning " * 9 + end for end in ("one", "two")]
    (said,) = differences({"a": texts[0]}, {"a": texts[1]})
    assert said == 'a: … The same beginning one" there, … The same beginning two" here'
    many = list(range(40))
    (said,) = differences({"a": many}, {"a": [*many[:20], 7, *many[21:]]})
    assert said == "a: 40 entries there, 40 here; entry 21 is 20 there, 7 here"
    (said,) = differences({"a": many}, {"a": [*many, 40]})
    assert said == "a: 40 entries there, 41 here, the first 40 alike"


ON_THEIR_NUMBER = pytest.mark.parametrize(
    "changes",
    [
        {"shuffle": True},
        pytest.param({"regime": "sequential"}, marks=pytest.mark.slow),
        pytest.param({"state": ["general"]}, marks=pytest.mark.slow),
    ],
)


@ON_THEIR_NUMBER
def test_a_run_of_any_regime_grows_by_methods(changes: dict[str, Any], tmp_path: Path) -> None:
    folder, more = tmp_path / "run", ["nudge", {"method": "nudge", "variant": "x"}]
    bench.run(short(limit=2, **changes), folder)
    begun = (folder / "results.jsonl").read_bytes()
    bench.run(short(limit=2, methods=more, **changes), folder)
    assert (folder / "results.jsonl").read_bytes().startswith(begun)
    bench.run(short(limit=2, methods=more, **changes), tmp_path / "at once")
    assert values(folder) == values(tmp_path / "at once")


@ON_THEIR_NUMBER
def test_a_run_whose_cases_depend_on_their_number_does_not_grow(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    bench.run(short(limit=1, **changes), tmp_path / "run")
    with pytest.raises(
        ConfigError, match=r"differs: cases of atlas: 1 there, 2 here, and [^;]*\. G"
    ):
        bench.run(short(limit=2, **changes), tmp_path / "run")


def test_the_name_of_a_run_and_the_place_of_its_data_may_change(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = (small / "results.jsonl").read_bytes()
    bench.run(short(limit=1, name="renamed"), small)
    assert (small / "results.jsonl").read_bytes() == before


def test_another_version_of_a_library_is_told(
    small: Path, caplog: pytest.LogCaptureFixture
) -> None:
    info = json.loads((small / "run.json").read_text())
    changed = {**info, "versions": {**info["versions"], "torch": "1.0"}}
    (small / "run.json").write_text(json.dumps(changed))
    bench.run(short(limit=1), small)
    assert "begun with torch 1.0" in caplog.text
    (small / "run.json").write_text(json.dumps(info))


def test_a_ledger_of_another_stream_is_refused(whole: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "results.jsonl").write_text("")
    with Ledger.open(folder / "ledgers" / "nudge-atlas-seed0") as ledger:
        ledger.note("bench-case", {"position": 3, "cases": ["another"], "errors": {}, "ids": []})
    with pytest.raises(IntegrityError, match="'another' as case 3"):
        bench.run(STREAM, folder)


# -- the disk --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_damages_nothing(
    runs: Runner, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    size = (whole / "results.jsonl").stat().st_size
    runs.start(STREAM, folder, largest=max(size * 2 // 3, 1))
    assert runs.wait() == 1
    assert 0 < lines_of(folder) < lines_of(whole)
    assert (folder / "results.jsonl").read_bytes().endswith(b"\n")
    runs.start(STREAM, folder)
    assert runs.wait() == 0
    assert values(folder) == values(whole)


def test_a_line_that_does_not_fit_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultsFile.open(tmp_path)
    results.add({"key": "one"})
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:4]) and
                        (_ for _ in ()).throw(OSError(28, "No space left on device")))  # fmt: skip
    with pytest.raises(StorageError, match=r"No space left.*same command"):
        results.add({"key": "two"})
    monkeypatch.undo()
    results.add({"key": "three"})
    results.close()
    assert (tmp_path / "results.jsonl").read_text() == '{"key":"one"}\n{"key":"three"}\n'


def test_results_that_nothing_describes_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("{}\n")
    with pytest.raises(IntegrityError, match=r"no run\.json"):
        bench.run(short(limit=1), tmp_path)
    assert (tmp_path / "results.jsonl").read_text() == "{}\n"


def test_two_processes_do_not_write_to_one_run(tmp_path: Path) -> None:
    results = ResultsFile.open(tmp_path)
    with pytest.raises(LedgerBusyError, match="at work"):
        ResultsFile.open(tmp_path)
    results.close()
    ResultsFile.open(tmp_path).close()


@pytest.mark.parametrize("text", ["", "one\n", "one\ntwo", "x" * 200_000, "a\n" + "x" * 200_000])
def test_only_the_half_line_at_the_end_is_dropped(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(text)
    ResultsFile.open(tmp_path).close()
    assert file.read_text() == text[: text.rfind("\n") + 1]
