"""An average that was killed goes on where it stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from errata import Editor
from errata.datasets import atlas
from errata.errors import IntegrityError
from errata.locate import AverageTrace, Tracer, average
from errata.locate.trace_result import CausalTrace
from tests.families import build_model

QUIET = dict.fromkeys(("norm", "perplexity", "efficacy"), "off")
REQUESTS = atlas.requests(3)


@pytest.fixture
def editor(tmp_path: Path) -> Editor:
    return Editor("atlas-gpt2", artifacts=tmp_path / "cache", guards=QUIET)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of trace that were computed, one entry for each."""
    done: list[str] = []
    own = Tracer.trace

    def counting(tracer: Tracer, kind: Any = "hidden", *args: Any, **more: Any) -> CausalTrace:
        found = own(tracer, kind, *args, **more)
        done.append(f"{kind}-{more['severed']}" if more.get("severed") else kind)
        return found

    monkeypatch.setattr(Tracer, "trace", counting)
    return done


def averaged(editor: Editor, **more: Any) -> AverageTrace:
    options = {"variants": ("hidden", "mlp"), "window": 2, "samples": 1, "resume": True, **more}
    return average(editor.model, REQUESTS, **options)


def same(one: AverageTrace, other: AverageTrace) -> bool:
    cases = [
        np.array_equal(effects.cases[role], other.effects[name].cases[role])
        for name, effects in one.effects.items() for role in effects.roles
    ]  # fmt: skip
    return all(cases) and one.as_json() == other.as_json()


def test_a_killed_average_goes_on_where_it_stopped(
    editor: Editor, traced: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = averaged(editor, resume=False)
    assert traced == ["hidden", "mlp"] * 3
    assert not list((tmp_path / "cache").rglob("traces/**/*.safetensors"))
    traced.clear()
    own = Tracer.trace

    def killed(tracer: Tracer, *args: Any, **more: Any) -> CausalTrace:
        if len(traced) == 3:  # in the second prompt, after its first kind
            raise KeyboardInterrupt
        return own(tracer, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Tracer, "trace", killed)
        with pytest.raises(KeyboardInterrupt):
            averaged(editor)
    said: list[str] = []
    again = Editor("atlas-gpt2", artifacts=tmp_path / "cache", guards=QUIET, progress=said.append)
    found = averaged(again)
    assert traced == ["hidden", "mlp", "hidden", "mlp", "hidden", "mlp"]  # each of them once
    assert same(found, whole)
    assert said[-1] == "1 of 3 prompts had been traced by an earlier call"


def test_only_the_same_trace_is_taken(editor: Editor, traced: list[str]) -> None:
    first = averaged(editor)
    traced.clear()
    assert same(averaged(editor, memory_mb=1.0), first)
    assert traced == []
    wider = averaged(editor, window=3)
    assert traced == ["mlp"] * 3  # a block's output is restored alone, whatever the window
    assert wider.effects["mlp"].window == 3
    traced.clear()
    averaged(editor, variants=("hidden", "hidden-mlp"))
    assert traced == ["hidden-mlp"] * 3
    for other in ({"seed": 1}, {"samples": 2}, {"corrupt": "relation"}, {"noise": 2.0},
                  {"score": "first"}):  # fmt: skip
        traced.clear()
        averaged(editor, variants=("hidden",), **other)
        assert len(traced) == 3, other
    traced.clear()
    guess = averaged(editor, variants=("hidden",), screening=True)
    assert same(averaged(editor, variants=("hidden",), screening=True), guess)
    assert not same(guess, averaged(editor, variants=("hidden",)))
    assert traced == []


def test_another_model_is_not_taken_for_the_base(editor: Editor, traced: list[str]) -> None:
    base = averaged(editor, variants=("hidden",), known_only=False)
    edit = editor.edit(REQUESTS[0], method="kn", steps=2, apply=True)
    traced.clear()
    edited = averaged(editor, variants=("hidden",), known_only=False)
    assert len(traced) == 3
    assert not same(edited, base)
    editor.revert(edit)
    traced.clear()
    assert same(averaged(editor, variants=("hidden",), known_only=False), base)
    assert traced == []


def test_what_other_code_changed_is_not_kept(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    with torch.no_grad():
        next(iter(model.parameters.values())).add_(1.0)
    with pytest.raises(IntegrityError, match="Other code changed"):
        average(model, REQUESTS, variants=("hidden",), samples=1, known_only=False, resume=True)
