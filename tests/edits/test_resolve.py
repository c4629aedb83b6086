"""Recorded joint edits are solved again with another λ or null space, without new values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from errata import Editor
from errata.datasets import atlas
from errata.errors import CapabilityError, ConfigError, LedgerError, PluginError

OFF = {"norm": "off", "perplexity": "off", "efficacy": "off"}
PLAIN = {"contexts": ("{}",), "steps": 3, "layers": (1,), "tokens": 2000}


def weights(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in editor.model.parameters.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def no_gradient(*_: object, **__: object) -> None:
    """Stand in for what every optimised value comes from."""
    raise AssertionError("a value is computed anew")


@pytest.mark.parametrize(
    ("method", "before", "after"),
    [
        ("memit", {"second_moment_weight": 50.0}, {"second_moment_weight": 5000.0}),
        ("memit", {"second_moment_weight": 50.0}, {"relative_weight": 3.0}),
        ("memit", {"relative_weight": 0.5}, {"tokens": 3000}),
        ("emmet", {}, {"tokens": 3000}),
        ("pmet", {"second_moment_weight": 50.0}, {"second_moment_weight": 5000.0}),
        (
            "alphaedit",
            {"fraction": 0.5, "threshold": None, "l2": 1.0},
            {"l2": 30.0, "fraction": 0.7},
        ),
    ],
)
def test_it_is_as_if_they_had_been_made_so(
    method: str, before: dict, after: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = atlas.requests(3)
    editor = Editor("atlas-gpt2", guards=OFF)
    base = weights(editor)
    aside = {"second_moment_weight": None} if "relative_weight" in after else {}
    whole = {**PLAIN, **before, **aside, **after}
    editor.edit(facts, method=method, config=whole)
    wanted = weights(editor)
    editor.revert(*editor.model.stack.ids)

    old = editor.edit(facts, method=method, config={**PLAIN, **before})
    assert not same(weights(editor), wanted)
    with monkeypatch.context() as patched:
        patched.setattr("torch.autograd.grad", no_gradient)
        new = editor.resolve(**after)
        with pytest.raises(PluginError, match="a value is computed"):
            editor.edit(facts, method=method, config=whole)
    assert [edit.outcome.rebases for edit in new] == [edit.id for edit in old]
    assert same(weights(editor), wanted)
    assert editor.verify() == []

    editor.revert(new[1])  # each still comes off by itself
    again = Editor("atlas-gpt2", guards=OFF)
    again.edit([facts[0], facts[2]], method=method, config=whole)
    assert same(weights(editor), weights(again))
    editor.revert(new[0], new[2])
    assert same(weights(editor), base)


def test_what_cannot_be_solved_again_is_said_and_left_alone(tmp_path: Path) -> None:
    first, second = atlas.requests(2)
    editor = Editor("atlas-gpt2", ledger=tmp_path, guards=OFF)
    assert editor.resolve(l2=3.0) == []
    joint = editor.edit(first, method="memit", config={**PLAIN, "second_moment_weight": 50.0})
    exact = editor.edit(second, method="rome", config={"contexts": ("{}",), "steps": 3})
    before = weights(editor)
    for wrong, error, words in (
        (lambda: editor.resolve(steps=5), ConfigError, "'steps' decides what memit writes"),
        (lambda: editor.resolve(joint, lamda=5), ConfigError, "no hyper-parameter 'lamda'"),
        (lambda: editor.resolve(joint, second_moment_weight=-1), ConfigError, "greater than 0"),
        (lambda: editor.resolve(exact, l2=1.0), CapabilityError, "rome cannot solve"),
        (lambda: editor.resolve("beef", l2=1.0), LookupError, "beef"),
    ):
        with pytest.raises(error, match=words):
            wrong()
    assert same(weights(editor), before)
    assert editor.model.stack.ids == [joint.id, exact.id]

    (new,) = editor.resolve(second_moment_weight=500.0)  # rome's edit is left out
    with pytest.raises(LedgerError, match="not active"):
        editor.resolve(joint, second_moment_weight=10.0)
    kinds = [event.kind for event in editor.ledger.events() if event.edit_id == joint.id]
    assert kinds[-1] == "resolve"
    editor.close()
    again = Editor("atlas-gpt2", ledger=tmp_path)
    assert again.model.stack.ids == [exact.id, new.id]
    assert again.verify() == []


@pytest.mark.slow
def test_values_that_facts_of_one_subject_share_are_solved_again_too() -> None:
    subject = atlas.requests(1)[0].subject
    facts = [request for request in atlas.requests() if request.subject == subject][:2]
    assert len(facts) == 2
    before, after = {"second_moment_weight": 50.0}, {"second_moment_weight": 2000.0}
    editor = Editor("atlas-gpt2", guards=OFF)
    editor.edit(facts, method="memit", config={**PLAIN, **after})
    wanted = weights(editor)
    editor.revert(*editor.model.stack.ids)
    editor.edit(facts, method="memit", config={**PLAIN, **before})
    _, second = editor.resolve(**after)
    assert same(weights(editor), wanted)
    editor.revert(second)
    fresh = Editor("atlas-gpt2", guards=OFF)
    _, later = fresh.edit(facts, method="memit", config={**PLAIN, **after})
    fresh.revert(later)
    assert same(weights(editor), weights(fresh))
