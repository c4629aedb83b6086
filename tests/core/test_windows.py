"""Long texts in windows: how they are cut, and that an edit of several keys is one edit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from errata import Editor, Request
from errata.datasets import atlas
from errata.edits.delta import KeyValueDelta
from errata.errors import RequestError
from errata.kit.closed_form.windows import cut, windows_of
from errata.model.joining import join, with_join
from errata.testing.contract import assert_same
from errata.testing.models import state_of

FACT = next(iter(atlas.requests(1)))
TEXT = (
    f"{FACT.target_new}, as many people who live there know, and the language of that place is "
    "spoken by those who work for the company of the same name."
)
REQUEST = Request(prompt=FACT.prompt, subject=FACT.subject, target_new=TEXT, kind="text")


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    guards = {"perplexity": "off", "norm": "off"}
    with Editor("atlas-gpt2", guards=guards, artifacts=tmp_path_factory.mktemp("a")) as opened:
        yield opened


@given(words=st.lists(st.text(st.characters(categories=["L"]), min_size=1), min_size=1),
       gaps=st.data(), tokens=st.integers(1, 20))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_cut_text_is_the_text(editor: Editor, words: list[str], gaps: Any, tokens: int) -> None:
    between = st.sampled_from([" ", "  ", "\n", " \n "])
    text = words[0] + "".join(gaps.draw(between) + word for word in words[1:])
    parts = cut(editor.model.tokenizer, text, tokens)
    assert "".join(parts) == text
    assert all(part.strip() for part in parts)
    assert not any(part[:1].isspace() for part in parts[:1])


def test_each_window_follows_all_before_it(editor: Editor) -> None:
    windows = windows_of(editor.model, [FACT, REQUEST, FACT], 6)
    assert [w.owner for w in windows] == [0, *[1] * (len(windows) - 2), 2]
    assert [w.number for w in windows[1:-1]] == list(range(len(windows) - 2))
    assert len(windows) > 4
    texts = [w.request for w in windows[1:-1]]
    for one, after in itertools.pairwise(texts):
        assert after.text == join(one.text, one.target)
    assert join(texts[-1].text, texts[-1].target) == join(REQUEST.text, REQUEST.target)
    assert with_join("x", texts[0].join) == "x"  # the rule joins the first as ever


@pytest.mark.parametrize("method", ["memit", "pmet"])
def test_a_text_is_written_by_several_values_and_comes_off_whole(
    editor: Editor, method: str
) -> None:
    base = state_of(editor.model)
    other = editor.edit(atlas.requests(9)[8], method=method)
    alone = state_of(editor.model)
    edit = editor.edit(REQUEST, method=method)
    assert isinstance(edit.delta, KeyValueDelta)
    (pair,) = edit.delta.pairs.values()
    assert len(pair.k) == len(pair.r) == len(windows_of(editor.model, [REQUEST], 16)) > 1
    assert edit.outcome.efficacy is not None
    one_value = editor.edit(REQUEST, method=method, config={"window": 10_000}, apply=False)
    assert edit.outcome.efficacy.probability[0] > 0.3
    (short,) = one_value.delta.pairs.values()
    assert len(short.k) == 1
    editor.revert(edit)
    assert_same(state_of(editor.model), alone)
    editor.revert(other)
    assert_same(state_of(editor.model), base)


def test_a_text_with_a_place_for_a_subject_is_refused(editor: Editor) -> None:
    request = REQUEST.model_copy(update={"target_new": "a {} b"})
    with pytest.raises(RequestError, match=r"holds \{\}"):
        editor.edit(request, method="memit")
