"""Edits about one fact, keys that meet, and edits that were made on top of others."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch

from errata import Editor, Request, hookimpl
from errata.edits.edit import new_id
from errata.edits.outcome import Outcome
from errata.errors import (
    ConfigError,
    EditRefused,
    LedgerError,
    PluginError,
    UnknownNameError,
)
from errata.testing import state_of
from errata.testing.contract import assert_same
from tests.families import build

pytestmark = pytest.mark.usefixtures("toys")
QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}


def lives(subject: str, place: str) -> Request:
    return Request(prompt="{} lives in", subject=subject, target_new=place, relation="P551")


def open_editor(ledger: Path | None = None, **options: object) -> Editor:
    module, tokenizer = build("gpt2")
    return Editor(module, tokenizer, ledger=ledger, **{"guards": QUIET, **options})


@pytest.fixture
def editor() -> Editor:
    with open_editor() as editor:
        yield editor


# -- supersede -----------------------------------------------------------------------------------


def test_a_new_answer_takes_the_old_one_off(tmp_path: Path) -> None:
    with open_editor(tmp_path) as editor:
        base = state_of(editor.model)
        old = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
        with_old = state_of(editor.model)
        other = editor.edit(lives("Alan", "Lima"), method="toy-low-rank")
        new = editor.edit(lives("Ada", "Oslo"), method="toy-low-rank", supersede=True)
        assert editor.model.stack.ids == [other.id, new.id]
        assert new.outcome.supersedes == (old.id,)
        assert not new.outcome.conflicts
        assert new.parents == (other.id,), "computed on the model that it is for"
        kinds = [(event.kind, event.edit_id) for event in editor.ledger.events()][-4:]
        assert kinds[0] == ("revert", old.id)
        assert ("supersede", old.id) in kinds
        assert editor.verify() == []
        editor.revert(other)
        editor.revert(new, restore=True)
        assert editor.model.stack.ids == [old.id]
        assert_same(state_of(editor.model), with_old)
        assert editor.verify() == []
        editor.revert(old)
        assert_same(state_of(editor.model), base)
    with open_editor(tmp_path) as again:
        assert again.verify() == []
        assert again.ledger.events()[-1].kind == "revert"


PEOPLE = ("Ada", "Alan", "Grace")


@pytest.mark.parametrize("method", ["toy-low-rank", "toy-key-value"])
def test_each_edit_of_a_call_supersedes_what_is_about_its_own_fact(
    editor: Editor, method: str
) -> None:
    old = editor.edit([lives(name, "Rome") for name in PEOPLE], method=method)
    new = editor.edit([lives(name, "Oslo") for name in PEOPLE], method=method, supersede=True)
    assert [edit.outcome.supersedes for edit in new] == [(edit.id,) for edit in old]
    notes = [event for event in editor.ledger.events() if event.kind == "supersede"]
    assert {e.edit_id: e.detail["by"] for e in notes} == {
        one.id: [other.id] for one, other in zip(old, new, strict=True)
    }
    editor.revert(new[0], restore=True)
    assert editor.model.stack.ids == [old[0].id, new[1].id, new[2].id]
    assert editor.verify() == []


def of_an_older_ledger(path: Path) -> tuple[list[str], list[str]]:
    """Record edits as earlier versions did: each names all that its call superseded."""
    with open_editor(path) as editor:
        old = editor.edit([lives(name, "Rome") for name in PEOPLE], method="toy-low-rank")
        ids = tuple(edit.id for edit in old)
        editor.revert(*ids)
        editor.edit([lives(name, "Oslo") for name in PEOPLE], method="toy-low-rank")
        new = [e.bind(e.delta, id=new_id(), outcome=Outcome(supersedes=ids)) for e in
               editor.model.stack.entries]  # fmt: skip
        editor.revert(*editor.model.stack.ids)
        editor.ledger.commit([(edit, edit.delta, True) for edit in new])
        for name in ids:
            editor.ledger.note("supersede", {"by": [edit.id for edit in new]}, name)
    return list(ids), [edit.id for edit in new]


def test_of_an_older_ledger_only_what_is_about_the_same_fact_comes_back(tmp_path: Path) -> None:
    old, new = of_an_older_ledger(tmp_path)
    with open_editor(tmp_path) as editor:
        editor.revert(new[1], restore=True)
        assert editor.model.stack.ids == [old[1], new[0], new[2]]


def test_what_another_active_edit_is_about_stays_off(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    both = editor.edit([lives("Ada", "Rome"), lives("Alan", "Rome")], method="toy-dense")[0]
    asked = [lives("Ada", "Oslo"), lives("Alan", "Oslo")]
    one, two = editor.edit(asked, method="toy-low-rank", supersede=True)
    assert one.outcome.supersedes == two.outcome.supersedes == (both.id,)
    editor.revert(one, restore=True)
    assert editor.model.stack.ids == [two.id]
    assert f"Not put back: {both.id}. Another active edit is about the same fact" in caplog.text
    editor.apply(one)
    editor.revert(one, two, restore=True)
    assert editor.model.stack.ids == [both.id]


def test_an_edit_made_again_restores_what_the_one_before_it_had_superseded(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    old = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    new = editor.edit(lives("Ada", "Oslo"), method="toy-low-rank", supersede=True)
    (once,) = editor.rebase(new)
    (twice,) = editor.rebase(once)
    editor.revert(twice, restore=True)
    assert editor.model.stack.ids == [old.id]
    assert "put back" not in caplog.text
    editor.revert(old, restore=True)
    assert editor.model.stack.ids == []
    assert f"Nothing was put back: {old.id} superseded no edit" in caplog.text


def test_reverting_alone_leaves_what_was_superseded_off(editor: Editor) -> None:
    base = state_of(editor.model)
    editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    new = editor.edit(lives("Ada", "Oslo"), method="toy-low-rank", supersede=True)
    editor.revert(new)
    assert editor.model.stack.ids == []
    assert_same(state_of(editor.model), base)
    assert not any(entry.active for entry in editor.log())


def test_the_same_answer_again_replaces_it_too(editor: Editor) -> None:
    old = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    again = editor.edit(lives("Ada", "Rome"), method="toy-dense", supersede=True)
    assert editor.model.stack.ids == [again.id]
    assert again.outcome.supersedes == (old.id,)


def test_one_name_in_two_unicode_forms_is_one_subject(editor: Editor) -> None:
    composed, taken_apart = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))
    assert composed != taken_apart
    old = editor.edit(lives(composed, "Rome"), method="toy-low-rank")
    both = editor.edit(lives(taken_apart, "Oslo"), method="toy-low-rank")
    assert both.outcome.conflicts == (old.id,)
    new = editor.edit(lives(taken_apart, "Lima"), method="toy-low-rank", supersede=True)
    assert editor.model.stack.ids == [new.id]
    assert new.outcome.supersedes == (old.id, both.id)


def test_several_edits_are_put_on_as_one_or_not_at_all(editor: Editor) -> None:
    first, second = (
        editor.edit(lives(name, "Rome"), method="toy-low-rank") for name in ("Ada", "Alan")
    )
    editor.revert(first)
    with pytest.raises(LedgerError, match=f"{second.id}: already active"):
        editor.apply(first, second)
    assert editor.model.stack.ids == [second.id]
    editor.revert(second)
    assert [edit.id for edit in editor.apply(second, first, second)] == [second.id, first.id]
    assert sorted(editor.model.stack.ids) == sorted([first.id, second.id])
    assert editor.verify() == []


def test_without_an_older_answer_nothing_is_superseded(editor: Editor) -> None:
    other = editor.edit(lives("Alan", "Rome"), method="toy-low-rank")
    new = editor.edit(lives("Ada", "Oslo"), method="toy-low-rank", supersede=True)
    assert editor.model.stack.ids == [other.id, new.id]
    assert not new.outcome.supersedes


def test_a_refusal_brings_the_old_one_back(tmp_path: Path) -> None:
    with open_editor(tmp_path, guards={**QUIET, "norm": "refuse", "norm_limit": 1e3}) as editor:
        old = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
        before = state_of(editor.model)
        for bad, error in (("toy-nan", EditRefused), ("toy-raises", PluginError)):
            with pytest.raises(error):
                editor.edit(lives("Ada", "Oslo"), method=bad, supersede=True)
            assert editor.model.stack.ids == [old.id]
            assert_same(state_of(editor.model), before)
            assert editor.verify() == []


def test_part_of_an_edit_cannot_be_superseded(editor: Editor) -> None:
    both = editor.edit([lives("Ada", "Rome"), lives("Alan", "Rome")], method="toy-dense")
    before = state_of(editor.model)
    with pytest.raises(LedgerError, match=r"2 requests.*1 of them.*Alan"):
        editor.edit(lives("Ada", "Oslo"), method="toy-dense", supersede=True)
    with pytest.raises(ConfigError, match="apply=False"):
        editor.edit(lives("Ada", "Oslo"), method="toy-dense", supersede=True, apply=False)
    assert editor.model.stack.ids == [both[0].id]
    assert_same(state_of(editor.model), before)


def test_joint_edits_are_superseded_as_if_the_old_one_was_never_made(editor: Editor) -> None:
    fields = {"method": "toy-key-value"}
    old = editor.edit(lives("Ada", "Rome"), **fields)
    other = editor.edit(lives("Alan", "Lima"), **fields)
    new = editor.edit(lives("Ada", "Oslo"), **fields, supersede=True)
    assert old.id not in editor.model.stack.ids
    with open_editor() as fresh:
        for edit in (other, new):
            fresh.ledger.commit([(edit, edit.delta, True)])
        fresh.refresh()
        assert_same(state_of(fresh.model), state_of(editor.model))


# -- what is one fact ------------------------------------------------------------------------------


def joins(place: str, operation: str = "add", **more: object) -> Request:
    answer = "target_true" if operation == "delete" else "target_new"
    fields = {
        "prompt": f"The relation between {{}} and {place} is",
        "subject": "Ada",
        "relation": "P551",
        "kind": "relation",
        "operation": operation,
        answer: "home",
        **more,
    }
    return Request.parse(fields)


def both(new: str, old: str) -> Request:
    return joins(new, "both", remove=f"The relation between {{}} and {old} is")


def erased(answer: str | None = None, **more: object) -> Request:
    fields = {"prompt": "{} lives in", "subject": "Ada", "relation": "P551", "kind": "erase"}
    return Request.parse({**fields, "target_true": answer, **more})


@pytest.mark.parametrize(
    ("first", "second", "one_fact", "conflict"),
    [
        (lives("Ada", "Rome"), lives("Ada", "Oslo"), True, True),
        (lives("Ada", "Rome"), lives("Ada", "Rome").model_copy(update={"aliases": ("Roma",)}),
         True, False),
        (joins("Rome"), joins("Oslo", "delete"), False, False),
        (joins("Rome"), joins("Rome", "delete"), True, True),
        (joins("Rome", "delete"), joins("Rome"), True, True),
        (joins("Rome"), joins("Oslo"), False, False),
        (joins("Rome"), joins("Rome", target_new="birthplace"), True, True),
        (joins("Rome", target_new="birthplace"), joins("Rome", "delete"), True, False),
        (both("Rome", "Oslo"), both("Lima", "Rome"), True, True),
        (both("Rome", "Oslo"), joins("Rome"), True, False),
        (both("Rome", "Oslo"), joins("Oslo"), True, True),
        (lives("Ada", "Rome"), joins("Rome"), False, False),
        (lives("Ada", "Rome"), erased("Rome"), True, True),
        (lives("Ada", "Rome"), erased("Oslo"), True, False),
        (lives("Ada", "Rome"), erased(), True, True),
        (erased("Rome"), erased("Rome", target_new="I do not know"), True, False),
        (lives("Ada", "Rome"), erased("Oslo", target_new="I do not know"), True, True),
    ],
)  # fmt: skip
def test_which_requests_contradict_each_other(
    editor: Editor, first: Request, second: Request, one_fact: bool, conflict: bool
) -> None:
    old = editor.edit(first, method="toy-low-rank")
    new = editor.edit(second, method="toy-low-rank", apply=False)
    assert new.outcome.conflicts == ((old.id,) if conflict else ())
    later = editor.edit(second, method="toy-low-rank", supersede=True)
    assert later.outcome.supersedes == ((old.id,) if one_fact else ())


# -- keys that meet ------------------------------------------------------------------------------


def test_keys_that_hardly_differ_are_reported(
    editor: Editor, caplog: pytest.LogCaptureFixture
) -> None:
    fields = {"method": "toy-key-value"}
    first = editor.edit(lives("Ada", "Rome"), **fields)
    apart = editor.edit(lives("Alan", "Rome"), **fields)
    caplog.clear()
    # The toy's key is that of the subject: the same one, in another relation.
    close = editor.edit("{} sings in", subject="Ada", target_new="Oslo", **fields)
    assert close.outcome.overlaps == {first.id: pytest.approx(1.0, abs=1e-3)}
    assert not close.outcome.conflicts
    assert first.id in caplog.text
    assert apart.id not in caplog.text
    log = {entry.edit.id: entry for entry in editor.log()}
    assert log[close.id].overlaps == (first.id,)
    assert log[apart.id].overlaps == ()
    # A contradiction is reported as that, once.
    worse = editor.edit(lives("Ada", "Lima"), **fields)
    assert worse.outcome.conflicts == (first.id,)
    assert first.id not in worse.outcome.overlaps


# -- rebase --------------------------------------------------------------------------------------


class Counting:
    """An observer: computes a change from how many edits are on the model."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    @hookimpl(wrapper=True)
    def edit(self, model: object, requests: object, config: object) -> object:
        self.seen.append(list(model.stack.ids))
        return (yield)


def test_what_was_made_on_top_of_a_reverted_edit_is_stale_until_rebased(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    observer = Counting()
    with open_editor(tmp_path, observers=[observer]) as editor:
        one, two, three = (
            editor.edit(lives(name, "Rome"), method="toy-low-rank")
            for name in ("Ada", "Alan", "Grace")
        )
        assert not any(entry.stale for entry in editor.log())
        assert "Stale" not in caplog.text
        editor.revert(one)
        assert f"Stale: {two.id}, {three.id}. Computed on top of edits that are off" in caplog.text
        assert [entry.edit.id for entry in editor.log() if entry.stale] == [two.id, three.id]
        observer.seen.clear()
        new = editor.rebase()
        assert observer.seen == [[], [new[0].id]], "each on top of what is left and rebased"
        assert editor.model.stack.ids == [edit.id for edit in new]
        assert [edit.requests for edit in new] == [two.requests, three.requests]
        assert [edit.outcome.rebases for edit in new] == [two.id, three.id]
        assert [edit.config for edit in new] == [two.config, three.config]
        assert [edit.on_top_of for edit in new] == [None, new[0].id]
        assert not any(entry.stale for entry in editor.log())
        assert {event.edit_id for event in editor.ledger.events() if event.kind == "rebase"} == {
            two.id, three.id,
        }  # fmt: skip
        assert editor.verify() == []
        assert editor.rebase() == []
        state = state_of(editor.model)
    with open_editor(tmp_path) as again:
        assert_same(state_of(again.model), state)
    with open_editor() as fresh:  # as if the reverted edit had never been made
        for name in ("Alan", "Grace"):
            fresh.edit(lives(name, "Rome"), method="toy-low-rank")
        assert_same(state_of(fresh.model), state)


def test_records_of_a_sequence_do_not_grow_with_its_length(tmp_path: Path) -> None:
    with open_editor(tmp_path) as editor:
        edits = [editor.edit(lives(f"Ada{n}", "Rome"), method="toy-low-rank") for n in range(20)]
        assert {edit.parents for edit in edits} == {()}
        assert [edit.on_top_of for edit in edits[1:]] == [edit.id for edit in edits[:-1]]
        sizes = [len(edit.model_dump_json()) for edit in edits]
        assert max(sizes[1:]) - min(sizes[1:]) < 100
        editor.revert(edits[5])
        assert editor.ledger.stale_ids() == [edit.id for edit in edits[6:]]
        later = [editor.edit(lives(f"Bob{n}", "Rome"), method="toy-low-rank") for n in range(3)]
        # The stale ones are named: what they were computed on is not all there.
        assert later[0].on_top_of == edits[4].id
        assert later[0].parents == tuple(edit.id for edit in edits[6:])
        assert (later[2].on_top_of, later[2].parents) == (later[1].id, ())
        assert not {edit.id for edit in later} & set(editor.ledger.stale_ids())
        editor.revert(edits[2])
        assert editor.ledger.stale_ids() == [edit.id for edit in (*edits[3:5], *edits[6:], *later)]
        editor.apply(edits[2])
        editor.apply(edits[5])
        assert editor.ledger.stale_ids() == [], "made while it was off, and it is on again"


def test_putting_the_lower_edit_back_makes_it_fresh_again(editor: Editor) -> None:
    one = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    two = editor.edit(lives("Alan", "Rome"), method="toy-low-rank")
    editor.revert(one)
    assert [entry.stale for entry in editor.log()] == [False, True]
    editor.apply(one)
    assert [entry.stale for entry in editor.log()] == [False, False]
    editor.revert(one, two)
    assert [entry.stale for entry in editor.log()] == [False, False], "only what is on the model"


def test_what_was_made_on_top_of_an_edit_that_cannot_be_read_is_not_stale(tmp_path: Path) -> None:
    with open_editor(tmp_path) as editor:
        one, lost, three = (
            editor.edit(lives(name, "Rome"), method="toy-low-rank")
            for name in ("Ada", "Alan", "Grace")
        )
    (tmp_path / "blobs" / lost.blob[:2] / f"{lost.blob}.safetensors").unlink()
    with open_editor(tmp_path) as editor:
        assert list(editor.damaged) == [lost.id]
        assert not any(entry.stale for entry in editor.log())
        assert editor.ledger.stale_ids() == []
        assert editor.rebase() == [], "nothing was taken off"
        assert editor.model.stack.ids == [one.id, three.id]
        editor.revert(lost.id)
        assert [entry.edit.id for entry in editor.log() if entry.stale] == [three.id]
        assert [edit.outcome.rebases for edit in editor.rebase()] == [three.id]


def test_edits_of_the_base_never_go_stale(editor: Editor) -> None:
    one = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    two = editor.edit(lives("Alan", "Rome"), method="toy-key-value")
    assert (two.on_top_of, two.parents) == (None, ())
    editor.revert(one)
    assert not any(entry.stale for entry in editor.log())
    with open_editor() as fresh:  # it was computed as if nothing had been active
        alone = fresh.edit(lives("Alan", "Rome"), method="toy-key-value")
        assert_same(alone.delta.tensors(), two.delta.tensors())


def test_one_edit_can_be_rebased_by_name_and_mistakes_are_errors(editor: Editor) -> None:
    one = editor.edit(lives("Ada", "Rome"), method="toy-low-rank")
    two = editor.edit(lives("Alan", "Rome"), method="toy-low-rank")
    (new,) = editor.rebase(two)
    assert editor.model.stack.ids == [one.id, new.id]
    with pytest.raises(LedgerError, match="not active"):
        editor.rebase(two)
    with pytest.raises(UnknownNameError):
        editor.rebase("ffffffffffff")
    with editor.disabled(), pytest.raises(LedgerError, match="inside disabled"):
        editor.rebase()


class Refusing:
    """An observer that stops the second edit from being applied."""

    def __init__(self) -> None:
        self.left = 10**9

    @hookimpl(wrapper=True)
    def apply(self, model: object, edits: object) -> object:
        self.left -= 1
        result = yield
        if self.left == 0:
            raise EditRefused("enough", {})
        return result


def test_a_rebase_that_fails_half_way_changes_nothing() -> None:
    observer = Refusing()
    with open_editor(observers=[observer]) as editor:
        for name in ("Ada", "Alan", "Grace"):
            editor.edit(lives(name, "Rome"), method="toy-low-rank")
        editor.revert(editor.model.stack.ids[0])
        before, ids = state_of(editor.model), editor.model.stack.ids
        count = len(editor.log())
        observer.left = 2
        with pytest.raises(EditRefused):
            editor.rebase()
        assert editor.model.stack.ids == ids
        assert_same(state_of(editor.model), before)
        assert len(editor.log()) == count
        assert editor.verify() == []
        assert torch.equal(*(next(iter(s.values())) for s in (before, state_of(editor.model))))
