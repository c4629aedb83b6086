"""Defer and Memory: the authors' formulas, and the failure that they are here to show."""

from __future__ import annotations

from pathlib import Path

import torch

from errata.model.forward import trace
from errata.model.running import prepare, run
from errata_side_network.delta import Place, SideNetworks
from errata_side_network.networks import DEFER, memory
from tests.families import build_model
from tests.methods.test_memories import FRANCE, REQUESTS, in_sequence, nll, put


def test_the_networks_are_the_authors_modules() -> None:
    """Against `torch.nn.Linear`, sigmoid and softmax as grace/editors write them."""
    q = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    p = DEFER.start(4, 6, seed=0)
    gate, linear = torch.nn.Linear(6, 1), torch.nn.Linear(6, 4)
    m = memory(5).start(4, 6, seed=0)
    attention = torch.nn.Linear(6, 5)
    with torch.no_grad():
        gate.weight.copy_(p["w"][None])
        gate.bias.copy_(p["c"])
        linear.weight.copy_(p["A"])
        linear.bias.copy_(p["a"])
        attention.weight.copy_(m["F"])
        attention.bias.copy_(m["f"])
        found = DEFER.answer(p, q)
        assert torch.allclose(found.gate, torch.sigmoid(gate(q))[:, 0])
        assert torch.allclose(found.value, linear(q), atol=1e-6)
        for row, value in zip(q, memory(5).answer(m, q).value, strict=True):
            weights = torch.softmax(attention(row[None]), 1)
            assert torch.allclose(value, (weights.view(-1, 1) * m["values"]).sum(0), atol=1e-6)
    bound = 6**-0.5
    assert all(bool((p[name].abs() <= bound).all()) for name in p)
    assert 0 <= float(m["values"].min()) <= float(m["values"].max()) < 1


def test_a_memory_answers_for_every_prompt_and_with_no_edit_for_none(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    base = nll(model)
    deltas = in_sequence(model, "memory", FRANCE)
    assert all(abs(now - then) > 1e-3 for now, then in zip(nll(model), base, strict=True))
    module = deltas[0].parameters[0].removesuffix(".weight")
    prompts = prepare(model, [request.text for request in REQUESTS])
    with torch.no_grad(), trace(model.module, module) as seen:
        run(model, prompts)
    output = seen[module].output
    assert output is not None
    for row in output:  # one vector in all of a row
        assert torch.equal(row, row[:1].expand_as(row))
    model.stack.set([])
    assert nll(model) == base


def test_the_gate_of_defer_opens_for_prompts_that_no_edit_is_about(tmp_path: Path) -> None:
    """No loss keeps it shut: what GRACE's table shows of it."""
    model = build_model("llama", tmp_path)
    others = [
        request.model_copy(update={"subject": name})
        for request in REQUESTS
        for name in ("Lyon", "Sony", "NBC")
    ]
    base = nll(model, others)
    in_sequence(model, "defer", *REQUESTS)
    touched = [abs(now - then) > 1e-3 for now, then in zip(nll(model, others), base, strict=True)]
    assert sum(touched) >= 6


def test_the_network_is_its_beginning_plus_the_differences(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    deltas = in_sequence(model, "defer", *REQUESTS)
    place = deltas[0].place  # type: ignore[attr-defined]
    assert isinstance(place, Place)
    start = place.start(model)
    named = [(str(n), delta) for n, delta in enumerate(deltas)]
    found = SideNetworks.of(model).sums(named)[place]  # type: ignore[arg-type]
    for name, total in start.items():
        expected = total.clone()
        for delta in deltas:
            expected = expected + delta.tensors()[name]
        assert torch.equal(found[name], expected)
    put(model, deltas[:1])  # one that was there is gone: nothing of it is kept
    kept = SideNetworks.of(model).sums(named[:1])[place]  # type: ignore[arg-type]
    assert torch.equal(kept["A"], start["A"] + deltas[0].tensors()["A"])


def test_what_the_model_says_already_changes_nothing(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    deltas = in_sequence(model, "memory", FRANCE, FRANCE)
    assert deltas[0].nbytes > 0
    assert deltas[1].tensors() == {}
