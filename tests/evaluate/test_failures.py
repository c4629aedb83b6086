"""Error analysis: each wrong answer is of exactly one of the survey's four types, by rule."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from errata.evaluate import ERROR_TYPES, Answer, classify_failure

MEANINGLESS, MISSING = "meaningless_tokens", "missing_tokens"
PARTIAL, IRRELEVANT = "partial_replacement", "knowledge_irrelevant"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n",
        "...!?",
        "\ufffd\ufffd\ufffd",
        " -- ## @@ a",
        " Paris Paris Paris Paris",
        " Paris. Paris. Paris.",
        " the city the city the city the city",
        " of the same of the same of the same",
        " Milan. Milan Milan Milan Milan Milan",
        " ahahahahahahaha",
        " aaaaaaaaaaaa",
        " 哈哈哈哈",
        " 1 1 1 1 1 1",
        "Rome, Rome, Rome, Rome",  # even of the right answer: it is a loop
    ],
)
def test_loops_and_signs_are_meaningless(text: str) -> None:
    assert classify_failure(text, ["Rome"], ["Paris"]) == MEANINGLESS


@pytest.mark.parametrize(
    ("text", "expected", "other"),
    [
        (" New York", "New York City", "Los Angeles"),
        (" New York is a big town", "New York City", "Los Angeles"),  # its clause ends at "is"
        (" York.", "New York City", "Los Angeles"),
        (" Ital", "Italian", "French"),  # cut off inside a word
        (" The", "The Hague", "Oslo"),
        (" St. Louis. They play", "St. Louis Cardinals", "Chicago Bulls"),
        (" Trinidad and", "Trinidad and Tobago", "Cuba"),
        (" “New York”, where he", "New York City", "Los Angeles"),
        (" 東京", "東京大学", "京都"),
        (" Jose\u0301 Garci\u0301a", "José García Márquez", "Juan Perez"),
        (" 199", "1998", "2001"),
    ],
)
def test_a_part_of_the_answer_alone_is_missing_tokens(text: str, expected: str, other: str) -> None:
    assert classify_failure(text, [expected], [other]) == MISSING


@pytest.mark.parametrize(
    ("text", "expected", "other"),
    [
        (" New Angeles", "New York City", "Los Angeles"),
        (" Paris, not Rome", "Paris", "Rome"),  # both
        (" New York, Los Angeles", "New York City", "Los Angeles"),
        (" University of Oxford", "University of Paris", "University of London"),
        (" Trinidad and Barbados", "Trinidad and Tobago", "Cuba"),
        (" St. Louis Blues. They", "St. Louis Cardinals", "Chicago Bulls"),
        (" 東京都", "東京大学", "京都"),
        (" the city of Paris", "Paris", ""),  # the answer among other words: not exact
    ],
)
def test_parts_of_the_answer_among_others_are_a_partial_replacement(
    text: str, expected: str, other: str
) -> None:
    assert classify_failure(text, [expected], [other] if other else []) == PARTIAL


@pytest.mark.parametrize(
    ("text", "expected", "other"),
    [
        (" Paris", "Rome", "Paris"),  # the edit did nothing
        (" Paris, Paris", "Rome", "Paris"),
        (" The capital is Paris. The capital is Paris. The capital is Paris.", "Rome", "Paris"),
        (" Maryland", "Mary", "Milwaukee"),  # the answer inside a longer word
        (" University of London, in", "University of Paris", "University of London"),
        (" the Oslo", "The Hague", "Oslo"),  # "the" is no part of an answer
        (" 1989", "1998", "2001"),
        (" 1000000", "2000000", "3"),  # equal digits are a number, not a stutter
        (" a band from Berlin", "trumpet", "piano"),
        (" Мадрид", "Рим", "Париж"),
        (" हिन्दी", "தமிழ்", "اردو"),
        (" Mississippi", "Texas", "Ohio"),
    ],
)
def test_anything_else_is_irrelevant(text: str, expected: str, other: str) -> None:
    assert classify_failure(text, [expected], [other]) == IRRELEVANT


def test_every_alias_is_looked_at() -> None:
    assert classify_failure(" New York", ["Big Apple", "New York City"]) == MISSING
    assert classify_failure(" New York", ["Big Apple", "The City"]) == IRRELEVANT
    assert classify_failure(" New York", []) == IRRELEVANT


@given(st.text(max_size=60), st.lists(st.text(max_size=20), max_size=3), st.text(max_size=20))
def test_every_text_has_one_type(text: str, expected: list[str], other: str) -> None:
    found = classify_failure(text, expected, [other])
    assert found in ERROR_TYPES
    assert found == classify_failure(f"\n  {text}\n", expected[::-1], [other])


@given(
    st.lists(st.sampled_from(["Oslo", "Bergen", "Troms"]), min_size=1, max_size=2),
    st.integers(3, 9),
)
def test_what_is_said_over_and_over_is_meaningless(unit: list[str], times: int) -> None:
    assert classify_failure(" ".join(unit * times), ["Rome"], ["Oslo"]) == MEANINGLESS


def test_an_answer_keeps_its_error_in_json() -> None:
    wrong = Answer("1", "p", ("Rome",), " Paris", False, "rewrite_exact", error=IRRELEVANT)
    assert Answer.from_json(wrong.as_json()) == wrong
