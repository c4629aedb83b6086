"""Key-value deltas: what they store, that they fold as one, and that no bit remembers."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errata.edits.delta import KeyValueDelta, KeyValues
from errata.edits.delta.joint_solve import BLOCK
from errata.edits.delta.low_rank import Factor, LowRankDelta
from errata.edits.edit import Edit
from errata.edits.ledger import Ledger
from errata.errors import IntegrityError
from errata.kit.metric import Metric, Whitening
from errata.kit.second_moments import second_moments
from errata.model import Model
from errata.model.artifacts import Artifacts
from errata.testing import edit_with, state_of
from errata.testing.contract import assert_same
from tests.families import SENTENCES, build_model, put_on, sampled, take_off
from tests.helpers import identity_metric

LAYER, OTHER = 1, 2
TEXT = [*SENTENCES, *(f"{a} {b}" for a, b in zip(SENTENCES, SENTENCES[3:], strict=False))]


def weight(model: Model, layer: int = LAYER) -> tuple[str, int, int, bool]:
    """Return (name, D, d, transposed) of a down projection."""
    path = model.anatomy.mlp_out(layer)
    d_out, d_in = model.anatomy.shape(model.module, path)
    return model.anatomy.weight(path), d_in, d_out, model.anatomy.transposed(path)


def make(
    model: Model,
    seed: int,
    keys: int = 1,
    *,
    layers: tuple[int, ...] = (LAYER,),
    metric: Metric | None = None,
    slack: float = 5.0,
    dtype: torch.dtype = torch.float64,
) -> KeyValueDelta:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for layer in layers:
        name, d_in, d_out, transposed = weight(model, layer)
        k = torch.randn(keys, d_in, generator=generator)
        use = metric or identity_metric(d_in)
        pairs[name] = KeyValues(
            k=k,
            w=use.whiten(k.T.double()).T.contiguous().to(dtype),
            r=torch.randn(keys, d_out, generator=generator),
            s=torch.full((keys,), slack, dtype=torch.float64),
            transposed=transposed,
            metric=use.reference,
        )
    return KeyValueDelta(pairs)


def reloaded(delta: KeyValueDelta) -> KeyValueDelta:
    return KeyValueDelta.from_parts(delta.tensors(), delta.metadata())


def entry(number: int, delta: KeyValueDelta | LowRankDelta) -> Edit:
    return edit_with(number + 1, f"{number:012x}", delta)


def put(model: Model, deltas: list[KeyValueDelta | LowRankDelta]) -> None:
    """Make these deltas, in this order, the active edits."""
    model.stack.set([])  # the stack tells edits by their ids, and these are numbered anew
    model.stack.set([entry(i, delta) for i, delta in enumerate(deltas)])


def fresh(directory: Path, family: str, entries: list[Edit]) -> dict[str, Tensor]:
    """Return every tensor of a new model with these edits read back from what is stored."""
    model = build_model(family, directory)
    model.stack.set([e.bind(reloaded(e.delta)) for e in entries])
    return state_of(model)


def change(model: Model, layer: int = LAYER) -> Tensor:
    """Return what the active edits add to a weight, (d, D) fp64."""
    name, _, _, transposed = weight(model, layer)
    difference = model.parameters[name].detach().double() - model.pristine[name].double()
    return difference.T if transposed else difference


# -- the fold ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_fold_is_the_joint_solution(family: str, tmp_path: Path) -> None:
    model = build_model(family, tmp_path, torch.float64, corpus=TEXT)
    C = second_moments(model, [LAYER], tokens="all")[LAYER]
    for count in (3, 60):  # below and above the width of the keys
        deltas = [make(model, i, 1 + i % 2, metric=Whitening(C), slack=7.0) for i in range(count)]
        name = weight(model)[0]
        K = torch.cat([d.pairs[name].k for d in deltas]).T.double()
        R = torch.cat([d.pairs[name].r for d in deltas]).T.double()
        wanted = torch.linalg.solve(7.0 * C.matrix + K @ K.T, K).mm(R.T).T
        put(model, deltas)
        assert float((change(model) - wanted).norm() / wanted.norm()) < 1e-9


def test_one_by_one_is_all_at_once_and_any_order(tmp_path: Path) -> None:
    one, many = (build_model("gpt2", tmp_path, torch.float64) for _ in range(2))
    deltas = [make(one, i, 2) for i in range(20)]
    for i, delta in enumerate(deltas):
        put_on(one.stack, entry(i, delta))
    name = weight(one)[0]
    parts = [delta.pairs[name] for delta in deltas]
    whole = KeyValueDelta(
        {
            name: KeyValues(
                *(torch.cat([getattr(p, part) for p in reversed(parts)]) for part in "kwrs"),
                transposed=parts[0].transposed,
                metric=parts[0].metric,
            )
        }
    )
    put_on(many.stack, entry(0, whole))
    assert float((change(one) - change(many)).norm() / change(many).norm()) < 1e-9


@pytest.mark.parametrize("family", sampled(["gpt2", "llama"], ("gpt2",)))
def test_whatever_was_done_before_the_bits_are_those_of_the_list(
    family: str, tmp_path: Path
) -> None:
    """Across the boundaries of blocks, and across the turn to the D × D form at D = 48 keys."""
    model = build_model(family, tmp_path)
    chance = random.Random(7)
    pool = [make(model, i, 1 + i % 3, layers=(LAYER, OTHER)[: 1 + i % 2]) for i in range(70)]
    active = list(range(40))
    model.stack.set([entry(i, pool[i]) for i in active])
    for _ in range(40):
        number = chance.randrange(len(pool))
        if number in active:
            active.remove(number)
            take_off(model.stack, f"{number:012x}")
        else:
            active = sorted([*active, number])
            put_on(model.stack, entry(number, pool[number]))
        assert_same(state_of(model), fresh(tmp_path, family, [entry(i, pool[i]) for i in active]))
        assert model.stack.differing() == []
    model.stack.set([])
    assert_same(state_of(model), state_of(build_model(family, tmp_path)))


def test_looking_at_one_edit_alone_disturbs_nothing(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    entries = [entry(i, make(model, i)) for i in range(BLOCK + 5)]
    model.stack.set(entries)
    before = state_of(model)
    with model.stack.temporarily(entries[3:4]):
        alone = state_of(model)
    assert_same(state_of(model), before)
    assert_same(alone, fresh(tmp_path, "gpt2", entries[3:4]))


def test_metrics_are_solved_apart_and_other_kinds_add(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, torch.float64, corpus=TEXT)
    C = second_moments(model, [LAYER], tokens="all")[LAYER]
    groups = [
        [make(model, i, metric=m) for i in range(4)] for m in (identity_metric(48), Whitening(C))
    ]
    parts = []
    for group in groups:
        put(model, group)
        parts.append(change(model))
    name, d_in, d_out, transposed = weight(model)
    u, v = torch.randn(d_out, 1).double(), torch.randn(d_in, 1).double()
    rank_one = LowRankDelta({name: Factor(u, v, transposed)})
    mixed = [*groups[1][:2], *groups[0], rank_one, *groups[1][2:]]
    put(model, mixed)
    torch.testing.assert_close(change(model), parts[0] + parts[1] + u @ v.T, atol=1e-9, rtol=1e-9)


def test_the_factors_are_the_change(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, torch.float64)
    name = weight(model)[0]
    for count, rank in ((3, 3), (70, 32)):
        deltas = [make(model, i) for i in range(count)]
        put(model, deltas)
        u, v = KeyValueDelta.joint_factors(name, deltas)
        assert u.shape[1] == v.shape[1] == rank
        torch.testing.assert_close((u @ v.T).double(), change(model), atol=1e-5, rtol=1e-5)


def test_narrower_whitened_keys_lose_little(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, torch.float64, corpus=TEXT)
    C = second_moments(model, [LAYER], tokens="all")[LAYER]
    wide, narrow = (
        [make(model, i, metric=Whitening(C), dtype=dtype) for i in range(10)]
        for dtype in (torch.float64, torch.float32)
    )
    put(model, wide)
    exact = change(model)
    put(model, narrow)
    assert 0 < float((change(model) - exact).norm() / exact.norm()) < 1e-5
    assert narrow[0].nbytes < 0.75 * wide[0].nbytes


def test_the_norm_is_of_the_edit_by_itself(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, torch.float64)
    name = weight(model)[0]
    delta = make(model, 0, 3)
    model.stack.set([entry(0, delta)])
    wanted = float(change(model).norm() / model.pristine[name].norm())
    assert delta.norms(model)[name] == pytest.approx(wanted)


# -- keys that meet ------------------------------------------------------------------------------


def test_cosines_are_those_of_the_metric(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    C = second_moments(model, [LAYER], tokens="all")[LAYER]
    first, second = (make(model, i, metric=Whitening(C)) for i in (0, 1))
    name = weight(model)[0]
    one, other = (d.pairs[name].k[0].double() for d in (first, second))
    inverse = torch.linalg.inv(C.matrix)
    wanted = (one @ inverse @ other) / ((one @ inverse @ one) * (other @ inverse @ other)).sqrt()
    apart = make(model, 0)  # another metric
    elsewhere = make(model, 0, metric=Whitening(C), layers=(OTHER,))
    found = first.cosines([second, first, apart, elsewhere])
    assert found == pytest.approx([float(wanted), 1.0, -1.0, -1.0], abs=1e-4)


def test_keys_that_only_keep_what_was_there_do_not_meet(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path, corpus=TEXT)
    name = weight(model)[0]
    first, second = make(model, 0), make(model, 1)
    near = first.cosines([second])[0]

    def beside(delta: KeyValueDelta, residual: float) -> KeyValueDelta:
        """Return a delta that has the second one's key as well, with a residual."""
        one, two = delta.pairs[name], second.pairs[name]
        parts = {part: torch.cat([getattr(one, part), getattr(two, part)]) for part in "kws"}
        r = torch.cat([one.r, torch.full_like(two.r, residual)])
        return KeyValueDelta({name: replace(one, **parts, r=r)})

    third = make(model, 2)
    assert beside(first, 0.0).cosines([beside(third, 0.0)])[0] < 0.9
    assert beside(first, 0.0).cosines([beside(third, 1.0)])[0] == pytest.approx(1, abs=1e-4)
    assert beside(first, 1.0).cosines([beside(third, 0.0)])[0] == pytest.approx(1, abs=1e-4)
    assert near < 0.9


# -- storage -------------------------------------------------------------------------------------


def test_it_needs_no_artifact_to_be_opened_again(tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path / "a", corpus=TEXT)
    C = second_moments(model, [LAYER], tokens="all")[LAYER]
    delta = make(model, 0, 2, metric=Whitening(C))
    model.stack.set([entry(0, delta)])
    expected = state_of(model)
    back = reloaded(delta)
    assert_same(back.tensors(), delta.tensors())
    assert back.metadata() == delta.metadata()
    assert back.nbytes == delta.nbytes
    assert back.metadata()["metric"][weight(model)[0]]["digest"] == C.digest
    other = build_model("gpt2", tmp_path / "b")
    assert isinstance(other.artifacts, Artifacts)
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    back.check(other)
    other.stack.set([entry(0, back)])
    assert_same(state_of(other), expected)
    assert Ledger.open(None, kinds={"key_value": KeyValueDelta}).verify() == []


def broken(part: str, change: Any) -> Any:
    def act(tensors: dict[str, Tensor], metadata: dict[str, Any], name: str) -> None:
        tensors[f"{name}:{part}"] = change(tensors[f"{name}:{part}"])

    return act


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (broken("k", lambda t: t[:, :-1]), "shapes"),
        (broken("w", lambda t: t[:1]), "shapes"),
        (broken("r", lambda t: t[0]), "shapes"),
        (broken("s", lambda t: t[:1]), "shapes"),
        (broken("k", lambda t: t.long()), "floating point"),
        (broken("s", lambda t: -t), "negative"),
        (broken("s", lambda t: t * float("nan")), "not a number"),
        (broken("k", torch.zeros_like), "nothing can be written"),
        (broken("w", lambda t: -t), "nothing can be written"),
        (lambda t, m, n: t.pop(f"{n}:k"), "must hold the tensors"),
        (lambda t, m, n: m.pop("metric"), "list of parameters"),
        (lambda t, m, n: m.update(metric={n: {"digest": 3}}), "by a digest"),
        (lambda t, m, n: m.update(metric={"other": {"digest": "x"}}), "by a digest"),
        (lambda t, m, n: (t.clear(), m.update(metric={}, transposed={})), "at least one"),
    ],
)
def test_damage_is_found(act: Any, says: str, tmp_path: Path) -> None:
    model = build_model("gpt2", tmp_path)
    delta = make(model, 0, 2)
    tensors, metadata = delta.tensors(), delta.metadata()
    act(tensors, metadata, weight(model)[0])
    with pytest.raises(IntegrityError, match=says):
        KeyValueDelta.from_parts(tensors, metadata)


def test_it_must_fit_the_model(tmp_path: Path) -> None:
    delta = make(build_model("gpt2", tmp_path), 0)
    with pytest.raises(IntegrityError, match="does not have"):
        delta.check(build_model("llama", tmp_path))
    name, d_in, d_out, transposed = weight(build_model("gpt2", tmp_path))
    pair = KeyValues(
        torch.ones(1, d_out), torch.ones(1, d_out), torch.ones(1, d_in), torch.ones(1), transposed
    )
    with pytest.raises(IntegrityError, match="shape"):
        KeyValueDelta({name: pair}).check(build_model("gpt2", tmp_path))
    tensors = delta.tensors()
    tensors[f"{name}:r"] = tensors[f"{name}:r"] * float("inf")
    assert delta.not_finite() is None
    assert KeyValueDelta.from_parts(tensors, delta.metadata()).not_finite() == f"{name}:r"
