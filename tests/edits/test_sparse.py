from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.edits.delta import DenseDelta, Factor, LowRankDelta, Rows, SparseRowsDelta
from errata.edits.delta_kinds import DeltaKinds
from errata.edits.ledger import Ledger
from errata.errors import IntegrityError
from errata.model import Model
from errata.testing import edit_with
from tests.families import build_model, put_on
from tests.ledger.ledger_helpers import commit, small_edit

NAME = "transformer.h.1.mlp.c_proj.weight"  # (48, 32)
BIAS = "transformer.h.1.mlp.c_proj.bias"  # (32,)
IDS = tuple(f"{i:012x}" for i in range(1, 9))


def rows(seed: int, axis: int = 0, name: str = NAME, scale: float = 1.0) -> SparseRowsDelta:
    generator = torch.Generator().manual_seed(seed)
    shape = (32,) if name == BIAS else (48, 32)
    index = torch.randperm(shape[axis], generator=generator)[:5].sort().values
    width = tuple(n for i, n in enumerate(shape) if i != axis)
    return SparseRowsDelta({name: Rows(index, scale * torch.randn(5, *width, generator=generator),
                                       axis)})  # fmt: skip


def whole(delta: SparseRowsDelta, name: str = NAME) -> torch.Tensor:
    """Write the change out by hand."""
    part = delta.rows[name]
    out = torch.zeros(32) if name == BIAS else torch.zeros(48, 32)
    for number, value in zip(part.index.tolist(), part.values, strict=True):
        if part.axis == 0:
            out[number] = value
        else:
            out[:, number] = value
    return out


def again(delta: SparseRowsDelta) -> SparseRowsDelta:
    return SparseRowsDelta.from_parts(delta.tensors(), delta.metadata())


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return build_model("gpt2", tmp_path)


@pytest.mark.parametrize(("axis", "name"), [(0, NAME), (1, NAME), (0, BIAS)])
def test_it_adds_its_rows_and_nothing_else(axis: int, name: str, model: Model) -> None:
    delta = rows(1, axis, name)
    delta.check(model)
    base = model.parameters[name].detach().clone()
    model.stack.set([edit_with(1, IDS[0], delta)])
    assert torch.equal(model.parameters[name], base + whole(delta, name))
    expected = float(whole(delta, name).norm() / base.norm().clamp_min(1e-30))  # a bias is zero
    assert delta.norms(model)[name] == pytest.approx(expected)
    model.stack.set([])
    assert torch.equal(model.parameters[name], base)


@given(
    seeds=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 1)), min_size=1, max_size=4),
    keep=st.sets(st.integers(0, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_any_set_of_edits_folds_as_if_the_others_never_were(
    seeds: list[tuple[int, int]], keep: set[int], dtype: torch.dtype
) -> None:
    model = cached(dtype)
    base = model.parameters[NAME].detach().clone()
    deltas: list[Any] = [rows(seed, axis, scale=0.1) for seed, axis in seeds]
    dense = DenseDelta({NAME: 0.1 * torch.randn(48, 32, generator=torch.Generator())})
    factor = Factor(torch.ones(32, 1) / 8, torch.ones(48, 1) / 8, transposed=True)
    deltas += [dense, LowRankDelta({NAME: factor})]
    entries = [edit_with(i, IDS[i], delta) for i, delta in enumerate(deltas)]
    model.stack.set(entries)
    kept = [entry for entry in entries if entry.sequence in keep]
    model.stack.set(kept)
    left = model.parameters[NAME].detach().clone()
    model.stack.set([])
    assert torch.equal(model.parameters[NAME], base)
    for entry in kept:
        put_on(model.stack, entry)
    assert torch.equal(model.parameters[NAME], left)
    model.stack.set([])
    only = [e.delta for e in kept if isinstance(e.delta, SparseRowsDelta)]
    model.stack.set([e for e in kept if e.delta in only])
    total = base.float() + sum((whole(delta) for delta in only), torch.zeros(48, 32))
    torch.testing.assert_close(
        model.parameters[NAME].detach().float(), total.to(dtype).float(), rtol=1e-2, atol=1e-3
    )
    model.stack.set([])


@functools.cache
def cached(dtype: torch.dtype) -> Model:
    return build_model("gpt2", "nothing is kept here", dtype)


@pytest.mark.parametrize("axis", [0, 1])
def test_slices_of_a_difference_are_that_difference(axis: int) -> None:
    difference = torch.randn(48, 32, generator=torch.Generator().manual_seed(5))
    keep = torch.tensor([7, 3, 20])
    part = Rows.of(difference, keep, axis)
    assert part.index.tolist() == [3, 7, 20]
    out = torch.zeros_like(difference)
    part.add_to(out)
    gone = torch.ones(difference.shape[axis], dtype=torch.bool)
    gone[keep] = False
    expected = difference.clone()
    expected.movedim(axis, 0)[gone] = 0
    assert torch.equal(out, expected)


def test_it_is_stored_in_the_ledger_and_comes_back(tmp_path: Path) -> None:
    kinds = DeltaKinds()
    delta = rows(3, axis=1)
    with Ledger.open(tmp_path, kinds=kinds) as ledger:
        edit = commit(ledger, small_edit(kind="sparse_rows"), delta)
    with Ledger.open(tmp_path, kinds=kinds) as ledger:
        loaded = ledger.delta(edit.id)
    assert isinstance(loaded, SparseRowsDelta)
    assert loaded.metadata() == delta.metadata()
    assert all(torch.equal(t, loaded.tensors()[n]) for n, t in delta.tensors().items())
    assert delta.nbytes == 5 * 8 + 5 * 48 * 4


def test_what_is_damaged_is_refused() -> None:
    index, values = torch.tensor([1, 4]), torch.ones(2, 32)
    good = {"w:index": index, "w:values": values}
    SparseRowsDelta.from_parts(good, {"axis": {"w": 0}})
    bad: list[tuple[dict[str, torch.Tensor], dict[str, Any], str]] = [
        (good, {}, "list of parameters"),
        (good, {"axis": {"w": 2}}, "axis 2"),
        (good, {"axis": {"w": True}}, "axis True"),
        (good, {"axis": {"w": "0"}}, "axis '0'"),
        (good, {"axis": {"w": 0, "v": 0}}, "must hold"),
        ({"w:index": index}, {"axis": {"w": 0}}, "must hold"),
        ({}, {"axis": {}}, "at least one"),
        ({**good, "w:index": index.flip(0)}, {"axis": {"w": 0}}, "ascending"),
        ({**good, "w:index": torch.tensor([1, 1])}, {"axis": {"w": 0}}, "ascending"),
        ({**good, "w:index": torch.tensor([-1, 1])}, {"axis": {"w": 0}}, "ascending"),
        ({**good, "w:index": index.float()}, {"axis": {"w": 0}}, "int64"),
        ({**good, "w:index": torch.tensor([1])}, {"axis": {"w": 0}}, "each row"),
        ({**good, "w:index": index[:0], "w:values": values[:0]}, {"axis": {"w": 0}}, "each row"),
        ({**good, "w:values": values.long()}, {"axis": {"w": 0}}, "floating"),
        ({**good, "w:values": torch.ones(2)}, {"axis": {"w": 1}}, "axis 1"),
    ]
    for tensors, metadata, message in bad:
        with pytest.raises(IntegrityError, match=message):
            SparseRowsDelta.from_parts(tensors, metadata)


def test_another_model_s_rows_are_refused(model: Model) -> None:
    cases = [
        (Rows(torch.tensor([48]), torch.ones(1, 32)), "changes row 48"),
        (Rows(torch.tensor([0]), torch.ones(1, 31)), "rows of shape"),
        (Rows(torch.tensor([0]), torch.ones(1, 32), 1), "rows of shape"),
        (Rows(torch.tensor([0]), torch.ones(1)), "rows of shape"),
    ]
    for part, message in cases:
        with pytest.raises(IntegrityError, match=message):
            SparseRowsDelta({NAME: part}).check(model)
    nan = Rows(torch.tensor([0]), torch.full((1, 32), torch.nan))
    assert SparseRowsDelta({NAME: nan}).not_finite() == f"{NAME}:values"
    with pytest.raises(IntegrityError, match="does not have"):
        SparseRowsDelta({"nowhere": cases[0][0]}).check(model)
