"""What failed in a run: where it was raised, and trying it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from errata import bench
from errata.bench.results import ResultsFile
from errata.errors import StorageError
from tests.bench.bench_helpers import SUBJECTS, short, values

pytestmark = pytest.mark.usefixtures("installed")


@pytest.fixture
def mended(tmp_path: Path) -> Path:
    """The file that ends the failing."""
    return tmp_path / "mended"


def failing(mended: Path, **fields: Any) -> dict[str, Any]:
    config = {"fail_on": SUBJECTS[1], "fail_until": str(mended)}
    return short(methods=[{"method": "nudge", "config": config}], **fields)


def failed(folder: Path) -> list[str]:
    return [line["key"] for line in bench.load(folder).failures()]


def test_what_failed_is_tried_again_when_asked(tmp_path: Path, mended: Path) -> None:
    config, folder = failing(mended), tmp_path / "run"
    bench.run(config, folder)
    before = values(folder)
    mended.touch()
    bench.run(config, folder)
    assert failed(folder) == ["nudge|atlas|0|single|1|1"]
    assert bench.plan(config, folder).columns[1].done == 3
    assert bench.plan(config, folder, retry_failed=True).columns[1].done == 2
    written: list[str] = []
    bench.run(config, folder, retry_failed=True, on_line=lambda line: written.append(line["key"]))
    assert written == ["nudge|atlas|0|single|1|1"]
    assert failed(folder) == []
    whole = tmp_path / "whole"
    bench.run(config, whole)
    assert values(folder) == values(whole)
    assert {key: values(folder)[key] for key in before if key not in written} == {
        key: line for key, line in before.items() if key not in written
    }


def test_what_fails_again_is_a_failure_again(tmp_path: Path, mended: Path) -> None:
    config, folder = failing(mended, limit=2), tmp_path / "run"
    bench.run(config, folder)
    before = values(folder)
    bench.run(config, folder, retry_failed=True)
    assert values(folder) == before


def test_a_batch_with_a_failure_is_tried_again_whole(tmp_path: Path, mended: Path) -> None:
    config = failing(mended, regime="batch", batch_size=2, limit=4, state=["general"])
    folder, whole = tmp_path / "run", tmp_path / "whole"
    bench.run(config, folder)
    assert len(failed(folder)) == 2
    mended.touch()
    bench.run(config, folder, retry_failed=True)
    bench.run(config, whole)
    assert values(folder) == values(whole)


def test_a_failed_edit_of_a_stream_stays_one(tmp_path: Path, mended: Path) -> None:
    config = failing(mended, regime="sequential", checkpoints=[2])
    folder = tmp_path / "run"
    bench.run(config, folder)
    before = values(folder)
    mended.touch()
    bench.run(config, folder, retry_failed=True)
    assert values(folder) == before


def test_a_failure_keeps_its_traceback(tmp_path: Path, mended: Path) -> None:
    for regime in ("single", "sequential"):
        folder = tmp_path / regime
        bench.run(failing(mended, regime=regime, limit=2), folder)
        (line,) = bench.load(folder).failures()
        assert "ZeroDivisionError: on purpose (results.jsonl has the traceback)." in line["error"]
        assert 'raise ZeroDivisionError("on purpose")' in line["traceback"]


@pytest.mark.parametrize("regime", ["single", "batch", "sequential"])
def test_a_method_that_cannot_be_prepared_stops_no_other(
    regime: str, tmp_path: Path, mended: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    shy = {"method": "shy", "config": {"fail_until": str(mended), "log": str(log)}}
    size = {"batch_size": 2} if regime == "batch" else {}
    config, folder = short(methods=[shy, "nudge"], regime=regime, **size), tmp_path / "run"
    bench.run(config, folder)
    lines = bench.load(folder)
    assert {line["variant"] for line in lines.failures()} == {"shy"}
    assert len(list(lines.failures())) == 3
    assert {line["variant"] for line in lines.cases()} == {"base", "nudge"}
    (line, *_) = lines.failures()
    assert "failed in its `prepare` hook: ZeroDivisionError: no preparation" in line["error"]
    assert 'raise ZeroDivisionError("no preparation")' in line["traceback"]
    assert log.read_text() == "prepare\n"  # it is not tried again for each case
    assert "shy cannot be prepared: its cases fail" in caplog.text
    bench.run(config, folder)
    assert log.read_text() == "prepare\n"
    mended.touch()
    bench.run(config, folder, retry_failed=True)
    assert len(failed(folder)) == (3 if regime == "sequential" else 0)


def test_what_cannot_be_prepared_is_not_timed(tmp_path: Path, mended: Path) -> None:
    shy = {"method": "shy", "config": {"fail_until": str(mended)}}
    plan = bench.plan(short(methods=[shy, "nudge"]), probe=1)
    assert [column.seconds is None for column in plan.columns] == [False, True, False]


def test_lines_are_taken_out_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFile.open(tmp_path)
    path = tmp_path / "results.jsonl"
    for key in "abc":
        results.add({"key": key})
    results.drop({"b"})
    results.add({"key": "d"})
    assert path.read_text() == "".join(f'{{"key":"{key}"}}\n' for key in "acd")
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(StorageError, match="No space left"):
        results.drop({"a"})
    results.close()
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["results.jsonl", "run.lock"]
