"""The scripts that measure trained editors and lifelong streams run, on tiny classifiers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from errata import plots
from errata.datasets import atlas
from tests.families import build
from tests.helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
NAMES = ("France", "Spain", "Italy", "Rome", "Paris", "Madrid", "London", "Berlin", "Lyon", "Oslo")
Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Run a script with these words on its command line."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ERRATA_CACHE", str(tmp_path / "cache"))

    def called(script: str, *words: Any) -> None:
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        importlib.import_module(script).main()

    yield called
    for name in ("trained", "lifelong"):
        sys.modules.pop(name, None)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    module, tokenizer = build("bert-classifier")
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def claims(file: Path, names: tuple[str, ...]) -> Path:
    lines = [
        {"input": f"{name} is a city", "prediction": "other", "alternatives": ["economic"],
         "filtered_rephrases": [f"a city: {name}"], "output": [{"answer": "other"}]}
        for name in names
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


@pytest.mark.slow
def test_the_table_of_claims_is_made_of_ones_own_files(
    run: Run, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, dev = (
        claims(tmp_path / "train.jsonl", NAMES[:6]),
        claims(tmp_path / "d.jsonl", NAMES[6:]),
    )
    out, picture = tmp_path / "claims.jsonl", tmp_path / "logits.png"
    rows = "fine-tune 1st layer,MEND (small)"
    run(
        "trained", "claims", "--model", classifier, "--out", out, "--train", train, "--dev", dev,
        "--rows", rows, "--n", 2, "--retain", 4, "--steps", 2,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["row"] for line in lines] == [row for row in rows.split(",") for _ in range(2)]
    for line in lines:
        then, now = line["scores before"], line["scores after"]
        assert len(then) == len(now) == 1 + 1 + len(line["retain"])
        assert now[0] != then[0]
        assert len(line["right"]) == 3
        kept = [a.index(max(a)) == b.index(max(b)) for a, b in zip(then[2:], now[2:], strict=True)]
        assert line["retain"] == kept
    run("trained", "table", out)
    assert "MEND (small) (n = 2): success" in capsys.readouterr().out
    run("trained", "figure", out, "--out", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_margins_are_drawn_a_panel_per_method(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "claims.jsonl"
    line = {
        "row": "MEND", "equivalence": [True], "scores before": [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]],
        "scores after": [[0.0, 1.0], [0.5, 0.0], [0.0, 2.5]],
    }  # fmt: skip
    out.write_text("\n".join(json.dumps({**line, "row": row}) for row in ("MEND", "ke", "left")))
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda made, path: drawn.append(made))
        run("trained", "figure", out, "--out", "x.png", "--rows", "MEND,ke")
    (made,) = drawn
    assert [ax.get_title() for ax in made.axes] == ["MEND", "ke"]
    points = {
        shown.get_label(): (list(shown.get_xdata()), list(shown.get_ydata()))
        for shown in made.axes[0].lines
    }
    assert points["success"] == ([1.0], [-1.0])  # another class
    assert points["equivalence"] == ([2.0], [0.5])
    assert points["retain"] == ([3.0], [2.5])


def test_facts_are_read_without_the_records_that_say_nothing(run: Run, tmp_path: Path) -> None:
    question, other = json.loads((ROOT / "tests/data/datasets/zsre.json").read_text())
    file = tmp_path / "zsre.json"
    file.write_text(json.dumps([{**other, "alt": ""}, question]))
    words = ("--model", "atlas-gpt2", "--out", tmp_path / "x.jsonl", "--method", "ft")
    run("trained", "facts", *words, "--training", f"zsre={file}", "--dataset", f"zsre={file}")
    rows = [json.loads(line)["row"] for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert rows == ["zsre: base", "zsre: ft"]


@pytest.mark.slow
def test_a_stream_of_answers_has_graces_f1_too(run: Run, tmp_path: Path) -> None:
    requests = atlas.requests(40)
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(request.model_dump_json() for request in requests))
    given = ("--data", f"jsonl={file}", "--retain", f"jsonl={file}")
    run("lifelong", "zsre", "--model", "atlas-gpt2", *given, "--n", 2, "--row", "FT", "--out",
        tmp_path)  # fmt: skip
    (line,) = [json.loads(line) for line in (tmp_path / "zsre.jsonl").read_text().splitlines()]
    assert line["edits"] == 2
    for rate in ("ERR", "TRR"):
        whole, f1 = line[rate][0], line[f"{rate}_f1"][0]
        assert 0 < f1 < whole <= 1  # F1 is of texts that go on behind the answer
    assert line["ERR"][0] > 0  # the last edit holds


@pytest.mark.slow
def test_a_stream_of_labels_is_edited_and_long_texts_are_cut(
    run: Run, classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, labels in (("train", ("other", "criminal")), ("later", ("economic", "other"))):
        rows = [
            f"{place} {subject} {'is a city ' * 80},{labels[place % 2]}"
            for place, subject in enumerate(NAMES * (30 if name == "train" else 1))
        ]
        (classifier / f"topics.{name}.csv").write_text("\n".join(["text,label", *rows]))
    run("lifelong", "topics", "--model", classifier, "--n", 3, "--row", "GRACE", "--out", tmp_path)
    (line,) = [json.loads(line) for line in (tmp_path / "topics.jsonl").read_text().splitlines()]
    assert line["edits"] + line["failed"] <= 3
    run("lifelong", "table", tmp_path / "topics.jsonl")
    assert "GRACE" in capsys.readouterr().out
