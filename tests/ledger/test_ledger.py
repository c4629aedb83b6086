"""The ledger: what was reported as done is there, whoever is killed, and nobody is overwritten."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import errata
from errata.edits.ledger import Ledger
from errata.edits.outcome import Efficacy, Outcome, TextPerplexity
from errata.errors import LedgerError, UnknownNameError
from tests.ledger.ledger_helpers import KINDS, add, commit, same_delta, small_delta, small_edit


@pytest.fixture(params=["folder", "memory"])
def ledger(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ledger]:
    where = tmp_path / "ledger" if request.param == "folder" else None
    with Ledger.open(where, kinds=KINDS) as opened:
        yield opened
        assert opened.verify() == []


# -- edits and events ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low_rank", "dense"])
def test_an_edit_comes_back_as_it_was_recorded(ledger: Ledger, kind: str) -> None:
    given, delta = small_edit("道の国", kind), small_delta(1, kind)
    stored = commit(ledger, given, delta)
    assert (stored.sequence, stored.nbytes) == (1, delta.nbytes)
    assert ledger.get(given.id) == stored == ledger.edits()[0]
    assert stored.model_copy(update={"sequence": 0, "blob": "", "nbytes": 0}) == given
    assert same_delta(ledger.delta(given.id), delta)


def test_edits_are_in_order_and_every_change_is_an_event(ledger: Ledger) -> None:
    first, second, third = add(ledger, 3)
    assert ledger.deactivate([third.id, first.id[:6]]) == [first.id, third.id]
    ledger.activate([third.id])
    assert [edit.sequence for edit in ledger.edits()] == [1, 2, 3]
    assert ledger.active_ids() == [second.id, third.id]
    assert not ledger.is_active(first.id)
    assert [(event.kind, event.edit_id) for event in ledger.events(3)] == [
        ("revert", first.id),
        ("revert", third.id),
        ("apply", third.id),
    ]
    assert [event.number for event in ledger.events()] == list(range(1, 10))
    assert ledger.head == 9
    assert ledger.events(2**70) == ledger.events()
    assert ledger.edits(2**70) == ledger.edits()
    assert ledger.edits(-(2**70)) == []


def test_an_edit_may_be_recorded_without_being_applied(ledger: Ledger) -> None:
    (edit,) = add(ledger, active=False)
    assert ledger.active_ids() == []
    ledger.activate([edit.id])
    assert ledger.active_ids() == [edit.id]


def test_applying_twice_or_reverting_twice_is_an_error_and_changes_nothing(ledger: Ledger) -> None:
    first, second = add(ledger, 2)
    ledger.deactivate([second.id])
    with pytest.raises(LedgerError, match="already active"):
        ledger.activate([second.id, first.id])
    with pytest.raises(LedgerError, match="not active"):
        ledger.deactivate([first.id, second.id])
    assert ledger.active_ids() == [first.id]


def test_several_edits_are_recorded_all_or_none(ledger: Ledger) -> None:
    (kept,) = add(ledger)
    head = ledger.head
    entries = [(small_edit("A"), small_delta(5), True), (kept, small_delta(6), True)]
    with pytest.raises(LedgerError, match=f"{kept.id} is in the ledger"):
        ledger.commit(entries)
    assert ledger.ids() == [kept.id]
    assert ledger.head == head == len(ledger.events())


def test_a_transaction_is_taken_back_whole_and_an_inner_change_alone(ledger: Ledger) -> None:
    first, second = add(ledger, 2)

    def fail_half_way() -> None:
        with ledger.transaction():
            ledger.deactivate([first.id])
            add(ledger)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    assert ledger.active_ids() == [first.id, second.id]
    with ledger.transaction():
        ledger.deactivate([first.id])
        with pytest.raises(LedgerError, match="already"):
            ledger.commit([(small_edit(), small_delta(5), True), (first, small_delta(6), True)])
        (third,) = add(ledger)
    assert ledger.ids() == [first.id, second.id, third.id]
    assert ledger.active_ids() == [second.id, third.id]
    assert ledger.head == len(ledger.events())


def test_measurements_are_kept_with_the_edit(ledger: Ledger) -> None:
    outcome = Outcome(
        efficacy=Efficacy(value=1.0, n=1, probability=(0.5,)),
        perplexity=TextPerplexity(value=float("inf"), ratio_to_base=float("inf")),
        overlaps={"a" * 12: 0.95},
    )
    edit = small_edit(outcome=outcome)
    commit(ledger, edit, small_delta(5))
    assert ledger.get(edit.id).outcome == outcome


def test_refusals_and_notes_are_kept_with_the_reason(ledger: Ledger) -> None:
    edit = small_edit()
    ledger.refuse(
        method="rome",
        requests=edit.requests,
        config={"layer": 3},
        reason="perplexity rose",
        measured={"ppl": float("nan"), "limit": 2.0},
    )
    ledger.note("model", {"name": "tiny"})
    (refused,) = ledger.refused()
    assert refused.detail["reason"] == "perplexity rose"
    assert refused.detail["measured"] == {"ppl": "nan", "limit": 2.0}
    assert refused.detail["requests"][0]["subject"] == "Veldonia"
    assert ledger.events(1)[0].detail == {"name": "tiny"}
    assert ledger.edits() == []
    for kind in ("edit", "Bad Kind", ""):
        with pytest.raises(LedgerError, match="no kind for a note"):
            ledger.note(kind, {})


def test_requests_are_found_by_digest_so_that_a_resumed_run_does_nothing_twice(
    ledger: Ledger,
) -> None:
    edits = add(ledger, 3)
    (again,) = ledger.commit([(small_edit("Land 2"), small_delta(9), False)])
    digests = [edit.requests[0].digest for edit in edits]
    assert ledger.find(digests[1:]) == {
        digests[1]: [edits[1].id, again.id],
        digests[2]: [edits[2].id],
    }
    assert ledger.find(["0" * 64]) == {}
    assert set(ledger.find()) == set(digests)
    assert len(ledger.find(digests + [f"{i:064x}" for i in range(2000)])) == 3


def test_an_edit_is_found_by_a_unique_beginning_of_its_id(ledger: Ledger) -> None:
    ids = ["aaaa00000001", "aaaa00000002", "bbbb00000003"]
    for seed, name in enumerate(ids):
        commit(ledger, small_edit(id=name), small_delta(seed))
    assert ledger.get("b").id == ids[2]
    with pytest.raises(UnknownNameError, match="give more digits") as caught:
        ledger.get("aaaa")
    assert caught.value.known == ids[:2]
    with pytest.raises(UnknownNameError, match=f"Did you mean '{ids[2]}'"):
        ledger.get("bbbb00000004")


def test_an_unknown_edit_among_thousands_gives_a_short_message(ledger: Ledger) -> None:
    add(ledger, 40)
    with pytest.raises(UnknownNameError, match="older ones") as caught:
        ledger.get("nonsense")
    assert len(str(caught.value)) < 400


def test_what_cannot_be_recorded_is_refused_by_name(ledger: Ledger) -> None:
    edit = small_edit().model_copy(update={"config": {"hook": {"fn": print}}})
    with pytest.raises(LedgerError, match=r"config\.hook\.fn"):
        commit(ledger, edit, small_delta(1))
    with pytest.raises(LedgerError, match="says its delta is 'low_rank'"):
        commit(ledger, small_edit(), small_delta(1, "dense"))
    assert ledger.events() == []


def test_a_kind_that_is_not_installed_is_named_and_the_record_stays_readable(
    tmp_path: Path,
) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        (edit,) = add(ledger)
    with Ledger.open(tmp_path, kinds={"dense": KINDS["dense"]}) as ledger:
        assert ledger.get(edit.id) == edit
        with pytest.raises(UnknownNameError, match="low_rank"):
            ledger.delta(edit.id)
        with pytest.raises(UnknownNameError, match="low_rank"):
            commit(ledger, small_edit(), small_delta(2))
        assert "low_rank" in ledger.verify()[0]


def test_a_ledger_opens_again_as_it_was_closed(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "new" / "ledger", kinds=KINDS) as ledger:
        edits = add(ledger, 3)
        ledger.deactivate([edits[1].id])
        events, head = ledger.events(), ledger.head
    ledger.close()
    with pytest.raises(LedgerError, match="closed"):
        ledger.edits()
    with Ledger.open(tmp_path / "new" / "ledger", kinds=KINDS) as ledger:
        assert ledger.edits() == edits
        assert ledger.active_ids() == [edits[0].id, edits[2].id]
        assert (ledger.events(), ledger.head) == (events, head)
        assert ledger.verify() == []


def test_reading_only_changes_nothing_and_needs_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="There is no ledger"):
        Ledger.open(tmp_path / "none", kinds=KINDS, readonly=True)
    assert not (tmp_path / "none").exists()
    with Ledger.open(tmp_path / "ledger", kinds=KINDS) as ledger:
        edits = add(ledger, 2)
        with Ledger.open(tmp_path / "ledger", readonly=True) as reader:
            assert reader.edits() == edits
            with pytest.raises(LedgerError, match="reading only"):
                reader.note("x", {})
            add(ledger)
            assert len(reader.edits()) == 3


def test_records_are_read_without_importing_torch(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        add(ledger)
    code = (
        "import sys; from errata.edits.ledger import Ledger\n"
        f"l = Ledger.open({str(tmp_path)!r}, readonly=True)\n"
        "assert len(l.edits()) == 1 and l.events() and 'torch' not in sys.modules"
    )
    core = str(Path(errata.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": core})


def test_every_edit_has_a_file_of_its_own_and_its_loss_is_no_other_ones(tmp_path: Path) -> None:
    with Ledger.open(tmp_path, kinds=KINDS) as ledger:
        first = commit(ledger, small_edit("A"), small_delta(1))
        second = commit(ledger, small_edit("B"), small_delta(1))
        paths = sorted((tmp_path / "blobs").glob("*/*.safetensors"))
        assert {path.stem for path in paths} == {first.blob, second.blob}
        (path,) = (path for path in paths if path.stem == first.blob)
        path.unlink()
        assert same_delta(ledger.delta(second.id), small_delta(1))
        (problem,) = ledger.verify()
        assert first.id in problem
