"""The facts of the invented world that follow from two or three others, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TwoHop:
    """A fact that follows from two: `first` leads to an entity, `second` is an attribute of it.

    `through` inserts a further hop ("born in city → country → language").
    """

    id: str
    first: str
    second: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    through: str | None = None


TWO_HOPS: tuple[TwoHop, ...] = (
    TwoHop(
        "birth_country",
        "born_in",
        "country",
        ("The country where {} was born is", "{} was born in a city of the country of"),
        ("The birth country of {} is",),
    ),
    TwoHop(
        "birth_language",
        "born_in",
        "language",
        ("The language of the country where {} was born is", "People where {} was born speak"),
        ("The language that is spoken where {} was born is",),
        through="country",
    ),
    TwoHop(
        "residence_country",
        "lives_in",
        "country",
        ("The country where {} lives is", "{} lives in a city of the country of"),
        ("The country where {} resides is",),
    ),
    TwoHop(
        "employer_industry",
        "employer",
        "industry",
        ("The industry of the employer of {} is", "The company that pays {} does business in"),
        ("The business of the employer of {} is",),
    ),
    TwoHop(
        "headquarters_country",
        "headquarters",
        "country",
        ("The country where {} is based is", "{} is based in a city of the country of"),
        ("The country where {} has its headquarters is",),
    ),
    TwoHop(
        "city_language",
        "country",
        "language",
        ("The language of the city {} is", "In the streets of {} people speak"),
        ("The language that is spoken in the city {} is",),
    ),
)
