"""The scripts in benchmarks/ run, and what they count is what is there."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from errata import Editor, Request
from errata.datasets import atlas
from errata.kit.values import ValueSettings, optimise_values
from errata.model.tokens import encode, subject_position
from errata_rome.algorithm import RomeObjective
from errata_rome.config import RomeConfig

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
Load = Callable[[str], Any]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import a script by its name; none of them stays imported."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module
    for name in [n for n, m in sys.modules.items() if _path(m).parent == BENCHMARKS]:
        del sys.modules[name]


def _path(module: Any) -> Path:
    return Path(str(getattr(module, "__file__", None) or ""))


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2") as opened:
        yield opened


def run(script: Any, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    script.main()


# -- operations ------------------------------------------------------------------------------------


def test_counted_operations_are_those_of_the_shapes(load: Load, editor: Editor) -> None:
    count, model = load("operations").counted, editor.model
    request = Request(prompt="{} lives in the city of", subject="Egon Vosk", target_new="Rome")

    def steps(number: int) -> Any:
        settings = ValueSettings(layer=1, steps=number)
        objective = RomeObjective(RomeConfig(early_stop=0))
        return count(
            lambda: optimise_values(model, [request], ["{}"], settings, objective),
            model.parameters.values(),
        )

    steps(1)  # the first batch of a model finds out once how rows may be padded
    few, more = steps(2), steps(3)
    # One step: forward and backward through the blocks above, of two rows (the prompt, and the
    # prompt of the KL term), from the subject's last token to the last that predicts one.
    prompt, whole = (
        encode(model.tokenizer, [text]).input_ids.shape[1]
        for text in (request.text, f"{request.text} {request.target_new}")
    )
    lookup = subject_position(model.tokenizer, request.prompt, request.subject)
    d, D, V = 128, 768, int(model.config.vocab_size)
    columns, above, reads = whole - 1 - lookup, 4, whole - prompt + 1
    blocks = above * 2 * (2 * columns) * (4 * d * d + 2 * d * D)
    products = 2 * (blocks + 2 * reads * d * V)  # backward to the inputs costs as much again
    assert more.of_products - few.of_products == products
    attention = above * 4 * 2 * columns * (whole - 1) * d
    assert more.total - few.total == products + attention * 7 // 2  # backward: five of them to two

    again = load("operations").again(more.products)
    repeated = count(again, model.parameters.values())
    assert repeated.total == repeated.of_products == more.of_products
    assert len(repeated.products) == len(more.products)


def test_rome_is_measured_against_its_own_operations(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out.json"
    words = ("--operations", "--skip-random", "--repeats", "1", "--clock", "cpu")
    run(load("rome"), monkeypatch, *words, "--json", str(out))
    (found,) = json.loads(out.read_text())["results"]
    rate = found["rate, 1e9 operations/s"]["median"]
    floor = found["operations, 1e9"] / rate
    assert found["ratio"]["median"] == pytest.approx(found["seconds"]["median"] / floor)
    assert found["operations, 1e9"] > found["of matrix products, 1e9"] > 1


# -- guards ----------------------------------------------------------------------------------------


def test_the_guards_cost_counts_asking_before_the_edit(load: Load, editor: Editor) -> None:
    found = load("guards").measured(editor, "rome", 1, layer=1)
    parts = {name: value for name, value in found.items() if name.startswith("of them")}
    assert {"of them prepare", "of them check_delta", "of them check_state"} <= set(parts)
    assert found["guards"] == pytest.approx(sum(parts.values()))
    assert parts["of them prepare"] > 0  # it asks the model


# -- restore ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_restore_measures_every_state_once(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "restore.jsonl"
    words = ("--model", "atlas-gpt2", "--data", "atlas", "--n", "1", "--method", "rome")
    run(load("restore"), monkeypatch, *words, "--out", str(out))
    written = out.read_text()
    (row,) = map(json.loads, written.splitlines())
    assert row["edited"]["distance"] > 0
    assert row["edited"]["same_fact"] < 1
    whole = {"same_fact": 1, "same_neighbours": 1, "kl": 0, "distance": 0}
    assert row["reverted"] == pytest.approx(whole)
    assert set(row["edited back"]) == set(whole)
    run(load("restore"), monkeypatch, *words, "--out", str(out))
    assert out.read_text() == written  # what is there is not measured again


# -- costs and GPU ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_costs_are_those_of_edits_that_say_what_the_plain_algorithm_says(
    load: Load,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, out = load("costs"), tmp_path / "costs.jsonl"
    parts = list(script.PARTS)
    words = (word for part in parts for word in ("--part", part))
    run(script, monkeypatch, *words, "--requests", "2", "--out", str(out))
    rows = {row["part"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == parts
    for plain in script.COMPARED:
        assert rows[plain]["ΔW differs by"] < 1e-4
    assert rows["plain rome"]["grew by, bytes"] > rows["rome"]["grew by, bytes"]
    assert rows["counterfact"]["prompts"] > 3
    assert "first edit, CPU s" in rows["first edit"]
    capsys.readouterr()
    run(script, monkeypatch, "--table", str(out))
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| rome", "| plain rome", "| memit"]


@pytest.mark.slow
def test_the_script_for_gpus_runs_on_a_cpu(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script, out = load("gpu"), tmp_path / "gpu.jsonl"
    run(script, monkeypatch, "--device", "cpu", "--n", "1", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    compared = [row for row in rows if row["what"] == "ΔW against the CPU's"]
    assert [row["steps"] for row in compared] == [script.FEW, "all"]
    assert all(row["relative_difference"] < 1e-6 for row in compared)
    timed = {row["what"] for row in rows if "seconds" in row}
    assert {"rome, one by one", "trace", "memit, one call", "taking all off"} <= timed
    assert rows[-1]["exact"] is True
    out.unlink()
    run(script, monkeypatch, "--device", "cpu", "--limit", "0", "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert not any("seconds" in row for row in rows)
    assert rows[-1]["exact"] is True


@pytest.mark.slow
def test_latency_is_measured_with_edits_that_are_found_and_copies_that_are_not(
    load: Load, editor: Editor
) -> None:
    memories = load("memories")
    fact = atlas.requests()[0]
    made = memories.alone(editor, "melo", [fact])
    row = memories.latency(editor, [fact], made, 20)
    assert len(editor.model.stack.ids) == 20
    assert row["answered"] == 1.0  # its own edit is found among the copies
    editor.model.stack.set([])
    asked = {f"{kind} {state} {what}" for kind in ("hit", "miss") for state in ("base", "edited")
             for what in ("prompt", "token")}  # fmt: skip
    assert asked <= set(row)
    printed = memories.table([{"method": name, "n": 20, **row} for name in ("mello", "melo")])
    assert printed.splitlines()[-2].startswith("| `melo` | 20 | 1.00 |")
    assert printed.splitlines()[-1].startswith("| `mello` | 20 | 1.00 |")  # after those of EXAMINED


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ice", "serac"])
def test_copies_of_edits_that_are_texts_have_other_texts_of_the_same_length(
    method: str, load: Load
) -> None:
    memories = load("memories")
    fact, *others = atlas.requests()[:40]
    training = [request for request in others if request.subject != fact.subject]
    with Editor("atlas-gpt2", training=training) as editor:
        config = {"encoder": "far"} if method == "ice" else {"steps": 2}
        delta = editor.edit(fact, method=method, config=config, apply=False).delta
    chance = torch.Generator().manual_seed(0)
    texts = [getattr(memories.copied(delta, chance), memories.TEXTS[delta.kind]) for _ in range(2)]
    assert len({fact.text, *texts}) == 3
    assert {len(text.split()) for text in texts} == {len(fact.text.split())}
