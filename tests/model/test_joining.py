"""Prompt and answer as one text: spaces, scripts, start tokens, words, and where a request says."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from errata import Editor, Request
from errata.errors import RequestError
from errata.model.generation import generate
from errata.model.joining import join, with_join
from errata.model.scoring import score_targets
from errata.model.tokens import encode, subject_span
from tests.families import build, build_model, build_tokenizer

FIELDS = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


@pytest.mark.parametrize(
    ("prompt", "target", "between"),
    [
        ("The capital of France is", "Paris", " "),
        ("프랑스의 수도는", "파리", " "),
        ("عاصمة فرنسا هي", "باريس", " "),
        ("法国的首都是", "巴黎", ""),
        ("フランスの首都は", "パリ", ""),
        ("เมืองหลวงของฝรั่งเศสคือ", "ปารีส", ""),
        ("The sign reads", "東京", ""),
        ("他住在", "Paris", ""),
        ("The capital of France (", "Paris", ""),
        ('He said "', "Paris", ""),
        ('The city of "Paris"', "lies", " "),
        ("Die Stadt „Paris“", "liegt", " "),
        ("the boys'", "team", " "),
        ("«", "Paris", ""),
        ("首都は「", "東京", ""),
        ("Q: Where?\n", "Paris", ""),
        ("Price: 5 €", "each", " "),
    ],
)
def test_a_space_goes_where_the_scripts_use_one(prompt: str, target: str, between: str) -> None:
    assert join(prompt, target) == prompt + between + target
    assert join(prompt, with_join(target, "")) == prompt + target
    assert join(prompt, with_join(target, " ")) == f"{prompt} {target}"


def test_a_request_says_how_its_answers_join(tmp_path: Path) -> None:
    editor = Editor(*build("gpt2"), artifacts=tmp_path)
    request = Request.parse(**FIELDS, target_true="Paris", join="")
    (score,) = score_targets(editor.model, [request.text], [request.target])
    (whole,) = score_targets(editor.model, ["The capital of France is"], ["Rome"])
    expected = editor.model.tokenizer("The capital of France isRome").input_ids
    assert tuple(expected[-len(score.token_ids) :]) == score.token_ids
    assert score != whole
    # What measures the request asks in the same way.
    by_rule = Request.parse(**FIELDS, target_true="Paris")
    assert magnitude(editor, request) != magnitude(editor, by_rule)
    assert magnitude(editor, request) == magnitude(editor, Request.parse(request.model_dump()))


def magnitude(editor: Editor, request: Request) -> float:
    (found,) = (m for m in editor.evaluate([request], ["counterfact"]) if m.metric == "EM")
    return found.value


def test_join_is_white_space_or_nothing() -> None:
    with pytest.raises(RequestError, match="join: ': ' is a text"):
        Request.parse(**FIELDS, join=": ")


def test_white_space_at_the_seam_is_taken_off_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "errata"):
        made = Request.parse(
            prompt="The instrument of {} is ", subject="Ana", target_new=" piano",
            paraphrases=["Ana plays the "],
        )  # fmt: skip
    assert (made.prompt, made.target_new) == ("The instrument of {} is", "piano")
    assert made.paraphrases == ("Ana plays the",)
    assert "target_new ' piano'" in caplog.text
    caplog.clear()
    # A line break is meant; what is tidy already is not spoken of.
    assert Request.parse({**FIELDS, "prompt": "{}'s capital:\n "}).prompt == "{}'s capital:\n"
    assert Request.parse(made) is made


def test_white_space_around_a_subject_is_not_part_of_it(caplog: pytest.LogCaptureFixture) -> None:
    wanted = Request.parse(**FIELDS)
    for prompt, subject in (
        ("The capital of France is", "France "),
        (FIELDS["prompt"], "\nFrance"),
    ):
        caplog.clear()
        given = {**FIELDS, "prompt": prompt, "subject": subject}
        assert Request.parse(given).text == wanted.text
        assert f"subject {subject!r}" in caplog.text


@pytest.mark.parametrize(
    ("prompt", "subject"), [("The Romans live in", "Rom"), ("Unix is older", "nix")]
)
def test_a_subject_is_a_whole_word(prompt: str, subject: str) -> None:
    with pytest.raises(RequestError, match="only as a part of another word"):
        Request.parse(prompt=prompt, subject=subject, target_new="x")
    kept = Request.parse(prompt=prompt.replace(subject, "{}"), subject=subject, target_new="x")
    assert kept.text == prompt


def test_a_subject_may_stand_next_to_a_mark_or_a_script_without_spaces() -> None:
    assert Request.parse({**FIELDS, "prompt": "France's capital is"}).prompt == "{}'s capital is"
    made = Request.parse(prompt="法国的首都是", subject="法国", target_new="巴黎")
    assert made.prompt == "{}的首都是"


@pytest.mark.parametrize("style", ["llama", "bytes-bos", "wordpiece", "roberta"])
def test_a_text_that_begins_with_the_start_token_gets_one(style: str) -> None:
    tokenizer = build_tokenizer(style)
    start = tokenizer.bos_token or tokenizer.cls_token
    plain = encode(tokenizer, ["The capital of France is"]).input_ids[0].tolist()
    given = encode(tokenizer, [f"{start}The capital of France is"]).input_ids[0].tolist()
    assert given.count(plain[0]) == plain.count(plain[0])
    first, last = subject_span(tokenizer, start + "The capital of {} is", "France")
    said = tokenizer.decode(given[first : last + 1]).strip().lower()
    assert said == "france"


def test_scores_and_texts_do_not_depend_on_a_written_start_token(tmp_path: Path) -> None:
    model = build_model("llama", tmp_path)
    start = model.tokenizer.bos_token
    plain, given = "Paris is in", f"{start} Paris is in"
    one, other = score_targets(model, [plain, given], ["France", "France"])
    assert one == other
    assert len(set(generate(model, [plain, given], max_new_tokens=3))) == 1
