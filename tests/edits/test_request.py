from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata import Request
from errata.edits.cases import requests_of
from errata.edits.request_parsing import parse_arguments, parse_requests
from errata.errors import ErrataError, RequestError

FIELDS = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}


def test_a_prompt_that_holds_the_subject_becomes_a_template() -> None:
    request = Request.parse({**FIELDS, "prompt": "The capital of France is"})
    assert request.prompt == "The capital of {} is"
    assert request.text == "The capital of France is"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt": "The capital is"}, "does not stand in the prompt"),
        ({"prompt": "{} and {}"}, "exactly one {}"),
        ({"prompt": "France, France"}, "stands in the prompt 2 times"),
        ({"subject": " "}, "subject is empty"),
        ({"target_new": ""}, "target_new is empty"),
        ({"kind": "rename"}, "kind"),
        ({"target": "Rome"}, "Did you mean 'target_new'"),
        ({"prompt": 7}, "prompt"),
    ],
)
def test_a_bad_request_says_which_field_is_wrong(change: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError) as caught:
        Request.parse({**FIELDS, **change})
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_subject_fills_its_place_in_paraphrases_too() -> None:
    more = {"paraphrases": ["{}'s capital is", "France is ruled from"], "generation": ["In {},"]}
    request = Request.parse({**FIELDS, **more})
    assert request.paraphrases == ("France's capital is", "France is ruled from")
    assert request.generation == ("In France,",)


@given(
    st.lists(st.sampled_from(["{}", "Oswin", " ", "a"]), min_size=1).map("".join),
    st.lists(st.sampled_from(["{}", "Oswin", " plays ", "a"])).map("".join),
)
def test_a_request_that_is_read_again_is_the_same(subject: str, paraphrase: str) -> None:
    try:
        request = Request.parse(
            {**FIELDS, "subject": subject, "paraphrases": [paraphrase], "generation": [paraphrase]}
        )
    except RequestError:
        return
    assert Request.parse(request.model_dump()) == request
    if paraphrase == "{} plays ":
        assert request.paraphrases == (f"{request.subject} plays",)


def test_erasing_needs_no_target() -> None:
    request = Request.parse(kind="erase", prompt="{} was born in", subject="Ada")
    assert request.target_new == ""
    assert Request(**{**request.model_dump(), "target_new": None}) == request


def test_duplicates_are_named_by_their_places() -> None:
    with pytest.raises(RequestError, match="0 and 2 are the same"):
        parse_requests([FIELDS, {**FIELDS, "target_new": "Oslo"}, FIELDS])


def test_no_request_at_all_is_an_error() -> None:
    with pytest.raises(RequestError, match="at least one"):
        parse_requests([])


@given(st.text(min_size=1), st.text(min_size=1), st.text(min_size=1))
def test_any_text_gives_a_request_or_an_error_of_ours(
    prompt: str, subject: str, target: str
) -> None:
    try:
        request = Request.parse(prompt=prompt, subject=subject, target_new=target)
    except ErrataError:
        return
    assert request.text == request.prompt.replace("{}", subject.strip())
    assert subject.strip() in request.text
    assert Request.parse(request.model_dump()).digest == request.digest


def test_a_target_that_was_not_given_is_missing_and_not_empty() -> None:
    with pytest.raises(RequestError, match="target_new is missing"):
        Request.parse(prompt="The capital of {} is", subject="France")


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({**FIELDS, "target_new": ""}, "target_new is empty"),
        (7, "7 is no request"),
        ({**FIELDS, "prompt": "No place"}, "does not stand in the prompt"),
    ],
)
def test_an_error_about_one_of_many_requests_says_which(wrong: object, says: str) -> None:
    many = [FIELDS, {**FIELDS, "target_new": "Oslo"}, wrong]
    for parse in (parse_requests, requests_of):
        with pytest.raises(RequestError, match=says) as caught:
            parse(many)  # type: ignore[operator]
        shown = f", {wrong['prompt']!r}" if isinstance(wrong, dict) else ""
        assert str(caught.value).startswith(f"Request 2 of 3 (counted from 0){shown}: ")
    with pytest.raises(RequestError, match=says) as caught:
        parse_requests([wrong])  # type: ignore[list-item]
    assert "counted from 0" not in str(caught.value)


def test_records_of_a_published_dataset_are_known_for_what_they_are() -> None:
    record = {"pararel_idx": 1, "case_id": 0, "requested_rewrite": {"subject": "France"}}
    with pytest.raises(RequestError, match=r"errata\.datasets\.load\(NAME, records\)") as caught:
        Request.parse(record)
    assert "Unknown request field 'requested_rewrite'" in str(caught.value)
    assert "Did you mean" not in str(caught.value)


def test_parallel_lists_are_known_for_what_they_are() -> None:
    lists = {"prompts": ["The capital of {} is"], "subject": ["France"], "target_new": ["Rome"]}
    for ask in (lambda: Request.parse(lists), lambda: parse_arguments("", {}, lists)):
        with pytest.raises(RequestError, match=r"EasyEdit.*a list of requests, each with its"):
            ask()


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("target", "target_new"),
        ("ground_truth", "target_true"),
        ("rephrase_prompts", "paraphrases"),
        ("paraphrase", "paraphrases"),
        ("SUBJECT", "subject"),
    ],
)
def test_a_word_used_elsewhere_is_answered_with_the_field_it_means(word: str, field: str) -> None:
    given = {"prompt": "{} is", "subject": "Ada", "target_new": "Oslo", word: "x"}
    for make in (Request.parse, lambda given: Request(**given)):
        with pytest.raises(ValueError, match=f"{word!r}. Did you mean {field!r}"):
            make(given)


def test_a_misspelt_argument_is_named_where_a_field_is_missing() -> None:
    with pytest.raises(RequestError, match=r"'subjct' was given. Did you mean 'subject'\?"):
        parse_arguments("{} is", {}, {"subjct": "Ada", "target_new": "Oslo", "steps": 5})


def test_an_empty_form_of_an_answer_is_none() -> None:
    probe = {"prompt": "Ada's home is", "answers": ["", "Oslo", "  "]}
    request = Request.parse(
        {"prompt": "{} is in", "subject": "Ada", "target_new": "Oslo", "aliases": ["", "oslo"],
         "portability": [probe]}
    )  # fmt: skip
    assert request.aliases == ("oslo",)
    assert request.portability[0].answers == ("Oslo",)
    with pytest.raises(RequestError, match=r"aliases.0"):
        Request.parse(
            {"prompt": "{} is in", "subject": "Ada", "target_new": "Oslo", "aliases": [3]}
        )
