"""A protocol that another package measures: the page's own example, and one in the wrong group."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from errata import Editor, bench
from errata.cli.app import app
from errata.datasets import atlas, load
from errata.errors import ConfigError, PluginError, UnknownNameError
from errata.evaluate import Baseline
from tests.families import saved
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## A protocol of your own\n")[2]
(CODE,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
(POINTS,) = re.findall(r"```toml\n(.*?)```", SECTION, re.DOTALL)


def install(folder: Path, points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info = folder / "my_brevity-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / "my_brevity.py").write_text(CODE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-brevity\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_brevity", raising=False)
    importlib.invalidate_caches()


@pytest.mark.slow
def test_the_pages_protocol_is_measured_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (group, line) = re.fullmatch(r'\[project\.entry-points\."(.+)"\]\n(.+)\n', POINTS).groups()  # type: ignore[union-attr]
    install(tmp_path / "site", f"[{group}]\n{line.replace(chr(34), '')}\n", monkeypatch)
    monkeypatch.chdir(tmp_path)
    run = bench.run(
        {
            "model": "atlas-gpt2", "methods": "rome", "datasets": "atlas", "limit": 2,
            "protocols": "brevity", "settings": {"max_new_tokens": 4},
        },
        tmp_path / "run",
    )  # fmt: skip
    found = {
        (line["variant"], line["case_id"]): [m["metric"] for m in line["measurements"]]
        for line in run.cases()
    }
    cases = [request.case_id for request in atlas.requests(2)]
    assert found.keys() == {(who, case) for who in ("base", "rome") for case in cases}
    assert all(found["rome", case] == ["words", "more_words"] for case in cases)
    assert all(found["base", case] == ["words"] for case in cases)
    with Editor("atlas-gpt2") as editor:
        (measured,) = editor.evaluate(atlas.requests(2), "brevity", max_new_tokens=4)
        assert (measured.metric, measured.n, measured.unit) == ("words", 2, "words")
        editor.edit(atlas.requests(1)[0], method="rome")  # asking the base takes it off and on
        again = editor.evaluate(atlas.requests(2), "brevity", max_new_tokens=4)
        assert [one.metric for one in again] == ["words", "more_words"]
        assert editor.verify() == []
        (kept,) = Baseline.capture(editor.model, atlas.requests(2), ["brevity"]).measurements
        assert kept.metric == "words"
    assert "at most 4 new tokens" in measured.protocol
    with pytest.raises(UnknownNameError, match=r"in the group errata\.plugins of entry points"):
        load("brevity", "some.jsonl")


def test_a_protocol_in_the_group_of_methods_is_told_where_it_belongs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "[errata.methods]\nbrevity = my_brevity:Brevity\n", monkeypatch)
    said = r"group 'errata.plugins'.*'brevity' \(my_brevity:Brevity from my-brevity\) has no `edit`"
    run = {"model": "atlas-gpt2", "methods": "ice", "datasets": "atlas", "protocols": "brevity"}
    with pytest.raises(UnknownNameError, match=said):
        bench.plan(run)
    asked = ["evaluate", "--dataset", "atlas", "-p", "brevity", "-m", "atlas-gpt2"]
    shown = " ".join(CliRunner().invoke(app, asked).stderr.split())
    assert "What has `protocols` alone belongs into 'errata.plugins'" in shown
    with pytest.raises(PluginError, match=r"belongs into 'errata\.plugins'"):
        bench.plan({**run, "methods": "brevity", "protocols": "generation"})


def test_a_run_is_not_continued_with_another_version_of_what_reads_or_measures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    points = (
        "[errata.plugins]\nbrevity = my_brevity:Brevity\n[errata.datasets]\nmine = my_data:parse\n"
    )
    install(site, points, monkeypatch)
    (site / "my_data.py").write_text("def parse(record):\n    return record.data\n")
    data = tmp_path / "facts.jsonl"
    data.write_text('{"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}\n')
    run = {
        "model": str(saved("gpt2", tmp_path / "model")), "methods": "base", "protocols": "brevity",
        "datasets": {"name": "mine", "path": str(data)}, "settings": {"max_new_tokens": 2},
    }  # fmt: skip
    done = bench.run(run, tmp_path / "run")
    bench.run(run, tmp_path / "run")  # the same packages
    assert len(list(done)) == 1
    metadata = site / "my_brevity-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    with pytest.raises(ConfigError, match="never mixed") as refused:
        bench.run(run, tmp_path / "run")
    for what in ("dataset mine", "protocol brevity"):
        assert f'packages.{what}: "my-brevity 1.0" there, "my-brevity 1.1" here' in str(
            refused.value
        )
    with pytest.raises(ConfigError, match="never mixed"):
        bench.plan(run, tmp_path / "run")
