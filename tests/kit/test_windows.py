"""Long texts in windows: how they are cut, and that an edit of several keys is one edit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from errata import Editor, Request
from errata.datasets import atlas
from errata.edits.delta import KeyValueDelta
from errata.errors import RequestError
from errata.kit.closed_form.layer_updates import Prompts
from errata.kit.closed_form.target_values import MemitObjective, optimised, value_settings
from errata.kit.closed_form.windows import parts_of, windows_of
from errata.kit.contexts import in_contexts
from errata.model import Model
from errata.model.forward import adding, patched
from errata.model.joining import join, with_join
from errata.model.scoring import score_targets
from errata.model.tokens import encode_targets, subject_position
from errata.testing.contract import assert_same
from errata.testing.models import state_of
from errata_memit import MemitConfig
from tests.conftest import base_folder

FACT = next(iter(atlas.requests(1)))
TEXT = (
    f"{FACT.target_new}, as many people who live there know, and the language of that place is "
    "spoken by those who work for the company of the same name."
)
REQUEST = Request(prompt=FACT.prompt, subject=FACT.subject, target_new=TEXT, kind="text")


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    shared = base_folder(tmp_path_factory) / "errata-cache"
    guards = {"perplexity": "off", "norm": "off"}
    with Editor("atlas-gpt2", guards=guards, artifacts=shared) as opened:
        yield opened


@given(words=st.lists(st.text(st.characters(categories=["L"]), min_size=1), min_size=1),
       gaps=st.data(), tokens=st.integers(1, 20))  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_a_cut_text_is_the_text(editor: Editor, words: list[str], gaps: Any, tokens: int) -> None:
    between = st.sampled_from([" ", "  ", "\n", " \n "])
    text = words[0] + "".join(gaps.draw(between) + word for word in words[1:])
    parts = parts_of(editor.model.tokenizer, text, tokens)
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


def test_windows_of_a_chat_have_one_reply_to_write_on(editor: Editor) -> None:
    frame = ("User: ", "\nAssistant: ")
    prompt = frame[0] + REQUEST.prompt + frame[1]
    plain, chat = (
        REQUEST.model_copy(update={"prompt": prompt, "chat": how}) for how in (False, frame)
    )
    windows = windows_of(editor.model, [chat], 6)
    assert len(windows) > 2
    for window in windows:
        said = window.request.prompt.removeprefix(frame[0])
        assert in_contexts(editor.model, window.request, ["{}", "Yes. {}"]) == [
            window.request.prompt, f"{frame[0]}Yes. {said}",
        ]  # fmt: skip
    keys = [
        Prompts(editor.model, [request], ("{}",), window=6).read(1, editor.model.anatomy.block(1))
        for request in (chat, plain)
    ]
    assert torch.equal(keys[0][0].tensor, keys[1][0].tensor)


@pytest.mark.parametrize(
    "text",
    [
        "巴黎是法国的首都。她在那里学习音乐，也写过很多书。",
        "กรุงเทพเป็นเมืองหลวงของประเทศไทย",
        "AI技术2024年在巴黎 中文",
    ],
)
def test_a_script_without_spaces_is_cut_between_its_characters(editor: Editor, text: str) -> None:
    model = editor.model
    request = REQUEST.model_copy(update={"target_new": text})
    windows = windows_of(model, [request], 12)
    assert len(windows) > 2
    assert join(windows[-1].request.text, windows[-1].request.target) == join(REQUEST.text, text)
    assert "".join(parts := parts_of(model.tokenizer, text, 12)) == text
    assert not any(part[0] in "。，" for part in parts)
    edit = editor.edit(request, method="memit", steps=1, window=12)
    (pair,) = edit.delta.pairs.values()
    assert len(pair.k) == len(windows)
    editor.revert(edit)


def test_a_token_of_several_characters_is_not_cut() -> None:
    text = "巴黎是法国的首都她在巴黎学习音乐"
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        ["巴黎", "首都", "音乐", "里巴"] * 20, vocab_size=300, min_frequency=2
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer)
    parts = parts_of(tokenizer, text, 1)
    assert "".join(parts) == text
    assert {"巴黎", "首都", "音乐", "学"} <= set(parts)
    # What stands before the text may share a token with it.
    assert parts_of(tokenizer, "巴都", 1, before="里")[0] == "巴"
    assert parts_of(tokenizer, "乐都", 1, before="音")[0] == "乐"


def text_loss(model: Model, window: int) -> float:
    """Return the mean NLL of the text with the values of its windows in their places."""
    config = MemitConfig(layers=(1,), steps=25, clamp=4.0, weight_decay=0.0, contexts=("{}",))
    prompts = Prompts(model, [REQUEST], ("{}",), window=window)
    _, δ = optimised(prompts, value_settings(1, config), MemitObjective(config))
    batch = encode_targets(model.tokenizer, [REQUEST.text], [REQUEST.target])
    begin, end = batch.target_spans[0]
    columns = [
        subject_position(model.tokenizer, w.request.prompt, w.request.subject, "last_of_prompt")
        for w in prompts.windows
    ]
    rows = torch.zeros(len(columns), dtype=torch.long)
    change = adding(δ.flat.T, torch.tensor(columns), rows=rows)
    with torch.no_grad(), patched(model.module, {model.anatomy.block(1): change}):
        log_p = model.module(batch.input_ids).logits[0].log_softmax(-1)
    said = log_p[begin - 1 : end - 1].gather(1, batch.input_ids[0, begin:end, None])
    return float(-said.mean())


@pytest.mark.slow
def test_windows_hold_a_text_that_one_value_does_not(editor: Editor) -> None:
    (base,) = score_targets(editor.model, [REQUEST.text], [REQUEST.target])
    one, many = (text_loss(editor.model, tokens) for tokens in (10_000, 5))
    assert many < one < base.mean_nll


def test_a_text_that_is_written_becomes_probable(editor: Editor) -> None:
    (before,) = score_targets(editor.model, [REQUEST.text], [REQUEST.target])
    edit = editor.edit(REQUEST, method="memit")
    (after,) = score_targets(editor.model, [REQUEST.text], [REQUEST.target])
    editor.revert(edit)
    assert after.mean_nll < 0.7 * before.mean_nll
    assert sum(after.greedy) > 2 * sum(before.greedy)


def test_a_text_is_one_edit_and_comes_off_whole(editor: Editor) -> None:
    base = state_of(editor.model)
    other = editor.edit(atlas.requests(9)[8], method="memit")
    alone = state_of(editor.model)
    edit = editor.edit(REQUEST, method="memit")
    assert isinstance(edit.delta, KeyValueDelta)
    (pair,) = edit.delta.pairs.values()
    assert len(pair.k) == len(pair.r) == len(windows_of(editor.model, [REQUEST], 16)) > 1
    editor.revert(edit)
    assert_same(state_of(editor.model), alone)
    editor.revert(other)
    assert_same(state_of(editor.model), base)


def test_a_text_with_a_place_for_a_subject_is_refused(editor: Editor) -> None:
    request = REQUEST.model_copy(update={"target_new": "a {} b"})
    with pytest.raises(RequestError, match=r"holds \{\}"):
        editor.edit(request, method="memit")


def test_other_positions_of_a_text_can_ask_for_no_change(editor: Editor) -> None:
    few: dict[str, Any] = {"method": "memit", "steps": 3, "layers": [2], "apply": False}
    plain = editor.edit([FACT, REQUEST], **few)
    kept = editor.edit([FACT, REQUEST], **few, kept_positions=True)
    assert_same(kept[0].delta.tensors(), plain[0].delta.tensors())
    ((name, pair),) = kept[1].delta.pairs.items()
    (without,) = plain[1].delta.pairs.values()
    whole = join(REQUEST.text, REQUEST.target)
    assert len(pair.k) == len(editor.model.tokenizer(whole).input_ids)  # each position once
    assert pair.written.tolist() == [True] * len(without.k) + [False] * (
        len(pair.k) - len(without.k)
    )
    assert torch.equal(pair.k[pair.written], without.k)
    others = pair.k[~pair.written].double()
    changes = [
        KeyValueDelta.totals(name, [edit.delta])[0] @ others.T for edit in (kept[1], plain[1])
    ]
    assert changes[0].norm() < changes[1].norm() / 2
    assert KeyValueDelta.from_parts(kept[1].delta.tensors(), kept[1].delta.metadata())
