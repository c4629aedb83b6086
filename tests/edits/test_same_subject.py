"""Several facts of one subject: which stored values are in force, and that no bit remembers."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from errata.datasets import atlas
from errata.editor import Editor
from errata.edits.delta import KeyValueDelta, KeyValues
from errata.edits.delta.shared_values import in_force
from errata.edits.edit import Edit
from errata.edits.request import Request
from errata.errors import IntegrityError
from errata.kit.value_loss import ValueLoss
from errata.kit.value_rows import dealt
from errata.kit.values import ValueSettings, optimise_shared, optimise_values
from errata.model.scoring import score_targets
from errata.testing import state_of
from errata.testing.contract import assert_same

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
SUBJECT = "Mira Castel"


def facts(count: int) -> list[dict[str, str]]:
    """Return facts about one subject, of different relations."""
    prompts = ("{} was born in", "The mother tongue of {} is", "{} works as a", "{} plays the")
    targets = ("Oslo", "French", "doctor", "piano")
    return [
        {"prompt": p, "subject": SUBJECT, "target_new": t, "relation": f"R{i}"}
        for i, (p, t) in enumerate(zip(prompts[:count], targets, strict=False))
    ]


@pytest.fixture(scope="module")
def editor() -> Editor:
    with Editor("atlas-gpt2", guards=QUIET) as editor:
        yield editor


@pytest.fixture
def clean(editor: Editor) -> Editor:
    yield editor
    if editor.model.stack.ids:
        editor.revert(*editor.model.stack.ids)


def keys(count: int, seed: int, group: str = "identity") -> KeyValues:
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(count, 4, generator=generator)
    r = torch.randn(count, 3, generator=generator)
    return KeyValues(k, k.double(), r, torch.ones(count).double(), metric={"digest": group})


def delta(fact: str, *sets: str) -> KeyValueDelta:
    """Return the delta of a fact "a" that shares values in the sets "ab", "abc" …"""
    shared = {frozenset(names): {"w": keys(len(names), len(names))} for names in sets}
    return KeyValueDelta({"w": keys(1, ord(fact))}, fact, shared)


# -- which of them are in force -------------------------------------------------------------------


def test_each_set_of_remaining_edits_has_its_own_values() -> None:
    a, b, c = delta("a"), delta("b", "ab"), delta("c", "ac", "bc", "abc")
    assert in_force([a]) == [a]
    assert in_force([a, b]) == [b.shared[frozenset("ab")]]
    assert in_force([a, b, c]) == [c.shared[frozenset("abc")]]
    assert in_force([b, c]) == [c.shared[frozenset("bc")]]
    assert in_force([a, c]) == [c.shared[frozenset("ac")]]
    assert in_force([c]) == [c]


def test_an_edit_that_a_later_one_does_not_know_of_stands_beside_it() -> None:
    a, c, b = delta("a"), delta("c"), delta("b", "ab")
    assert in_force([a, c, b]) == [c, b.shared[frozenset("ab")]]


@given(st.sets(st.sampled_from("abcd")), st.randoms())
def test_every_active_fact_is_asked_for_once(active: set[str], rng: random.Random) -> None:
    sets = [one for one in ("ab", "bcd", "acd", "abcd", "cd") if rng.random() < 0.6]
    stored = {name: [one for one in sets if name in one] for name in "abcd"}
    deltas = [delta(name, *stored[name]) for name in sorted(active)]
    found = in_force(deltas)
    assert sum(len(member.pairs["w"].k) for member in found) == len(deltas)
    assert found == in_force(deltas)


def test_what_is_stored_comes_back_and_what_does_not_fit_is_refused() -> None:
    before = delta("b", "ab", "bcd")
    after = KeyValueDelta.from_parts(before.tensors(), before.metadata())
    assert after.fact == "b"
    assert list(after.shared) == [frozenset("ab"), frozenset("bcd")]
    assert_same(after.tensors(), before.tensors())
    with pytest.raises(IntegrityError, match="one of the facts"):
        delta("a", "bc")
    with pytest.raises(IntegrityError, match="parameters and metrics"):
        KeyValueDelta({"w": keys(1, 1)}, "a", {frozenset("ab"): {"v": keys(2, 2)}})
    with pytest.raises(IntegrityError, match="parameters and metrics"):
        KeyValueDelta({"w": keys(1, 1)}, "a", {frozenset("ab"): {"w": keys(2, 2, "other")}})
    broken = before.metadata() | {"shared": [["a", "b"], "bcd"]}
    with pytest.raises(IntegrityError, match="facts by texts"):
        KeyValueDelta.from_parts(before.tensors(), broken)


def test_an_edit_that_shares_nothing_is_stored_as_before() -> None:
    alone = KeyValueDelta({"w": keys(1, 1)})
    assert set(alone.metadata()) == {"transposed", "metric"}
    assert all(not name.startswith("shared") for name in alone.tensors())


# -- one δ --------------------------------------------------------------------------------------


class Plain:
    """−log P of the targets, and nothing else."""

    def loss(self, at):  # type: ignore[no-untyped-def]
        nll = at.mean_over_contexts(-at.log_p)
        return ValueLoss(nll=nll, kl=0 * nll, decay=0 * nll)

    def done(self, at, loss):  # type: ignore[no-untyped-def]
        return loss.total < 0.0


def test_facts_that_share_a_value_have_one_delta_and_keys_of_their_own(editor: Editor) -> None:
    one, two, *_ = (Request(**fact) for fact in facts(3))
    settings = ValueSettings(layer=1, steps=8, lr=0.5, clamp=15)
    contexts = ("{}", "Yes. {}")
    together, alone = optimise_shared(
        editor.model, [[one, two], [one]], contexts, settings, Plain()
    )
    first, second = together
    assert torch.equal(first.delta, second.delta)
    assert not torch.equal(first.keys, second.keys)
    assert first.losses == second.losses
    assert first.losses[-1][0] < first.losses[0][0]
    (plain,) = optimise_values(editor.model, [one], contexts, settings, Plain())
    assert torch.allclose(alone[0].delta, plain.delta, atol=1e-4)
    assert torch.allclose(first.keys, plain.keys, atol=1e-5)  # rounding depends on the batch
    assert not torch.allclose(first.delta, plain.delta, atol=1e-2)


def test_facts_that_share_a_value_have_the_steps_of_each_up_to_four(editor: Editor) -> None:
    one, two, three, four = (Request(**fact) for fact in facts(4))
    five = Request(prompt="{} came from", subject=SUBJECT, target_new="Bergen", relation="R4")
    pair = {"prompt": "The relation of {} and Oslo is", "subject": SUBJECT, "kind": "relation",
            "target_new": "home", "operation": "both"}  # fmt: skip
    both = Request(**pair, remove="The relation of {} and Rome is")
    groups = [[one], [one, two], [one, two, three], [one, two, three, four, five], [both]]
    for sharing, counts in (("facts", [3, 6, 9, 12, 6]), ("wordings", [3, 3, 3, 3, 3])):
        settings = ValueSettings(layer=1, steps=3, lr=0.1, clamp=15, sharing=sharing)
        found = optimise_shared(editor.model, groups, ("{}",), settings, Plain())
        assert [len(group[0].losses) for group in found] == counts


@given(st.integers(1, 30), st.integers(1, 12))
def test_contexts_are_dealt_out_over_facts(contexts: int, facts: int) -> None:
    hands = dealt(contexts, facts)
    assert len(hands) == facts
    assert set().union(*hands) == set(range(contexts))
    assert all(0 in hand for hand in hands)
    share = min(contexts - 1, math.ceil(2 * (contexts - 1) / facts))
    assert {len(hand) for hand in hands} == {1 + share}


@pytest.mark.parametrize("sharing", ["facts", "wordings"])
def test_the_loss_of_several_facts_is_read_in_the_contexts_that_each_was_dealt(
    editor: Editor, sharing: Literal["facts", "wordings"]
) -> None:
    requests = [Request(**fact) for fact in facts(3)]
    contexts = ("{}", "A note. {}", "They say: {}", "In short, {}", "Once more: {}")
    settings = ValueSettings(layer=1, steps=2, kl_prompt=None, sharing=sharing)
    (found,) = optimise_shared(editor.model, [requests], contexts, settings, Plain())
    hands = [{0, 1, 2, 3}, {0, 4, 1, 2}, {0, 3, 4, 1}] if sharing == "facts" else [range(5)] * 3
    asked = [
        (contexts[k].replace("{}", request.text), request.target)
        for request, hand in zip(requests, hands, strict=True)
        for k in hand
    ]
    scores = score_targets(editor.model, *map(list, zip(*asked, strict=True)))
    tokens = sum(len(score.logprobs) for score in scores)
    expected = -sum(sum(score.logprobs) for score in scores) / tokens
    assert found[0].losses[0][1] == pytest.approx(expected, rel=1e-4)
    for request, value in zip(requests, found, strict=True):  # keys are those in all contexts
        (alone,) = optimise_values(editor.model, [request], contexts, settings, Plain())
        assert torch.allclose(value.keys, alone.keys, atol=1e-5)


# -- the methods --------------------------------------------------------------------------------


def known_pairs(count: int) -> list[list[Request]]:
    """Return two cases each about subjects that the model knows, of different relations."""
    cases: dict[str, dict[str | None, Request]] = {}
    for request in atlas.requests():
        if request.kind == "modify":
            cases.setdefault(request.subject, {}).setdefault(request.relation, request)
    pairs = [list(found.values())[:2] for found in cases.values() if len(found) > 1]
    return pairs[1 : count + 1]


def state(editor: Editor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state_of(editor.model).items()}


@pytest.mark.parametrize("method", ["memit", pytest.param("alphaedit", marks=pytest.mark.slow)])
def test_what_remains_is_what_would_have_been_made_alone(clean: Editor, method: str) -> None:
    one, two, _ = facts(3)
    base = state(clean)
    few = {"method": method, "steps": 3}  # the values need not be good for this
    fresh = clean.edit(two, **few)
    wanted = state(clean)
    clean.revert(fresh)
    first = clean.edit(one, **few)
    second = clean.edit(two, **few)
    both = state(clean)
    assert second.outcome.overlaps == {}
    clean.revert(first)
    assert_same(state(clean), wanted)  # the second by itself, bit for bit
    clean.apply(first)
    assert_same(state(clean), both)
    clean.revert(second, first)
    assert_same(state(clean), base)


@pytest.mark.slow
def test_order_and_calls_do_not_matter(clean: Editor) -> None:
    one, two, _ = facts(3)
    states = []
    for calls in ([[one], [two]], [[two], [one]], [[one, two]]):
        edits: list[Edit] = []
        for call in calls:
            edits += clean.edit(call, method="memit")
        assert sum(len(edit.delta.shared) for edit in edits) == 1
        states.append(state(clean))
        clean.revert(*edits)
    for other in states[1:]:
        for name, tensor in states[0].items():
            assert torch.allclose(tensor, other[name], rtol=1e-5, atol=1e-6), name


@pytest.mark.slow
def test_three_facts_hold_together(clean: Editor) -> None:
    """With the steps of one fact, a single one of these three would."""
    cases: dict[str, dict[str | None, Request]] = {}
    for request in atlas.requests():
        if request.kind == "modify":
            cases.setdefault(request.subject, {}).setdefault(request.relation, request)
    three = [list(found.values())[:3] for found in cases.values() if len(found) > 2][3]
    edits = [clean.edit(fact, method="memit") for fact in three]
    assert len(edits[2].delta.shared) == 3
    scores = score_targets(clean.model, [r.text for r in three], [r.target for r in three])
    assert all(score.exact for score in scores)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["memit", "rome"])
def test_both_facts_hold_together_where_the_later_would_win(clean: Editor, method: str) -> None:
    held = {}
    for how in ("together", "alone"):
        held[how] = 0
        for asked in known_pairs(3):
            edits = [clean.edit(fact, method=method, same_subject=how) for fact in asked]
            scores = score_targets(clean.model, [r.text for r in asked], [r.target for r in asked])
            held[how] += all(score.exact for score in scores)
            clean.revert(*edits)
    assert held["together"] > held["alone"]
    assert held["together"] >= 2


def test_a_fact_holds_beside_another_that_is_erased(clean: Editor) -> None:
    first, second = known_pairs(2)[1]
    gone = first.model_copy(update={"kind": "erase", "target_new": ""})
    edits = [clean.edit(request, method="memit") for request in (gone, second)]
    assert len(edits[1].delta.shared) == 1
    assert edits[1].outcome.conflicts == ()
    old, new = score_targets(
        clean.model, [first.text, second.text],
        [first.joined(first.target_true or ""), second.target],
    )  # fmt: skip
    assert old.mean_nll > 4
    assert new.mean_nll < 0.1


@pytest.mark.slow
def test_the_same_fact_with_another_answer_is_not_joined(clean: Editor) -> None:
    one = facts(1)[0]
    clean.edit(one, method="memit")
    other = clean.edit({**one, "target_new": "Paris"}, method="memit")
    assert other.delta.shared == {}
    assert other.outcome.conflicts


@pytest.mark.slow
def test_an_export_carries_what_is_shared(clean: Editor, tmp_path: Path) -> None:
    edits = clean.edit(facts(2), method="memit")
    file = clean.export(tmp_path / "two.errata", *edits)
    wanted = state(clean)
    with Editor("atlas-gpt2", guards=QUIET) as other:
        other.apply(file)
        assert_same(state_of(other.model), wanted)


def test_many_facts_store_the_sets_that_lack_one(
    clean: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errata.kit.same_subject as module

    monkeypatch.setattr(module, "ALL_SETS", 2)
    edits = clean.edit(facts(4), method="memit", steps=2)
    assert [len(edit.delta.shared) for edit in edits] == [0, 1, 3, 4]
    sizes = sorted(len(facts) for facts in edits[3].delta.shared)
    assert sizes == [3, 3, 3, 4]
