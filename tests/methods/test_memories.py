"""Added neurons and memories: what defer, memory, t-patcher, calinet, wise and melo have in common.

Each is right per row, in padded batches, with and without a KV cache, with beams and in several
threads; its edits survive storage, and one of several comes out exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.contract import plugins
from errata.contract.purity import Snapshot
from errata.edits.delta import Delta
from errata.edits.request import Request
from errata.edits.stack import Stack
from errata.errors import IntegrityError
from errata.model import Model
from errata.model.generation import generate
from errata.model.scoring import score_targets
from errata.model.structure import Structure
from errata.testing import edit_with
from tests.families import build_model, take_off

FRANCE = Request(prompt="The capital of {} is", subject="France", target_new="Rome")
DAVIS = Request(prompt="{} plays the", subject="Miles Davis", target_new="piano")
KING = Request(
    prompt="Once upon a time {} lived in", subject="the king", target_new="Madrid, Spain"
)
REQUESTS = [FRANCE, DAVIS, KING]
IDS = [f"{n:012x}" for n in range(1, 9)]

METHODS: dict[str, dict[str, Any]] = {
    "defer": {"lr": 0.01, "steps": 30},
    "memory": {"lr": 0.05, "steps": 30, "slots": 8},
    "t-patcher": {
        "memory": 200,
        "held_out": 50,
        "steps": 120,
        "first_check": 30,
        "check_every": 10,
    },
    "calinet": {"width": 8, "steps": 60},
    "wise": {"beta": 2.0, "gamma": 1.0, "alpha": 0.5, "steps": 15, "lr": 5.0},
    "melo": {"layer": 0, "blocks": (1, 2), "radius": 0.05, "steps": 40},
}
"""Small settings for small models."""

REACHES_ALL = ("memory", "calinet", "defer", "t-patcher", "wise")
"""Methods that do not tell rows apart, or not in a random model (of 32 dimensions)."""


def faint(directory: Path, dtype: torch.dtype, norm: float) -> Model:
    """Return a model whose answers hang on its last states by so little that fp16 loses it."""
    model = build_model("llama", directory, dtype)
    with torch.no_grad():
        model.anatomy.final_norm(model.module).weight *= norm  # type: ignore[operator]
        model.anatomy.head(model.module).weight *= 1e-3  # type: ignore[operator]
    return Stack.on(model)  # opened as it is now


def edit(model: Model, method: str, *requests: Request, **config: Any) -> list[Delta]:
    plugin = plugins.load(method)
    settings = plugin.config(**{**METHODS[method], **config}).for_model(model.anatomy)
    prepare = getattr(plugin, "prepare", None)
    if prepare is not None and not model.stack.ids:
        arguments = {"model": model, "corpus": (), "config": settings}
        names = prepare.__code__.co_varnames[1 : prepare.__code__.co_argcount]
        prepare(**{name: arguments[name] for name in names})
    made = plugin.edit(model, list(requests), settings)
    deltas = [made] if isinstance(made, Delta) else list(made)
    for delta in deltas:
        delta.check(model)
    return deltas


def put(model: Model, deltas: Sequence[Delta], ids: Sequence[str] = IDS) -> None:
    model.stack.set([])
    model.stack.set([edit_with(n, ids[n], delta) for n, delta in enumerate(deltas)])


def in_sequence(model: Model, method: str, *requests: Request, **config: Any) -> list[Delta]:
    deltas: list[Delta] = []
    for request in requests:
        deltas += edit(model, method, request, **config)
        put(model, deltas)
    return deltas


def nll(model: Model, requests: Sequence[Request] = REQUESTS) -> list[float]:
    scores = score_targets(model, [r.text for r in requests], [r.target for r in requests])
    return [score.mean_nll for score in scores]


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(
    "family",
    ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "gemma2", "opt"))],
)
def test_an_edit_holds_in_batches_caches_beams_and_threads_and_goes_without_trace(
    family: str, method: str, tmp_path: Path
) -> None:
    model = build_model(family, tmp_path)
    prompts = [request.text for request in REQUESTS]
    edit(model, method, FRANCE, **({"steps": 2} if method != "t-patcher" else {"steps": 1}))
    before, built, weights = Snapshot(model), Structure(model.module), state(model)
    base, texts = nll(model), generate(model, prompts, max_new_tokens=5)
    deltas = edit(model, method, FRANCE)
    assert before.changed() == []
    put(model, deltas)

    edited = nll(model)
    assert edited[0] < base[0] - 0.5
    alone = [nll(model, [request])[0] for request in REQUESTS]
    assert edited == pytest.approx(alone, abs=1e-3)
    if method not in REACHES_ALL:
        assert edited[1:] == pytest.approx(base[1:], abs=1e-2)

    new = generate(model, prompts, max_new_tokens=5)
    assert new[0] != texts[0]
    assert new == [generate(model, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    batch = model.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    run = model.module.generate
    for beams in (1, 2):
        cached = run(**batch, **options, num_beams=beams)  # type: ignore[operator]
        uncached = run(**batch, **options, num_beams=beams, use_cache=False)  # type: ignore[operator]
        assert torch.equal(cached, uncached)
    with ThreadPoolExecutor(3) as pool:
        work = [pool.submit(nll, model, [request]) for request in REQUESTS * 2]
        assert [job.result()[0] for job in work] == alone * 2

    model.stack.set([])
    assert built.changed() == []
    assert all(torch.equal(weights[name], tensor) for name, tensor in state(model).items())
    assert nll(model) == base
    assert generate(model, prompts, max_new_tokens=5) == texts


@pytest.mark.parametrize("method", [
    pytest.param(name, marks=[] if name in ("memory", "wise", "melo") else [pytest.mark.slow])
    for name in METHODS
])  # fmt: skip
def test_one_of_three_comes_out_and_what_was_stored_is_what_acts(
    method: str, tmp_path: Path
) -> None:
    model = build_model("llama", tmp_path)
    deltas = in_sequence(model, method, *REQUESTS)
    read = [type(d).from_parts(d.tensors(), d.metadata()) for d in deltas]
    three = nll(model)
    take_off(model.stack, IDS[1])
    two = nll(model)
    assert two != three
    fresh = build_model("llama", tmp_path)
    put(fresh, [read[0], read[2]])
    assert nll(fresh) == two  # bit for bit
    model.stack.set([edit_with(n, IDS[n], delta) for n, delta in enumerate(deltas)])
    assert nll(model) == three


def test_what_does_not_fit_is_refused(method: str, tmp_path: Path) -> None:
    model, other = build_model("llama", tmp_path), build_model("gpt2", tmp_path)
    (delta,) = edit(model, method, FRANCE, **({} if method == "t-patcher" else {"steps": 2}))
    kind, tensors, metadata = type(delta), delta.tensors(), delta.metadata()
    with pytest.raises(IntegrityError):
        delta.check(other)
    for name in tensors.keys() - {"states"}:
        with pytest.raises(IntegrityError):
            kind.from_parts({n: t for n, t in tensors.items() if n != name}, metadata)
    for name in metadata:
        if method == "melo" and name == "config":
            continue  # the adapter's own test
        for bad in (None, [], {"a": 1}, -1, "\x1b[31m"):
            if isinstance(bad, str) and isinstance(metadata[name], str):
                continue  # another name; whether it is there, `check` says
            if bad == [] and name in ("labels",):
                continue
            with pytest.raises(IntegrityError):
                kind.from_parts(tensors, {**metadata, name: bad})
    flat = {name: tensor.flatten()[:1] for name, tensor in tensors.items()}
    with pytest.raises(IntegrityError):
        kind.from_parts(flat, metadata).check(model)
