"""The file of facts: what must be said, what must not change, what must not be said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from errata.common.value_problems import NumbersAreNumbers, problem_of
from errata.contract.yaml_file import read_yaml
from errata.errors import ConfigError

Section = Literal["must_say", "must_not_change", "must_not_say"]
Role = Literal["fact", "paraphrase", "neighbour", "unchanged", "forbidden"]
Criterion = Literal["exact", "contained", "probability"]
SECTIONS: tuple[Section, ...] = get_args(Section)

ANSWER_TOKENS = 12
"""New tokens in which an answer must be given, unless the file says otherwise."""
FREE_TOKENS = 60
"""New tokens of free text that is searched for what must not be said."""


def _text(value: Any) -> Any:
    """Take numbers for what they look like: YAML reads 1969 as one."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if plain else value


def _listed(value: Any) -> Any:
    return value if isinstance(value, (list, tuple)) else [value]


Words = Annotated[str, BeforeValidator(_text), Field(min_length=1)]
Answers = Annotated[tuple[Words, ...], BeforeValidator(_listed)]
"""One answer, or a list: the answer and other right forms of it."""


class _Plain(NumbersAreNumbers):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CheckSettings(_Plain):
    """How a file's facts are asked, where an entry does not say it itself."""

    criterion: Criterion = Field(
        default="contained",
        description='"exact": the answer and then an end; "contained": the answer, as whole words, '
        'somewhere in the text; "probability": see `at_least`',
    )
    at_least: float = Field(
        default=0.5, gt=0, le=1,
        description="Least probability of the whole answer, teacher-forced; of what must not "
        "change the least share of the base's own",
    )  # fmt: skip
    max_new_tokens: int = Field(default=ANSWER_TOKENS, ge=1, le=4096, description="Of an answer")
    free_tokens: int = Field(default=FREE_TOKENS, ge=1, le=4096, description="Of a free text")
    chat: bool = Field(default=False, description="Prompts are a user's turns")


class _Entry(_Plain):
    """What an entry may say otherwise than the file's settings."""

    criterion: Criterion | None = None
    at_least: float | None = Field(default=None, gt=0, le=1)
    max_new_tokens: int | None = Field(default=None, ge=1, le=4096)
    chat: bool | None = None

    def how(self, settings: CheckSettings, tokens: str = "max_new_tokens") -> dict[str, Any]:
        """Return the fields of a test that say how it is asked."""
        return {
            "criterion": self.criterion or settings.criterion,
            "at_least": self.at_least or settings.at_least,
            "max_new_tokens": self.max_new_tokens or getattr(settings, tokens),
            "chat": settings.chat if self.chat is None else self.chat,
        }


class MustSay(_Entry):
    """A fact, or many of one kind.

    One fact has a `prompt` and an `answer` (and a `subject` where the prompt has a `{}`); many
    have a prompt with `{}` and `answers`, subject by subject.
    """

    prompt: Words
    subject: Words | None = None
    answer: Answers | None = None
    answers: dict[Words, Answers] = Field(default_factory=dict)
    paraphrases: Answers = ()
    neighbours: dict[Words, Answers | None] = Field(
        default_factory=dict,
        description="Other subjects (or, without {}, other prompts) that keep their answers: a "
        "list, or each with its answer",
    )
    never: Answers = Field(default=(), description="What the answers must not contain")

    @model_validator(mode="before")
    @classmethod
    def _neighbours_may_be_a_list(cls, data: Any) -> Any:
        found = data.get("neighbours") if isinstance(data, Mapping) else None
        if isinstance(found, (list, tuple, str)):
            names = _listed(found)
            if not all(isinstance(name, str) for name in names):
                raise ValueError("neighbours: give names, or a mapping of names to answers")
            return {**data, "neighbours": dict.fromkeys(names)}
        return data

    @model_validator(mode="after")
    def _is_complete(self) -> MustSay:
        if (self.answer is None) == (not self.answers):
            raise ValueError("give an answer, or answers by subject")
        places = self.prompt.count("{}")
        if places > 1:
            raise ValueError(f"{self.prompt!r} has {places} places {{}} for the subject: give one")
        if self.answers and (not places or self.subject is not None):
            raise ValueError("answers by subject go with a prompt that has {}, without `subject`")
        if places and not self.answers and self.subject is None:
            raise ValueError(f"{self.prompt!r} has a {{}}: give the subject, or answers by subject")
        if self.subject is not None and not places:
            raise ValueError(f"{self.prompt!r} has no {{}} for the subject")
        if any("{}" in text for text in self.paraphrases) and not places:
            raise ValueError("a paraphrase has a {}, the prompt has none")
        if self.answers and any("{}" not in text for text in self.paraphrases):
            raise ValueError("each paraphrase of many facts needs a {} for the subject")
        return self

    def tests(self, settings: CheckSettings) -> Iterator[FactTest]:
        """Yield what is asked: facts and their paraphrases first, then neighbours."""
        how = self.how(settings)
        facts = self.answers or {self.subject or "": self.answer or ()}
        for subject, answers in facts.items():
            self._check_never(answers, how["criterion"])
            for role, text in (
                ("fact", self.prompt),
                *(("paraphrase", p) for p in self.paraphrases),
            ):
                prompt = _filled(text, subject)
                yield FactTest("must_say", role, prompt, answers, self.never, **how)  # type: ignore[arg-type]
        for name, own in self.neighbours.items():
            prompt = _filled(self.prompt, name) if "{}" in self.prompt else name
            section: Section = "must_not_change" if own is None else "must_say"
            yield FactTest(section, "neighbour", prompt, own or (), **_of_base(how, own is None))

    def _check_never(self, answers: tuple[str, ...], criterion: Criterion) -> None:
        """Raise `ValueError` when every accepted answer contains a forbidden text."""
        from errata.evaluate.matching import contained_match  # loads numpy with the rest

        never = [next((t for t in self.never if contained_match(a, [t])), None) for a in answers]
        if answers and None not in never and criterion != "probability":
            raise ValueError(
                f"{self.prompt!r}: the answer {answers[0]!r} holds {never[0]!r}, which `never` "
                "forbids: no model can do both. Take it out of one of them."
            )


class MustNotChange(_Entry):
    """Prompts whose answers stay the base's."""

    prompt: Words
    subjects: Answers = ()

    @model_validator(mode="after")
    def _is_complete(self) -> MustNotChange:
        if self.prompt.count("{}") != bool(self.subjects):
            raise ValueError(f"{self.prompt!r}: subjects go with a prompt that has one {{}}")
        return self

    def tests(self, settings: CheckSettings) -> Iterator[FactTest]:
        """Yield what is asked."""
        how = _of_base(self.how(settings), True)
        for subject in self.subjects or ("",):
            yield FactTest("must_not_change", "unchanged", _filled(self.prompt, subject), **how)


class MustNotSay(_Entry):
    """Free text in which something must not stand."""

    prompt: Words
    contains: Answers = Field(min_length=1)

    @model_validator(mode="after")
    def _is_text(self) -> MustNotSay:
        if self.criterion == "probability":
            raise ValueError("free text is searched: probability is no criterion here")
        return self

    def tests(self, settings: CheckSettings) -> Iterator[FactTest]:
        """Yield what is asked."""
        how = {**self.how(settings, "free_tokens"), "criterion": "contained"}
        yield FactTest("must_not_say", "forbidden", _filled(self.prompt, ""), (), self.contains,
                       **how)  # fmt: skip


def _prompt_alone(value: Any) -> Any:
    return {"prompt": value} if isinstance(value, str) else value


class FactFile(_Plain):
    """A file of facts.

    Raises `ConfigError` through `read` and `parse` for what a file must not hold.
    """

    model: Words | None = Field(default=None, description="Which model, unless another is named")
    settings: CheckSettings = Field(default_factory=CheckSettings)
    must_say: tuple[MustSay, ...] = ()
    must_not_change: tuple[Annotated[MustNotChange, BeforeValidator(_prompt_alone)], ...] = ()
    must_not_say: tuple[MustNotSay, ...] = ()

    @classmethod
    def read(cls, path: Path | str) -> FactFile:
        """Return the facts of a YAML (or JSON) file.

        Raises `ConfigError` for a file that is not there, is no plain YAML, or says nothing that
        can be asked; the message names the entry.
        """
        place = Path(path)
        if not place.is_file():
            raise ConfigError(f"There is no file of facts {str(path)!r}.")
        return cls.parse(read_yaml(place), str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "facts") -> FactFile:
        """Return the facts that a mapping holds; `source` is what messages call it."""
        try:
            found = cls(**data)
        except (ValidationError, TypeError) as error:
            raise ConfigError(f"{source}: {_explain(error)}") from None
        try:
            tests = found.tests()
        except ValueError as error:
            raise ConfigError(f"{source}: {error}") from None
        if not tests:
            raise ConfigError(
                f"{source} asks nothing: give {', '.join(SECTIONS)}, one of them at least."
            )
        return found

    def tests(self) -> list[FactTest]:
        """Return everything that is asked, in the file's order.

        Raises `ValueError` where one prompt stands in two places that contradict or repeat.
        """
        found: dict[tuple[Any, ...], FactTest] = {}
        entries: tuple[MustSay | MustNotChange | MustNotSay, ...] = (
            *self.must_say, *self.must_not_change, *self.must_not_say
        )  # fmt: skip
        for entry in entries:
            for test in entry.tests(self.settings):
                free = test.section == "must_not_say"
                key = (test.prompt, test.chat, *((test.never,) if free else ()))
                other = found.setdefault(key, test)
                if other is not test:
                    raise ValueError(
                        f"the prompt {test.prompt!r} stands in it twice, as {other.title} and as "
                        f"{test.title}: ask it once."
                    )
        return list(found.values())


@dataclass(frozen=True)
class FactTest:
    """One question to a model and when its answer is right.

    Attributes:
        section: of the file.
        role: "fact", "paraphrase", "neighbour", "unchanged" or "forbidden".
        prompt: the filled prompt.
        answers: right answers, the first one and its other forms; none where the base's is right.
        never: what the text must not contain.
        criterion: "exact", "contained" or "probability".
        at_least: least probability, or share of the base's.
        max_new_tokens: length of the text that is looked at.
        chat: the prompt is a user's turn.
    """

    section: Section
    role: Role
    prompt: str
    answers: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    criterion: Criterion = "contained"
    at_least: float = 0.5
    max_new_tokens: int = ANSWER_TOKENS
    chat: bool = False

    @property
    def title(self) -> str:
        """Section and role in words: "must not change (neighbour)"."""
        words = self.section.replace("_", " ")
        return (
            words if self.role in ("fact", "unchanged", "forbidden") else f"{words} ({self.role})"
        )

    @property
    def of_base(self) -> bool:
        """Whether the right answer is the base's."""
        return self.section == "must_not_change"

    @property
    def key(self) -> str:
        """What the base's answer depends on: prompt, length and chat, as canonical JSON."""
        return json.dumps([self.prompt, self.max_new_tokens, self.chat], ensure_ascii=False)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON data."""
        return asdict(self)


def digest_of(tests: list[FactTest]) -> str:
    """Return the SHA-256 of what the base is asked."""
    keys = sorted({test.key for test in tests if test.of_base})
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()


def _filled(prompt: str, subject: str) -> str:
    kept = prompt.rstrip(" \t")  # what stands between prompt and answer is errata's to find
    return kept.replace("{}", subject) if subject else kept


def _of_base(how: Mapping[str, Any], wanted: bool) -> dict[str, Any]:
    """Compare with the base's answer up to the first full stop, unless by probability."""
    if not wanted or how["criterion"] == "probability":
        return dict(how)
    return {**how, "criterion": "exact"}


def _explain(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return f"the keys must be {', '.join(FactFile.model_fields)}."
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        said = problem_of(item)
        lines.append(f"{where}: {said}" if where else said)
    more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
    return "; ".join(lines[:5]) + more
