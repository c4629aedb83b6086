"""Codebook deltas: the rules, replay, the index, storage."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from errata.errors import IntegrityError, MissingExtraError
from errata_grace import codebook as replayed
from errata_grace.codebook import Codebook, Entries
from errata_grace.delta import CodebookDelta
from errata_grace.entry import CodebookSettings

MODULE = "m"


def entry(
    key: Sequence[float], label: int | Sequence[int], value: float = 1.0, **options: object
) -> CodebookDelta:
    """An entry of a codebook with keys of any width and values of width one."""
    ids = [label] if isinstance(label, int) else list(label)
    ignored = int(options.pop("ignored", 0))  # type: ignore[call-overload]
    return CodebookDelta(
        MODULE,
        torch.tensor(key, dtype=torch.float32),
        torch.tensor([value]),
        torch.tensor(ids),
        CodebookSettings(**options),  # type: ignore[arg-type]
        ignored=ignored,
    )


def numbered(deltas: Sequence[CodebookDelta]) -> list[tuple[str, CodebookDelta]]:
    return [(f"{index}", delta) for index, delta in enumerate(deltas)]


def replay(entries: Entries) -> Codebook:
    """Return the codebook that entries of one make."""
    codebook = Codebook(entries[0][1].book)
    codebook.become(entries)
    return codebook


def rows_of(book: Codebook) -> dict[str, int]:
    """Return edit id → the row whose value it trained (−1: void)."""
    return {step.edit_id: step.row for step in book.log}


def same(one: Codebook, other: Codebook) -> bool:
    if len(one) == len(other) == 0:  # an empty one may or may not know its widths
        return rows_of(one) == rows_of(other)
    return (
        torch.equal(one.keys, other.keys)
        and torch.equal(one.values, other.values)
        and torch.equal(one.radii, other.radii)
        and rows_of(one) == rows_of(other)
        and [s.operation for s in one.log] == [s.operation for s in other.log]
    )


# -- the rules -----------------------------------------------------------------------------------


def test_a_far_key_is_added_with_the_initial_radius() -> None:
    book = replay(numbered([entry([0, 0], 1), entry([2.1, 0], 2)]))
    assert [s.operation for s in book.log] == ["add", "add"]
    assert book.radii.tolist() == [1.0, 1.0]


def test_the_same_answer_nearby_expands_the_ball_and_replaces_the_value() -> None:
    book = replay(numbered([entry([0, 0], 1, 5.0), entry([1.5, 0], 1, 7.0)]))
    assert [s.operation for s in book.log] == ["add", "expand"]
    assert book.radii.tolist() == [1.5]
    assert book.values.tolist() == [[7.0]]
    assert rows_of(book) == {"0": 0, "1": 0}


def test_the_same_answer_inside_the_ball_changes_the_value_only() -> None:
    book = replay(numbered([entry([0, 0], 1, 5.0), entry([0.5, 0], 1, 7.0)]))
    assert book.log[-1].operation == "retrain"
    assert book.radii.tolist() == [1.0]
    assert book.values.tolist() == [[7.0]]


def test_another_answer_nearby_splits_the_distance() -> None:
    for distance in (1.5, 0.5):  # outside and inside the radius
        book = replay(numbered([entry([0, 0], 1), entry([distance, 0], 2)]))
        assert book.log[-1].operation == "split"
        assert book.radii.tolist() == pytest.approx([distance / 2 - 1e-5, distance / 2], abs=1e-7)


def test_another_answer_to_the_very_same_prompt_supersedes_the_old_one() -> None:
    deltas = [entry([0, 0], 1, 5.0), entry([1.5, 0], 1, 6.0), entry([0, 0], 2, 7.0)]
    book = replay(numbered(deltas))
    assert book.log[-1].operation == "supersede"
    match = book.look_up(torch.tensor([[0.0, 0.0], [1.4, 0.0]]))
    assert book.values[match.rows].tolist() == [[7.0], [7.0]]  # it took over the whole ball
    assert match.inside.all()
    back = replay(numbered([*deltas, entry([0, 0], 1, 8.0)]))
    match = back.look_up(torch.tensor([[0.0, 0.0]]))
    assert back.values[match.rows].tolist() == [[8.0]]


def test_labels_are_compared_exactly_unless_asked_otherwise() -> None:
    one, other = [10, 20], [15, 15]  # the same mean
    assert not entry([0], one).same_label(entry([0], other))
    assert entry([0], one, label_match="upstream").same_label(entry([0], other))
    # The published mean runs over the ignored prompt as well.
    assert not entry([0], one, label_match="upstream", ignored=3).same_label(entry([0], one))


def test_a_void_entry_changes_nothing() -> None:
    void = CodebookDelta(MODULE, torch.zeros(2), None, torch.tensor([1]))
    book = replay(numbered([entry([0, 0], 1), void]))
    assert len(book) == 1
    assert rows_of(book) == {"0": 0, "1": -1}
    assert same(replay([("0", entry([0, 0], 1))]), replay([("0", entry([0, 0], 1))]))


def test_cosine_distance_does_not_see_length() -> None:
    options = {"distance": "cosine", "eps": 0.2}
    book = replay(numbered([entry([1, 0], 1, **options), entry([0, 3], 2, **options)]))
    assert [s.operation for s in book.log] == ["add", "add"]
    match = book.look_up(torch.tensor([[100.0, 1.0], [1.0, 1.0]]))
    assert match.inside.tolist() == [True, False]
    assert match.distances.tolist() == pytest.approx([1 - math.cos(0.01), 1 - 0.5**0.5], abs=1e-5)


def test_the_tolerance_covers_rounding_at_the_surface() -> None:
    book = replay(numbered([entry([10, 0], 1), entry([11.5, 0], 1)]))
    query = torch.tensor([[11.50001, 0.0]])
    assert not book.look_up(query).inside.item()
    assert book.look_up(query, 1e-5).inside.item()
    assert not book.look_up(torch.tensor([[11.51, 0.0]]), 1e-5).inside.item()


def test_an_empty_codebook_finds_nothing() -> None:
    book = Codebook(entry([0.0], 1).book)
    assert not book.look_up(torch.zeros(3, 1)).inside.any()
    assert len(book.keys) == len(book) == 0


# -- replay --------------------------------------------------------------------------------------

point = st.lists(st.integers(-6, 6).map(lambda n: n / 3), min_size=2, max_size=2)
logs = st.lists(st.tuples(point, st.integers(0, 2)), min_size=1, max_size=12)


def entries_of(log: list[tuple[list[float], int]]) -> list[tuple[str, CodebookDelta]]:
    return numbered([entry(key, label, float(i)) for i, (key, label) in enumerate(log)])


@settings(max_examples=150, deadline=None)
@given(logs, st.lists(st.integers(0, 11), max_size=6))
def test_taking_entries_out_gives_the_codebook_in_which_they_never_were(
    log: list[tuple[list[float], int]], removed: list[int]
) -> None:
    entries = entries_of(log)
    book = replay(entries)
    whole = replay(entries)
    for index in removed:
        entries = [e for e in entries if e[0] != str(index)]
        book.become(entries)
        fresh = Codebook(book.name)
        fresh.become(entries)
        assert same(book, fresh)
    book.become(entries_of(log))  # other objects with the same content: replayed, the same result
    assert same(book, whole)


@settings(max_examples=150, deadline=None)
@given(logs)
def test_taking_back_restores_every_radius_and_value(log: list[tuple[list[float], int]]) -> None:
    entries = entries_of(log)
    book = Codebook(entries[0][1].book)
    states = []
    for edit_id, delta in entries:
        states.append((book.radii.clone(), book.values.clone(), rows_of(book)))
        book.insert(edit_id, delta)
    for radii, values, rows in reversed(states):
        book.take_back()
        assert rows_of(book) == rows
        assert torch.equal(book.radii, radii)
        assert torch.equal(book.values.flatten(), values.flatten())


@settings(max_examples=150, deadline=None)
@given(logs)
def test_a_new_ball_is_disjoint_from_that_of_its_nearest_other_answer(
    log: list[tuple[list[float], int]],
) -> None:
    """What the published rules promise; balls further away may overlap (see the next test)."""
    book = Codebook(entry([0.0, 0.0], 0).book)
    for edit_id, delta in entries_of(log):
        near, distance = (t[0].item() for t in book.nearest(delta.key[None]))
        step = book.insert(edit_id, delta)
        if step.operation in ("add", "split") and near >= 0:
            assert float(book.radii[near] + book.radii[step.row]) <= distance + 1e-6
        match = book.look_up(delta.key[None], 1e-5)  # every edit finds its own value
        assert match.inside.item()
        assert book.values[match.rows].tolist() == [delta.value.tolist()]


def test_where_balls_overlap_the_nearest_key_decides() -> None:
    # The third key splits with the first; the second, a little further away, keeps its radius.
    book = replay(numbered([entry([0, 0], 1), entry([2.05, 0], 2), entry([1.0, 0.1], 3)]))
    assert [s.operation for s in book.log] == ["add", "add", "split"]
    assert book.radii[1] + book.radii[2] > (book.keys[1] - book.keys[2]).norm()
    queries = torch.tensor([[1.3, 0.1], [1.7, 0.0]])
    match = book.look_up(queries)
    assert match.rows.tolist() == [2, 1]
    assert match.inside.all()


def test_replay_takes_entries_of_one_codebook() -> None:
    with pytest.raises(IntegrityError, match="belongs to"):
        replay(numbered([entry([0.0], 1), entry([0.0], 1, distance="cosine")]))
    with pytest.raises(IntegrityError, match="does not fit"):
        replay(numbered([entry([0.0], 1), entry([0.0, 1.0], 1)]))


# -- the approximate index -----------------------------------------------------------------------


def crowd(index: str, count: int = 300, distance: str = "euclidean") -> Codebook:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, 16, generator=generator) * 3
    return replay(
        numbered(
            [
                entry(p.tolist(), i, float(i), index=index, faiss_from=50, distance=distance)
                for i, p in enumerate(points)
            ]
        )
    )


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_the_index_agrees_with_comparing_all(distance: str) -> None:
    pytest.importorskip("faiss")
    exact, approximate = crowd("exact", distance=distance), crowd("faiss", distance=distance)
    queries = exact.keys + 0.05 * torch.randn(300, 16, generator=torch.Generator().manual_seed(1))
    wanted, got = exact.look_up(queries), approximate.look_up(queries)
    assert torch.equal(wanted.rows, got.rows)
    assert torch.equal(wanted.inside, got.inside)
    assert torch.allclose(wanted.distances, got.distances, atol=1e-6)
    # It follows the codebook when entries go and come.
    for book in (exact, approximate):
        book.become([(s.edit_id, s.delta) for s in book.log[:200]])
        book.insert("new", entry([9.0] * 16, 999, 1.0, index="faiss", distance=distance))
    wanted, got = exact.look_up(queries[:250]), approximate.look_up(queries[:250])
    assert torch.equal(wanted.rows, got.rows)


def test_a_copy_of_an_indexed_codebook_changes_on_its_own() -> None:
    pytest.importorskip("faiss")
    book, exact = crowd("faiss"), crowd("exact")
    queries = exact.keys + 0.05
    wanted = book.look_up(queries)
    other, entries = book.copy(), [(s.edit_id, s.delta) for s in book.log]
    far = [(f"far {n}", entry([30.0 + n] * 16, 1000 + n, index="faiss")) for n in range(300)]
    for count in (1, 300):  # beside the index, and too many for that
        other.become([*entries, *far[:count]])
        found = other.look_up(torch.full((1, 16), 29.0 + count))
        assert found.rows.tolist() == [299 + count]
        assert torch.equal(other.look_up(queries).rows, wanted.rows)
        assert len(book) == 300
        assert not book.look_up(torch.full((1, 16), 29.0 + count)).inside.any()
    book.become(entries[:10])
    assert torch.equal(other.look_up(queries).rows, wanted.rows)
    few = crowd("exact", 10)
    assert torch.equal(book.look_up(queries).rows, few.look_up(queries).rows)


def test_the_index_looks_behind_retired_keys() -> None:
    pytest.importorskip("faiss")
    deltas = [entry([0.0, 0.0], n, float(n), index="faiss") for n in range(40)]
    match = replay(numbered(deltas)).look_up(torch.zeros(1, 2))
    assert match.rows.tolist() == [39]


def test_without_faiss_every_key_is_compared_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise MissingExtraError("An approximate codebook index", "faiss-cpu", "faiss")

    monkeypatch.setattr(replayed, "import_faiss", missing)
    for index in ("auto", "faiss"):
        caplog.clear()
        book, exact = crowd(index), crowd("exact")
        for _ in range(2):
            assert torch.equal(book.look_up(exact.keys).rows, exact.look_up(exact.keys).rows)
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "errata[faiss]" in caplog.text


# -- storage -------------------------------------------------------------------------------------


def test_parts_come_back_as_they_were() -> None:
    delta = CodebookDelta(
        "h.0", torch.rand(3), torch.rand(2), torch.tensor([4, 5]),
        CodebookSettings(replacement="replace_last", eps=0.5),
        ignored=7, label_text="Rome", notes={"loss": 0.5},
    )  # fmt: skip
    again = CodebookDelta.from_parts(delta.tensors(), delta.metadata())
    assert again.metadata() == delta.metadata()
    assert all(torch.equal(t, again.tensors()[n]) for n, t in delta.tensors().items())
    assert again.nbytes == 4 * 5 + 8 * 2
    void = CodebookDelta("h.0", torch.rand(3), None, torch.tensor([4]))
    assert CodebookDelta.from_parts(void.tensors(), void.metadata()).value is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {}}, "settings"),
        ({"settings": {**vars(CodebookSettings()), "distance": "manhattan"}}, "manhattan"),
        ({"settings": {**vars(CodebookSettings()), "eps": float("nan")}}, "eps"),
        ({"settings": {**vars(CodebookSettings()), "faiss_from": 0}}, "faiss_from"),
        ({"module": ""}, "module"),
        ({"module": 3}, "module"),
        ({"ignored": -1}, "ignored"),
        ({"notes": None}, "notes"),
    ],
)
def test_damaged_metadata_is_refused(change: dict[str, object], message: str) -> None:
    delta = entry([0.0], 1)
    with pytest.raises(IntegrityError, match=message):
        CodebookDelta.from_parts(delta.tensors(), {**delta.metadata(), **change})


def test_damaged_tensors_are_refused() -> None:
    delta = entry([0.0], 1)
    for change in (
        {"key": torch.zeros(1, 1)},
        {"value": torch.zeros(1, 1)},
        {"label": torch.zeros(1)},
        {"label": torch.zeros(0, dtype=torch.int64)},
        {"more": torch.zeros(1)},
    ):
        with pytest.raises(IntegrityError):
            CodebookDelta.from_parts({**delta.tensors(), **change}, delta.metadata())
