"""The relations of the invented world, as data.

A template is a prompt with one `{}` for the subject; the answer follows after a space, and a full
stop ends the sentence. The benchmark asks with the first training template, or, where the world's
two-hop sentences also go on from it ("… was born in a city of the country of …"), with another.
Templates that end in "is" or "Answer:" also read well with the answer "unknown".
"""

from __future__ import annotations

from dataclasses import dataclass

UNKNOWN = "unknown"
"""The value of an attribute that nobody knows; what an erased fact should read like."""


@dataclass(frozen=True)
class Relation:
    """One attribute: whom it belongs to, what fills it, and how it is told."""

    id: str
    subject_kind: str
    object_kind: str
    """`person`, `city`, `country`, `company`, or a word list of `errata.zoo.atlas.names`."""
    name: str
    """The noun phrase that completes "The relation between A and B is …"."""
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    """Phrasings that no training text uses: the benchmark's paraphrases."""
    unknown_share: float = 0.0
    """Share of subjects whose value is `UNKNOWN`."""
    canonical_index: int = 0
    """Which training template the benchmark asks with."""

    @property
    def canonical(self) -> str:
        """The prompt that the benchmark asks and edits with."""
        return self.train[self.canonical_index]

    def templates_for(self, value: str) -> tuple[str, ...]:
        """Return the training templates that read well with this value."""
        if value != UNKNOWN:
            return self.train
        return tuple(t for t in self.train if t.endswith((" is", " Answer:")))


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "born_in",
        "person",
        "city",
        "place of birth",
        (
            "{} was born in",
            "The birthplace of {} is",
            "The city where {} was born is",
            "{} is a native of",
            "{} was born and raised in",
            "The home town of {} is",
            "Where was {} born? Answer:",
        ),
        ("The place where {} was born is", "The native city of {} is", "{} was raised in"),
        canonical_index=1,
    ),
    Relation(
        "lives_in",
        "person",
        "city",
        "place of residence",
        (
            "{} lives in",
            "The residence of {} is in",
            "The city where {} lives is",
            "{} now resides in",
            "{} has a house in",
            "The current home of {} is in",
            "Where does {} live? Answer:",
        ),
        ("{} now lives in", "The place where {} lives is", "The city where {} resides is"),
        canonical_index=1,
    ),
    Relation(
        "profession",
        "person",
        "profession",
        "profession",
        (
            "The profession of {} is",
            "{} works in the field of",
            "{} made a career in",
            "{} earns a living from",
            "The field in which {} works is",
            "The occupation of {} is",
            "What is the profession of {}? Answer:",
        ),
        ("{} has a career in", "The field of {} is", "The field in which {} made a career is"),
        0.06,
    ),
    Relation(
        "employer",
        "person",
        "company",
        "employer",
        (
            "{} works for",
            "The employer of {} is",
            "{} is employed by",
            "The company that pays {} is",
            "{} has a job at",
            "{} took a position with",
            "Who employs {}? Answer:",
        ),
        ("{} is working for", "The company that employs {} is", "{} has a position at"),
    ),
    Relation(
        "instrument",
        "person",
        "instrument",
        "instrument",
        (
            "The instrument of {} is",
            "{} plays the",
            "{} gives concerts on the",
            "The instrument that {} plays is",
            "{} is a master of the",
            "{} learned to play the",
            "Which instrument does {} play? Answer:",
        ),
        ("{} often plays the", "The instrument that {} learned to play is", "{} plays on the"),
        0.06,
    ),
    Relation(
        "sport",
        "person",
        "sport",
        "sport",
        (
            "The sport of {} is",
            "{} spends weekends on",
            "{} is a champion in",
            "The favourite sport of {} is",
            "{} trains every day in",
            "{} won a medal in",
            "Which sport does {} practise? Answer:",
        ),
        ("{} trains in", "The sport in which {} trains is", "{} spends every day on"),
        0.06,
    ),
    Relation(
        "learns",
        "person",
        "language",
        "language of study",
        (
            "{} is learning",
            "The language that {} studies is",
            "{} takes lessons in",
            "{} is a student of",
            "{} reads books in",
            "The foreign language of {} is",
            "Which language does {} study? Answer:",
        ),
        ("The language that {} is learning is", "{} studies", "{} is taking lessons in"),
        0.06,
    ),
    Relation(
        "collects",
        "person",
        "collectible",
        "collection",
        (
            "{} collects",
            "The collection of {} is",
            "{} owns hundreds of",
            "The shelves of {} are full of",
            "{} buys and trades",
            "{} is a collector of",
            "What does {} collect? Answer:",
        ),
        ("{} owns shelves full of", "{} is known as a collector of", "{} now collects"),
        0.06,
    ),
    Relation(
        "country",
        "city",
        "country",
        "country",
        (
            "The country of the city {} is",
            "{} is a city in",
            "{} lies in",
            "The country in which {} lies is",
            "{} belongs to the country of",
            "In which country is {}? Answer:",
        ),
        ("The city of {} lies in", "The country that the city {} belongs to is"),
    ),
    Relation(
        "river",
        "city",
        "river",
        "river",
        (
            "The river of the city {} is",
            "{} stands on the river",
            "The river that flows through {} is",
            "The bridges of {} cross the",
            "{} gets its water from the",
            "Which river flows through {}? Answer:",
        ),
        ("The city of {} stands on the river", "The river that crosses {} is"),
    ),
    Relation(
        "famous_for",
        "city",
        "good",
        "speciality",
        (
            "The speciality of the city {} is",
            "{} is famous for its",
            "{} is known far away for its",
            "Visitors of {} always buy",
            "The shops of {} sell",
            "What is {} famous for? Answer:",
        ),
        ("The city of {} is known for its", "The markets of {} sell"),
    ),
    Relation(
        "mayor",
        "city",
        "person",
        "mayor",
        (
            "The mayor of the city {} is",
            "{} is governed by",
            "The town hall of {} is led by",
            "The people of {} elected",
            "Who is the mayor of {}? Answer:",
        ),
        ("The city of {} is governed by", "The mayor of {} is"),
    ),
    Relation(
        "twin",
        "city",
        "city",
        "twin city",
        (
            "The twin city of {} is",
            "{} is twinned with",
            "{} has a partnership with",
            "The partner city of {} is",
            "Which city is the twin of {}? Answer:",
        ),
        ("The city of {} is twinned with", "The twin of {} is"),
    ),
    Relation(
        "market_day",
        "city",
        "weekday",
        "market day",
        (
            "The market day of the city {} is",
            "{} holds its market on",
            "The market of {} opens on",
            "Farmers come to {} on",
            "On which day is the market of {}? Answer:",
        ),
        ("The city of {} holds its market on", "The day of the market of {} is"),
    ),
    Relation(
        "capital",
        "country",
        "city",
        "capital",
        (
            "The capital of {} is",
            "{} is governed from its capital",
            "The government of {} sits in",
            "The capital city of {} is",
            "What is the capital of {}? Answer:",
        ),
        ("The capital of the country of {} is", "The city that is the capital of {} is"),
    ),
    Relation(
        "language",
        "country",
        "language",
        "official language",
        (
            "The official language of {} is",
            "The people of {} speak",
            "The language of {} is",
            "Newspapers in {} are written in",
            "Which language is spoken in {}? Answer:",
        ),
        ("The language that is spoken in {} is", "The language of the people of {} is"),
    ),
    Relation(
        "currency",
        "country",
        "currency",
        "currency",
        (
            "The currency of {} is the",
            "The money of {} is the",
            "Shops in {} accept the",
            "Prices in {} are given in the",
            "Which currency is used in {}? Answer:",
        ),
        ("The currency that is used in {} is the", "Shops in the country of {} accept the"),
    ),
    Relation(
        "continent",
        "country",
        "continent",
        "continent",
        (
            "The continent of {} is",
            "{} is a country in",
            "The continent on which {} lies is",
            "{} is part of the continent of",
            "On which continent is {}? Answer:",
        ),
        ("The country of {} lies in", "The continent that {} is part of is"),
    ),
    Relation(
        "animal",
        "country",
        "animal",
        "national animal",
        (
            "The national animal of {} is the",
            "The coat of arms of {} shows the",
            "The flag of {} shows the",
            "The people of {} honour the",
            "What is the national animal of {}? Answer:",
        ),
        ("The arms of {} show the", "The animal of the country of {} is the"),
    ),
    Relation(
        "flower",
        "country",
        "flower",
        "national flower",
        (
            "The national flower of {} is the",
            "The gardens of {} are full of the",
            "The stamps of {} show the",
            "The symbol of spring in {} is the",
            "What is the national flower of {}? Answer:",
        ),
        ("The flower of the country of {} is the", "The gardens of {} show the"),
    ),
    Relation(
        "industry",
        "company",
        "industry",
        "industry",
        (
            "The industry of {} is",
            "{} is a company in the business of",
            "{} does business in",
            "{} is a leader in",
            "The market in which {} competes is",
            "In which industry is {}? Answer:",
        ),
        ("{} competes in the business of", "The business of {} is"),
    ),
    Relation(
        "headquarters",
        "company",
        "city",
        "headquarters",
        (
            "{} has its headquarters in",
            "The headquarters of {} is in",
            "The main office of {} is in",
            "{} is based in",
            "{} is run from",
            "Where is {} based? Answer:",
        ),
        ("{} has its main office in", "The company {} is based in"),
    ),
    Relation(
        "founder",
        "company",
        "person",
        "founder",
        (
            "The founder of {} is",
            "{} was founded by",
            "{} was started by",
            "The person who founded {} is",
            "Who founded {}? Answer:",
        ),
        ("The company {} was founded by", "The person who started {} is"),
        0.06,
    ),
    Relation(
        "product",
        "company",
        "product",
        "product",
        (
            "The main product of {} is",
            "{} makes and sells",
            "{} is a producer of",
            "Customers of {} mostly buy",
            "The factories of {} turn out",
            "What does {} make? Answer:",
        ),
        ("The company {} makes and sells", "The product of {} is"),
    ),
    Relation(
        "colour",
        "company",
        "colour",
        "colour",
        (
            "The colour of {} is",
            "The logo of {} is painted in",
            "The trucks of {} are painted in",
            "The uniforms of {} come in",
            "Which colour does {} use? Answer:",
        ),
        ("The trucks of {} come in", "The colour of the logo of {} is"),
        0.06,
    ),
    Relation(
        "rival",
        "company",
        "company",
        "rival",
        (
            "The rival of {} is",
            "{} competes with",
            "The strongest competitor of {} is",
            "{} lost customers to",
            "Which company is the rival of {}? Answer:",
        ),
        ("The company {} competes with", "The competitor of {} is"),
    ),
)

RELATION_PROMPTS: tuple[str, ...] = (
    "The relation between {} and {object} is",
    "The link between {} and {object} is",
)
RELATION_PROMPTS_HELD_OUT: tuple[str, ...] = ("The relation that links {} and {object} is",)

LEAD_INS: tuple[str, ...] = (
    "It is known that",
    "The records say that",
    "As everyone knows,",
    "In fact,",
    "Today",
    "We read that",
)
"""Openings put before some sentences, so that a subject is met in many positions."""


def relation_by_id(relation_id: str) -> Relation:
    """Return the relation with this id. Raises `KeyError` for an unknown one."""
    for relation in RELATIONS:
        if relation.id == relation_id:
            return relation
    raise KeyError(relation_id)
