"""What objects show of themselves: a line, a table in a notebook, a data frame."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from errata import Editor, Location, Measurement, Probe, Request
from errata.common.display import SHOWN, ResultTable
from errata.contract.measurement import Answer
from errata.edits.delta import Delta
from errata.edits.edit import LogEntry
from errata.edits.outcome import Efficacy, Outcome, RelativeNorm
from errata.errors import ConfigError, MissingExtraError
from errata.model import Model
from tests.families import build, build_model
from tests.ship.test_shipping import edit_of, low_rank, mixed

HOSTILE = "<script>alert(1)</script> \x1b]52;c;AA\x07\u202e"
LONG = "very " * 400
FACT = Request(
    prompt=f"{LONG}{HOSTILE} of {{}} is", subject="France", target_new=f"Rome{HOSTILE}{LONG}",
    neighbourhood=[Probe(prompt=LONG, answers=(LONG,))] * 50,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return build_model("gpt2", tmp_path_factory.mktemp("cache"))


def whole_edit(model: Model) -> Any:
    delta = low_rank(model, 1, model.anatomy.mlp_out(0))
    outcome = Outcome(
        efficacy=Efficacy(value=0.98, n=50, probability=(0.5,) * 50),
        relative_norm=RelativeNorm(value=0.25, parameter="w"), warnings=(LONG + HOSTILE,),
    )  # fmt: skip
    made = edit_of(model, 1, delta)
    config = {"layer": 3, "contexts": [LONG] * 20}
    update = {"requests": (FACT,) * 50, "config": config, "outcome": outcome}
    return made.model_copy(update=update).bind(delta)


def location() -> Location:
    scores = tuple((0.1,) * 48 for _ in range(30))
    return Location(4, "h.4", "Ġx\x1b", 7, 0.5, f"trace: {LONG}", scores, {"low": 0.1, "high": 0.9})


def measured(n: int = 500) -> Measurement:
    answer = Answer("1", LONG, (LONG,), HOSTILE, True, "ES")
    return Measurement.mean("ES", [1.0] * n, "counterfact: <b>how</b>", answers=[answer] * n)


def test_every_object_is_a_short_line(model: Model) -> None:
    edit = whole_edit(model)
    model.stack.set([edit])
    shown: list[tuple[Any, list[str]]] = [
        (edit, [edit.id, "layer 3", "takes effect 49 of 50", "norm 0.25", "requests 50"]),
        (edit.outcome, ["takes effect 49 of 50", "1 warning"]),
        (FACT, ["neighbourhood 50", "modify"]),
        (FACT.neighbourhood[0], ["answers"]),
        (location(), ["layer 4", "0.1 corrupted and 0.9 clean"]),
        (measured(), ["ES 1", "n 500", "counterfact"]),
        (model.stack, ["1 edit", edit.id]),
        *((e.delta, [f"kind {e.delta.kind}", "bytes"]) for e in mixed(model)),
    ]
    for thing, parts in shown:
        line = repr(thing)
        assert line.startswith(type(thing).__name__)
        assert len(line) < 420
        assert "\n" not in line
        assert not {"\x1b", "\x07", "\u202e"} & set(line)
        assert all(part in line for part in parts), line
        page = thing._repr_html_()
        assert page.startswith("<table>")
        assert "<script" not in page
        assert "<b>" not in page
        assert not {"\x1b", "\x07", "\u202e"} & set(page)
    assert len(str(edit)) < 420
    model.stack.set([])


def test_a_kind_of_somebody_elses_shows_itself_too() -> None:
    class Toy(Delta):
        kind = "toy"

        def tensors(self) -> dict[str, Any]:
            return {}

        @classmethod
        def from_parts(cls, tensors: Any, metadata: Any) -> Any:
            return cls()

        @property
        def parameters(self) -> tuple[str, ...]:
            return ()

    assert repr(Toy()) == "Toy(kind toy, 0 bytes)"


def test_results_are_lists_that_show_themselves_as_tables(model: Model) -> None:
    found = ResultTable([measured(3), Measurement("ppl", 12.34567, 1, "general: text")])
    assert found == list(found)
    lines = str(found).splitlines()
    assert [line.split()[:2] for line in lines] == [["metric", "value"], ["ES", "1"],
                                                    ["ppl", "12.35"]]  # fmt: skip
    assert "general: text" in lines[2]
    assert "&lt;b&gt;how" in found._repr_html_()
    many = ResultTable([measured(3)] * (SHOWN + 5))
    assert len(str(many).splitlines()) == SHOWN + 2
    assert "5 more" in str(many)
    edit = whole_edit(model)
    log = ResultTable([LogEntry.of(edit, {edit.id}, ())])
    assert max(map(len, str(log).splitlines())) < 500
    assert "yes" in str(log)
    assert str(ResultTable[Measurement]()) == "[]"


def test_results_become_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas")
    found = ResultTable([measured(3), Measurement("ppl", 12.5, 1, "general: text")])
    frame = found.to_frame()
    assert list(frame["metric"]) == ["ES", "ppl"]
    assert list(frame["value"]) == [1.0, 12.5]
    assert frame["low"].isna().tolist() == [False, True]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r"errata\[notebook\]"):
        found.to_frame()


def test_a_model_and_its_tokenizer_may_come_as_a_pair(tmp_path: Path) -> None:
    module, tokenizer = build("gpt2")
    with Editor((module, tokenizer), artifacts=tmp_path) as editor:
        assert editor.model.module is module
        assert repr(editor).endswith("parameters), 0 active edits)")
        assert isinstance(editor.log(), ResultTable)
    wrong: Any
    for wrong in ((module,), (module, tokenizer, 1), {"model": module}, None):
        with pytest.raises(ConfigError, match=r"Editor\(model, tokenizer\)"):
            Editor(wrong, artifacts=tmp_path)


def test_rich_prints_the_line_too(model: Model) -> None:
    console = Console(width=500)
    with console.capture() as captured:
        console.print(whole_edit(model))
    assert len(captured.get()) < 500
