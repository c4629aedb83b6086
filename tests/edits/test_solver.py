"""The least-squares solver: the identities of its algebra, and bits that forget the past."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errata.edits.delta.joint_solve import BLOCK, RIDGE, JointSolve, KeyRows
from errata.errors import ConfigError, IntegrityError
from errata.kit.closed_form.matrices import Columns, I, NormalMatrix, inverse
from errata.kit.metric import Metric, Projection, Whitening
from errata.kit.null_space import null_space
from errata.kit.second_moments import SecondMoment
from tests.families import build_model
from tests.helpers import identity_metric


def moment(size: int, seed: int = 0, tokens: int | None = None) -> SecondMoment:
    """Return C of random keys with unequal scales."""
    random = torch.Generator().manual_seed(seed)
    tokens = tokens or 5 * size
    keys = torch.randn(size, tokens, generator=random, dtype=torch.float64)
    keys *= torch.linspace(0.3, 2.0, size, dtype=torch.float64)[:, None]
    return SecondMoment(keys @ keys.T / tokens, tokens, 0)


def problem(size: int, out: int, keys: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Return K (D, N) and R (d, N)."""
    random = torch.Generator().manual_seed(seed)
    K = torch.randn(size, keys, generator=random, dtype=torch.float64)
    return K, torch.randn(out, keys, generator=random, dtype=torch.float64)


def rows(metric: Metric, K: Tensor, R: Tensor, slack: float) -> KeyRows:
    s = torch.full(K.shape[1:], slack, dtype=torch.float64)
    return KeyRows(K.T.contiguous(), metric.whiten(K).T.contiguous(), R.T.contiguous(), s)


def right(metric: Metric, K: Tensor, slack: float, *, each: bool = False) -> Tensor:
    """Return V (D, N) of Δ = R Vᵀ, by MEMIT's formula."""
    keys = Columns.of(K.T, each=each)
    return (keys @ keys.T @ inverse(slack * NormalMatrix(metric) + keys @ keys.T)).factors[1]


def joint(rows: KeyRows) -> Tensor:
    solver = JointSolve(rows.k.shape[1], rows.r.shape[1])
    solver.extend(rows)
    return solver.change


def pick(rows: KeyRows, index: list[int]) -> KeyRows:
    return KeyRows(*(part[index] for part in rows))


def relative(given: Tensor, expected: Tensor) -> float:
    return float((given - expected).norm() / expected.norm())


# -- the algebra ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [1, 7, 40, 41, 150, 400])
@pytest.mark.parametrize("slack", [0.5, 20.0, 15000.0])
def test_it_is_the_papers_formula(keys: int, slack: float) -> None:
    """Below, at and above the width of the keys: N × N and D × D agree with R Kᵀ(λC + KKᵀ)⁻¹."""
    C = moment(40)
    K, R = problem(40, 11, keys)
    direct = torch.linalg.solve(slack * C.matrix + K @ K.T, K).mm(R.T).T
    assert relative(R @ right(Whitening(C), K, slack).T, direct) < 1e-9
    assert relative(joint(rows(Whitening(C), K, R, slack)), direct) < 1e-9
    # EMMET's, with a ridge, is the same thing.
    k, r, M = Columns.of(K.T), Columns.of(R.T), inverse(NormalMatrix(Whitening(C)))
    u, v = (r @ inverse(k.T @ M @ k + slack * I) @ k.T @ M).factors
    assert relative(u @ v.T, direct) < 1e-9


def test_the_reduced_form_is_alphaedits_full_one(tmp_path) -> None:
    C = moment(40)
    space = null_space(build_model("gpt2", tmp_path), C, fraction=0.4)
    P = space.basis @ space.basis.T
    past, _ = problem(40, 1, 30, seed=5)
    for keys in (9, 70):  # fewer and more than the 16 directions kept
        K, R = problem(40, 11, keys)
        everything = torch.cat([past, K], 1)
        k, r, k_p = Columns.of(K.T), Columns.of(R.T), Columns.of(past.T)
        full = torch.linalg.solve(
            P @ (everything @ everything.T) + 0.3 * torch.eye(40).double(), P @ K @ R.T
        ).T
        M = Projection(space)
        u, v = (r @ k.T @ M @ inverse(k_p @ k_p.T @ M + k @ k.T @ M + 0.3 * I)).factors
        assert relative(u @ v.T, full) < 1e-9
        # Joined, earlier keys are keys that want nothing.
        zeros = torch.cat([torch.zeros(11, 30).double(), R], 1)
        assert relative(joint(rows(Projection(space), everything, zeros, 0.3)), full) < 1e-9


@given(
    seed=st.integers(0, 1000),
    keys=st.integers(1, 60),
    slack=st.sampled_from([1.0, 50.0]),
    data=st.data(),
)
def test_order_and_batches_do_not_matter(
    seed: int, keys: int, slack: float, data: st.DataObject
) -> None:
    metric = Whitening(moment(24))
    K, R = problem(24, 5, keys, seed)
    whole = rows(metric, K, R, slack)
    delta = joint(whole)
    order = data.draw(st.permutations(range(keys)))
    assert relative(joint(pick(whole, order)), delta) < 1e-9
    # In sequence: each step writes, on top of what is there, what is missing at its own keys, and
    # asks the earlier keys for nothing more.
    cut = data.draw(st.integers(0, keys))
    first = R[:, :cut] @ right(metric, K[:, :cut], slack).T if cut else torch.zeros_like(delta)
    if cut < keys:
        # Recursive least squares: W₂ = W₁ + (R₂ − W₁K₂) K₂ᵀ (λC + KKᵀ)⁻¹ over all keys.
        left = R[:, cut:] - first @ K[:, cut:]
        first = first + left @ right(metric, K, slack)[:, cut:].T
    assert relative(first, delta) < 1e-9


@given(seed=st.integers(0, 1000), keys=st.integers(2, 60), data=st.data())
def test_removed_is_never_made(seed: int, keys: int, data: st.DataObject) -> None:
    metric = Whitening(moment(24))
    K, R = problem(24, 5, keys, seed)
    gone = data.draw(st.integers(0, keys - 1))
    left = [index for index in range(keys) if index != gone]
    never = R[:, left] @ right(metric, K[:, left], 3.0).T
    # The information form: take the key's own terms out of the normal equations of all.
    C = moment(24).matrix
    M = 3.0 * C + K @ K.T - torch.outer(K[:, gone], K[:, gone])
    B = R @ K.T - torch.outer(R[:, gone], K[:, gone])
    assert relative(torch.linalg.solve(M, B.T).T, never) < 1e-9
    assert relative(joint(pick(rows(metric, K, R, 3.0), left)), never) < 1e-9


def test_a_key_alone_is_a_batch_of_one() -> None:
    metric = Whitening(moment(24))
    K, _ = problem(24, 5, 4)
    for index in range(4):
        column = right(metric, K[:, [index]], 7.0)
        torch.testing.assert_close(right(metric, K, 7.0, each=True)[:, [index]], column)


def test_a_formula_that_has_no_such_form_is_refused() -> None:
    """Two kinds of keys, P on one side only, λ in the wrong place: each would be another matrix."""
    K, other = (Columns.of(problem(24, 5, 3, seed)[0].T) for seed in (1, 2))
    C, P = NormalMatrix(Whitening(moment(24))), identity_metric(24)
    with pytest.raises(ValueError, match="same K"):
        _ = (K.T @ inverse(3.0 * C + other @ other.T)).rows
    with pytest.raises(ValueError, match="both sides"):
        _ = K.T @ inverse(K @ K.T @ P + 2.0 * I)
    with pytest.raises(ValueError, match="same P"):
        _ = 3.0 * C + K @ other.T
    with pytest.raises(ValueError, match="can be scaled"):
        _ = 3.0 * (C + K @ K.T)
    with pytest.raises(ValueError, match="add λ C"):
        _ = C + K @ K.T + 2.0 * I


# -- constraints ---------------------------------------------------------------------------------


def test_without_slack_the_constraints_are_met() -> None:
    for metric in (Whitening(moment(40)), identity_metric(40)):
        K, R = problem(40, 11, 25)
        assert relative(joint(rows(metric, K, R, 0.0)) @ K, R) < 1e-6
    # And of all changes that meet them it is the cheapest, tr(Δ C Δᵀ): EMMET's closed form.
    C = moment(40).matrix
    W = torch.linalg.solve(C, K)
    emmet = R @ torch.linalg.solve(K.T @ W, W.T)
    assert relative(joint(rows(Whitening(moment(40)), K, R, 0.0)), emmet) < 1e-6


def test_equal_keys_with_different_residuals_meet_half_way() -> None:
    metric = Whitening(moment(20))
    k, R = problem(20, 6, 2)
    K = k[:, :1].repeat(1, 2)
    for slack in (0.0, 5.0):
        delta = joint(rows(metric, K, R, slack))
        assert torch.isfinite(delta).all()
        got = delta @ K[:, 0]
        wanted = R.mean(1)
        own = float(K[:, 0] @ metric.whiten(K)[:, 0])
        torch.testing.assert_close(got, wanted * own / (own + slack / 2), rtol=1e-5, atol=1e-6)


def test_more_constraints_than_dimensions_are_met_as_well_as_they_can_be() -> None:
    metric = identity_metric(12)
    K, R = problem(12, 4, 90)
    size = K.norm(dim=0)  # misses count relative to each key's own kᵀ M k
    least = torch.linalg.lstsq((K / size).T, (R / size).T).solution.T
    assert relative(joint(rows(metric, K, R, 0.0)), least) < 1e-5


def test_what_is_not_finite_is_an_error() -> None:
    bad = rows(identity_metric(8), *problem(8, 3, 2), 1.0)
    bad.k[0, 0] = float("nan")
    with pytest.raises(IntegrityError, match="not finite"):
        joint(bad)


# -- bits ----------------------------------------------------------------------------------------


@given(
    width=st.sampled_from([5, 48, 100]),
    start=st.integers(1, 3 * BLOCK),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 10**6)), max_size=8),
)
def test_the_result_is_a_function_of_the_list_of_keys(
    width: int, start: int, steps: list[tuple[bool, int]]
) -> None:
    """Whatever was appended and removed before, also across the turn to the D × D form."""
    K, R = problem(width, 7, 5 * BLOCK)
    everything = rows(identity_metric(width), K, R, 2.0)
    present = list(range(start))
    solver = JointSolve(width, 7)
    solver.extend(pick(everything, present))
    for remove, number in steps:
        if remove and len(present) > 1:
            place = number % len(present)
            del present[place]
            solver.truncate(place)
        else:
            absent = sorted(set(range(5 * BLOCK)) - set(present))
            new = absent[number % len(absent)]
            present = sorted([*present, new])
            solver.truncate(present.index(new))
        wanted = pick(everything, present)
        solver.extend(pick(wanted, list(range(solver.count, len(present)))))
        delta = solver.change
        assert torch.equal(delta, joint(wanted))
        if solver.factors is not None:
            u, v = solver.factors
            torch.testing.assert_close(u @ v.T, delta)


def test_the_accumulated_form_stays_accurate() -> None:
    C = moment(30)
    K, R = problem(30, 8, 40 * BLOCK)
    for slack in (0.1, 100.0):
        direct = torch.linalg.solve(slack * C.matrix + K @ K.T, K).mm(R.T).T
        assert relative(joint(rows(Whitening(C), K, R, slack)), direct) < 1e-8


# -- metrics -------------------------------------------------------------------------------------


def test_metrics_are_told_apart(tmp_path) -> None:
    model = build_model("gpt2", tmp_path)
    C, other = moment(20), moment(20, seed=3)
    spaces = [null_space(model, C, fraction=f) for f in (0.3, 0.5)]
    metrics = [Whitening(C), Whitening(other), *map(Projection, spaces), identity_metric(20)]
    assert len({metric.reference["digest"] for metric in metrics}) == len(metrics)
    assert Whitening(moment(20)).reference == Whitening(C).reference
    for metric in metrics:
        K, _ = problem(20, 1, 3)
        torch.testing.assert_close(metric.whiten(K), metric.expand(metric.reduce(K)))
    torch.testing.assert_close(C.matrix @ Whitening(C).whiten(K), K)


def test_the_null_space_holds_the_smallest_eigenvalues(tmp_path) -> None:
    model, C = build_model("gpt2", tmp_path), moment(40)
    values = torch.linalg.eigvalsh(C.matrix)
    by_number = null_space(model, C, fraction=0.25)
    assert (by_number.rank, by_number.size) == (10, 40)
    assert values[9] < by_number.threshold < values[10]
    by_size = null_space(model, C, threshold=by_number.threshold)
    torch.testing.assert_close(by_size.basis, by_number.basis)
    passed = (by_number.basis.T @ C.matrix @ by_number.basis).trace() / C.matrix.trace()
    assert by_number.energy == pytest.approx(float(passed))
    again = null_space(build_model("gpt2", tmp_path), C, fraction=0.25)  # read from the artifact
    assert torch.equal(again.basis, by_number.basis)
    assert {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*.safetensors")} == {
        "spectrum"
    }


@pytest.mark.parametrize(
    "given", [{}, {"threshold": 1.0, "fraction": 0.5}, {"threshold": 1e-30}, {"fraction": 1e-3}]
)
def test_a_null_space_of_nothing_is_refused(given: dict[str, float], tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"give one of them|keeps 0 of 40"):
        null_space(build_model("gpt2", tmp_path), moment(40), **given)


def test_a_moment_of_too_few_tokens_gets_a_ridge(caplog: pytest.LogCaptureFixture) -> None:
    C = moment(30, tokens=10)
    metric = Whitening(C)
    K, R = problem(30, 4, 6)
    assert torch.isfinite(joint(rows(metric, K, R, 1.0))).all()
    assert "singular" in caplog.text
    assert metric.reference["ridge"] == C.ridge > 0
    assert RIDGE < 1e-6
