"""An edit that holds from both sides: what it writes, what it leaves, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from errata.datasets import atlas
from errata.editor import Editor
from errata.edits.delta import KeyValueDelta
from errata.edits.request import RelationView, Request
from errata.errors import ConfigError, RequestError
from errata.model.scoring import score_targets
from errata.testing import state_of
from errata.testing.contract import assert_same

QUIET = {"efficacy": "off", "perplexity": "off", "norm": "off"}
EARLY, BETWEEN, LATE = (f"transformer.h.{block}.mlp.c_proj.weight" for block in (1, 2, 3))


NAME = "language"
"""A relation that the model knows, and does not see between a person and an employer.

The embedded model tells a relation by what sort of thing the object is, which one MLP hardly
overrides: here the name rises and stays far from first. `tests/test_real.py` has it said.
"""


def fact(index: int = 0, **changes: Any) -> Request:
    """Return a case whose pair is to be joined by a relation that the model would not say."""
    subjects = {r.subject: r for r in reversed(atlas.requests()) if r.relation == "employer"}
    request = list(subjects.values())[index]
    view = RelationView(
        names=(NAME,),
        add=f"The relation between {{}} and {request.target_new} is",
        remove=f"The relation between {{}} and {request.target_true} is",
    )
    return request.model_copy(update={"relation_view": view, **changes})


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor("atlas-gpt2", guards=QUIET) as editor:
        yield editor


@pytest.fixture
def clean(editor: Editor) -> Iterator[Editor]:
    yield editor
    if editor.model.stack.ids:
        editor.revert(*editor.model.stack.ids)


def probability(editor: Editor, prompt: str, target: str) -> float:
    return math.exp(-score_targets(editor.model, [prompt], [target])[0].mean_nll)


def related(editor: Editor, subject: str, target: str) -> float:
    """Return how probable the new name of the relation is for a pair."""
    return probability(editor, f"The relation between {subject} and {target} is", NAME)


def of_one_subject(index: int) -> tuple[Request, Request]:
    """Return two cases about one subject, of different relations."""
    cases: dict[str, dict[str | None, Request]] = {}
    for request in atlas.requests():
        if request.kind == "modify":
            cases.setdefault(request.subject, {}).setdefault(request.relation, request)
    pairs = [list(found.values())[:2] for found in cases.values() if len(found) > 1]
    one, two = pairs[index]
    return one, two


def test_both_sides_hold_and_others_stay(clean: Editor) -> None:
    request = fact()
    other = fact(3)
    pairs = [
        (other.subject, other.target_new),
        (request.subject, other.target_new),
        (other.subject, request.target_new),
    ]
    before = related(clean, request.subject, request.target_new)
    others = {pair: related(clean, *pair) for pair in pairs}
    edit = clean.edit(request, method="bothsides")
    assert score_targets(clean.model, [request.text], [request.target])[0].exact
    after = related(clean, request.subject, request.target_new)
    assert after > 20 * before
    for pair in pairs:
        assert related(clean, *pair) - others[pair] < after / 5, pair
    assert related(clean, request.subject, str(request.target_true)) < after / 5
    clean.revert(edit)
    assert related(clean, request.subject, request.target_new) == before


@pytest.mark.slow
def test_the_entity_alone_leaves_the_relation_as_it_was(clean: Editor) -> None:
    request = fact()
    clean.edit(request, method="memit", layers=[1])
    assert related(clean, request.subject, request.target_new) < 0.001


def test_what_must_stay_is_a_key_with_nothing_to_write(clean: Editor) -> None:
    request = fact()
    edit = clean.edit(request, method="bothsides", apply=False, steps=3, pairs=5)
    assert isinstance(edit.delta, KeyValueDelta)
    assert set(edit.delta.parameters) == {EARLY, LATE}
    early, late = edit.delta.pairs[EARLY], edit.delta.pairs[LATE]
    assert len(early.k) == 2  # the mean over contexts, as in ROME, and the bare prompt's
    assert bool((early.r[0] == early.r[1]).all())
    written = late.r.norm(dim=1) > 0
    assert int(written.sum()) == 3 * 2  # wordings, contexts
    assert int((~written).sum()) > 5
    none: dict[str, Any] = dict.fromkeys(("objects", "subjects", "pairs", "alike"), 0)
    none |= {"keep_old": False, "keep_answer": False, "texts": 0}
    bare = clean.edit(request, method="bothsides", apply=False, steps=3, wordings=(), **none)
    assert len(bare.delta.pairs[LATE].k) == 2
    held = clean.edit(
        request, method="bothsides", apply=False, steps=3, pairs=5, relation_clamp=0.1
    )
    assert bool((held.delta.pairs[EARLY].r == early.r).all())  # the entity's side has its own limit
    assert held.delta.pairs[LATE].r.norm(dim=1).max() < late.r.norm(dim=1).max() / 2


def test_subjects_that_the_model_lists_beside_the_own_are_kept(clean: Editor) -> None:
    few = {"steps": 3, "objects": 0, "subjects": 0, "pairs": 0, "keep_answer": False, "texts": 0}
    kept = {}
    for count in (0, 1, 2):
        edit = clean.edit(fact(1), method="bothsides", apply=False, alike=count, **few)
        late = edit.delta.pairs[LATE]
        kept[count] = int((late.r.norm(dim=1) == 0).sum())
    assert kept == {0: 1, 1: 2, 2: 3}  # beside the old pair


def test_the_relation_moves_less_in_what_is_said_of_other_subjects(clean: Editor) -> None:
    request = fact()
    prompts = [request.prompt.format(name) for name in ("Paris", "Mozart", "Egypt")]
    said = clean.generate(prompts, max_new_tokens=6)
    down = clean.model.module.get_submodule(LATE.removesuffix(".weight"))
    keys: list[torch.Tensor] = []
    read = down.register_forward_pre_hook(lambda _, args: keys.append(args[0].flatten(0, -2)[1:]))
    for prompt, more in zip(prompts, said, strict=True):
        with torch.no_grad():
            clean.model.module(**clean.model.tokenizer(prompt + more, return_tensors="pt"))
    read.remove()
    base = [down(key).detach() for key in keys]
    moved, kept = {}, {}
    for count in (0, 8):
        edit = clean.edit(request, method="bothsides", texts=count, text_tokens=20)
        now = [down(key).detach() for key in keys]
        moved[count] = sum(float((a - b).norm()) for a, b in zip(now, base, strict=True))
        late = edit.delta.pairs[LATE]
        kept[count] = int((late.r.norm(dim=1) == 0).sum())
        assert clean.generate(request.text, max_new_tokens=4).strip().startswith(request.target_new)
        clean.revert(edit)
    assert moved[8] < 0.9 * moved[0], moved
    assert kept[8] == kept[0] + 20


def test_what_the_relation_needs_is_spread_over_blocks(clean: Editor) -> None:
    few = {"steps": 3, "objects": 2, "subjects": 1, "pairs": 1, "keep_answer": False}
    one, two = (
        clean.edit(fact(), method="bothsides", apply=False, relation_depth=depth, **few).delta
        for depth in (1, 2)
    )
    assert isinstance(one, KeyValueDelta)
    assert isinstance(two, KeyValueDelta)
    assert set(one.parameters) == {EARLY, LATE}
    whole, first, last = one.pairs[LATE].r, two.pairs[BETWEEN].r, two.pairs[LATE].r
    written = whole.norm(dim=1) > 0
    torch.testing.assert_close(first, whole / 2)
    assert bool((first[~written] == 0).all() and (last[~written] == 0).all())
    # The last block is asked for what the one below it left to write, nearly the other half.
    missing = (last - whole / 2).norm(dim=1)[written] / whole.norm(dim=1)[written]
    assert 0 < float(missing.max()) < 0.5


@pytest.mark.slow
def test_two_facts_of_one_subject_share_a_value_and_come_out_alone(clean: Editor) -> None:
    one, two = of_one_subject(1)
    alone = clean.edit(two, method="bothsides")
    wanted = {name: t.clone() for name, t in state_of(clean.model).items()}
    clean.revert(alone)
    first, second = (clean.edit(r, method="bothsides") for r in (one, two))
    assert len(second.delta.shared) == 1
    early = next(iter(second.delta.shared.values())).pairs[EARLY]
    assert len(early.k) == 4  # two keys of each fact
    clean.revert(first)
    assert_same(state_of(clean.model), wanted)


def test_what_is_inserted_has_two_sides_as_well(clean: Editor) -> None:
    few = {"steps": 2, "objects": 1, "subjects": 1, "pairs": 1, "contexts": ("{}",)}
    one, other = (
        clean.edit(fact(**change), method="bothsides", apply=False, **few)
        for change in ({}, {"kind": "insert", "target_true": None})
    )
    assert set(other.delta.parameters) == {EARLY, LATE}
    assert bool((other.delta.pairs[EARLY].r == one.delta.pairs[EARLY].r).all())


@pytest.mark.slow
def test_seven_at_once_hold_and_what_remains_of_them_is_as_if_made_alone(clean: Editor) -> None:
    cases: dict[str, Request] = {}
    for request in atlas.requests():
        if request.relation_view is not None and request.kind == "modify":
            cases.setdefault(request.subject, request)
    asked = list(cases.values())[:7]
    few = {"steps": 10, "objects": 4, "subjects": 2, "pairs": 2, "contexts": ("{}", "Yes. {}")}

    def held(requests: list[Request]) -> int:
        texts, targets = [r.text for r in requests], [r.target for r in requests]
        return sum(score.exact for score in score_targets(clean.model, texts, targets))

    edits = clean.edit(asked, method="bothsides", **few)
    assert held(asked) >= 6
    assert all(edit.outcome.overlaps == {} for edit in edits)
    clean.revert(*edits[::2])
    kept = asked[1::2]
    assert held(kept) == len(kept)
    assert held(asked[::2]) == 0
    left = {name: t.clone() for name, t in state_of(clean.model).items()}
    clean.revert(*clean.model.stack.ids)
    clean.edit(kept, method="bothsides", **few)
    assert_same(state_of(clean.model), left)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relation_view": None}, r"no relation_view.*errata edit --file.*--dataset rake="),
        ({"target_new": "Atlantis"}, "must name the new object"),
    ],
)
def test_a_request_that_says_nothing_of_the_relation_is_refused(
    clean: Editor, changes: dict[str, Any], message: str
) -> None:
    before = {name: t.clone() for name, t in state_of(clean.model).items()}
    with pytest.raises(RequestError, match=message):
        clean.edit(fact(**changes), method="bothsides")
    assert clean.model.stack.ids == []
    assert_same(state_of(clean.model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"layer": 3, "relation_layer": 2}, "must lie above"),
        ({"layer": 2, "relation_layer": 2}, "must lie above"),
        ({"relation_layer": 17}, "17"),
        ({"wordings": ("{} and it",)}, "one \\[object\\]"),
    ],
)
def test_bad_hyper_parameters_are_refused(
    editor: Editor, config: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, LookupError), match=message):
        editor.configure("bothsides", config)


def test_layers_come_out_as_numbers(editor: Editor) -> None:
    config, _ = editor.configure("bothsides", {"layer": -6, "relation_layer": -1})
    assert (config.layer, config.relation_layer) == (0, 5)


@pytest.mark.parametrize("text", ["no {} subject [object] [object]", "{} {} [object]"])
def test_wordings_name_each_once(editor: Editor, text: str) -> None:
    with pytest.raises(ConfigError, match="wordings"):
        editor.configure("bothsides", {"wordings": (text,)})


def test_in_a_chat_the_wordings_are_rendered() -> None:
    from errata_bothsides.kept_pairs import RelationPrompt

    prompt = RelationPrompt("<u>The relation between {} and [object] is<a>", "r", ("<u>", "<a>"))
    asked = prompt.worded("{} and [object]:").asking("Ann", "Oslo")
    assert asked.text == "<u>Ann and Oslo:<a>"
    assert asked.prompt == "<u>Ann and {}:<a>"
