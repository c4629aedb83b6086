"""Requests: what should change, and the prompts that test whether it did."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from errata.common.arguments import is_whole
from errata.common.display import Described, shortened
from errata.edits.request_problems import check_fields, explained
from errata.edits.subjects import template_of
from errata.errors import RequestError, first_few
from errata.model.joining import with_join

logger = logging.getLogger("errata")

Kind = Literal["modify", "insert", "erase", "relation", "sentiment", "text", "label"]
KINDS: tuple[str, ...] = get_args(Kind)

Operation = Literal["add", "delete", "both"]
"""What a request of kind `relation` does with the relation of a pair."""
OPERATIONS: tuple[Operation, ...] = get_args(Operation)


class _Frozen(Described, BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _said(value: Any) -> Any:
    """Return forms of an answer without those that say nothing, such as an empty alias."""
    if isinstance(value, (list, tuple)):
        return tuple(form for form in value if not isinstance(form, str) or form.strip())
    return value


Forms = Annotated[tuple[str, ...], BeforeValidator(_said)]


class Probe(_Frozen):
    """A prompt to test with, and the answers that count as right.

    `answers` keeps every alias; `type` names the sub-kind a benchmark gives it
    (for portability: "two_hop", "subject_alias"; for locality: "relation_specificity" …).
    Probes with the same `group` are phrasings of one question (MQuAKE asks each three ways).
    """

    prompt: str
    answers: Forms = ()
    type: str = ""
    group: str = ""

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "", repr(shortened(self.prompt))
        if self.answers:
            yield "answers", repr(shortened(" | ".join(self.answers)))
        if self.type:
            yield "type", self.type


class RelationView(_Frozen):
    """The same change seen from the relation's side: which relation joins subject and object?

    An edit (s, r, o → o*) also says that r now joins s and o*, and no longer s and o (RaKE, Wei
    et al. 2023).
    """

    names: Forms = Field(min_length=1, description="Forms of the relation's name")
    add: str = Field(description="Template naming s ({}) and o*: its answer becomes the relation")
    remove: str = Field(description="Template naming s ({}) and o: the relation stops being it")
    paraphrases: tuple[str, ...] = Field(default=(), description="Filled, same meaning as `add`")
    remove_paraphrases: tuple[str, ...] = Field(default=(), description="Same, for `remove`")
    specificity: tuple[Probe, ...] = Field(
        default=(),
        description='Must keep their answers: types "same_relation" (other pairs of this relation)'
        ' and "same_pair" (other relations of this subject)',
    )

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "", repr(shortened(" | ".join(self.names)))
        yield "add", repr(shortened(self.add))
        yield "remove", repr(shortened(self.remove))

    @field_validator("add", "remove")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"{value!r} needs exactly one {{}} for the subject")
        return value


def _with_subject(text: Any, subject: str) -> Any:
    """Return a text with the subject in the place of {}; done again, it changes nothing.

    A record is parsed whenever it is read, and a subject may hold {} itself.
    """
    if not isinstance(text, str) or ("{}" in subject and subject in text):
        return text
    return text.replace("{}", subject)


class Request(_Frozen):
    """One change: a prompt template with one `{}` for the subject, the subject and the target.

    >>> Request(prompt="The capital of {} is", subject="France", target_new="Rome").text
    'The capital of France is'

    Targets carry no leading space: `errata.model.joining` puts one where the scripts use it, and
    `join` says what stands there where that rule is wrong. Raises `RequestError` through
    `Request.parse` (and pydantic's ValidationError directly).
    """

    prompt: str = Field(description="Template with exactly one {} where the subject goes")
    subject: str = Field(description="The subject, as it stands in the prompt")
    target_new: str = Field(
        default="",
        description="What the model should say afterwards; of an erasure the refusal, if any; of a "
        "relation that is deleted nothing",
    )
    target_true: str | None = Field(default=None, description="What it says (or should say) now")
    target_true_from_model: bool = Field(
        default=False,
        description="target_true was not given: it is what the model said before this was erased",
    )
    relation: str | None = Field(default=None, description="Relation id, for example P27")
    kind: Kind = Field(default="modify", description="What sort of change this is")
    operation: Operation | None = Field(
        default=None,
        description="Of kind relation: add (target_new is said after prompt; the default), delete "
        "(target_true is no longer said there), both (target_new is no longer said after remove)",
    )
    remove: str | None = Field(
        default=None,
        description="Template with one {}: names s and the object that the relation is taken from",
    )
    case_id: str | None = Field(
        default=None,
        description="The benchmark's id of this case; requests that share it are edited together",
    )
    aliases: Forms = Field(default=(), description="Other right forms of target_new")
    paraphrases: tuple[str, ...] = Field(
        default=(), description="Prompts that mean the same; {} becomes the subject"
    )
    neighbourhood: tuple[Probe, ...] = Field(
        default=(), description="Other subjects, same relation: must keep their answers"
    )
    locality: tuple[Probe, ...] = Field(
        default=(), description="Anything else that must not change (same subject, other relation)"
    )
    portability: tuple[Probe, ...] = Field(
        default=(), description="What should follow from the change (two-hop, alias, reversal)"
    )
    generation: tuple[str, ...] = Field(
        default=(), description="Prompts for free generation; {} becomes the subject"
    )
    attribute: tuple[Probe, ...] = Field(
        default=(), description="Other subjects for which target_new is true already"
    )
    references: tuple[str, ...] = Field(
        default=(), description="Texts about subjects with target_new, to compare generations with"
    )
    examples: tuple[str, ...] = Field(
        default=(), description="Texts that show the wished behaviour (of a sentiment: replies)"
    )
    counterexamples: tuple[str, ...] = Field(
        default=(),
        description="Texts that show the opposite of the wished behaviour; of an insertion: "
        "prompts after which the target would be wrong",
    )
    relation_view: RelationView | None = Field(
        default=None, description="The change seen from the relation's side"
    )
    join: str | None = Field(
        default=None,
        description='What stands between a prompt and its answer, "" or white space; None: a space '
        "where the scripts use one",
    )
    chat: bool | tuple[str, str] = Field(
        default=False,
        description="True: each prompt is what a user says, to be rendered by the tokenizer's chat "
        "template; (before, after): it is rendered, and these stand around it",
    )
    max_tokens: int | None = Field(
        default=None, ge=1, description="Longer prompts are cut to so many tokens (or the model's)"
    )

    @field_validator("join")
    @classmethod
    def _join_is_white_space(cls, value: str | None) -> str | None:
        if value is not None and value.strip():
            raise ValueError(f"{value!r} is a text: give '' or white space, the rest as prompt")
        return value

    @field_validator("target_new", mode="before")
    @classmethod
    def _none_is_no_target(cls, value: Any) -> Any:
        return "" if value is None else value

    @field_validator("case_id", mode="before")
    @classmethod
    def _case_id_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("neighbourhood", "locality", "portability", "attribute", mode="before")
    @classmethod
    def _plain_prompts_are_probes(cls, value: Any) -> Any:
        if value and isinstance(value, (list, tuple)):
            return tuple({"prompt": item} if isinstance(item, str) else item for item in value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _the_subject_fills_its_place_everywhere(cls, data: Any) -> Any:
        """Fields are known ones; who writes {} in the prompt writes it in a paraphrase, too."""
        check_fields(data if isinstance(data, Mapping) else {}, cls.model_fields)
        subject = data.get("subject") if isinstance(data, Mapping) else None
        if not isinstance(subject, str):
            return data
        filled = {
            name: tuple(_with_subject(text, subject) for text in data[name])
            for name in ("paraphrases", "generation")
            if isinstance(data.get(name), (list, tuple))
        }
        return {**data, **filled}

    @model_validator(mode="after")
    def _is_complete(self) -> Request:
        if not self.subject.strip():
            raise ValueError("subject is empty: give the name that the fact is about")
        if self.prompt.count("{}") != 1:
            raise ValueError(
                f"prompt {self.prompt!r} has {self.prompt.count('{}')} places for the subject; "
                "it needs exactly one {} (for example 'The capital of {} is')"
            )
        if not is_whole(json.dumps(self.model_dump(), ensure_ascii=False)):
            raise ValueError("a text holds half a character (a lone surrogate)")
        deletes = self.kind == "relation" and self.operation == "delete"
        if not self.target_new.strip() and self.kind != "erase" and not deletes:
            is_what = "empty" if "target_new" in self.model_fields_set else "missing"
            raise ValueError(f"target_new is {is_what}: say what the model should answer")
        self._check_operation()
        return self

    def _check_operation(self) -> None:
        if self.operation is not None and self.kind != "relation":
            raise ValueError(f"operation {self.operation!r} is for requests of kind 'relation'")
        if self.operation == "delete" and not self.target_true:
            raise ValueError("operation 'delete' needs target_true: the relation to be deleted")
        if (self.operation == "both") != (self.remove is not None):
            raise ValueError(
                "operation 'both' needs remove, the prompt that the relation is deleted from; "
                "no other one takes it"
            )
        if self.remove is not None and self.remove.count("{}") != 1:
            raise ValueError(f"remove {self.remove!r} needs exactly one {{}} for the subject")

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "", f"{shortened(self.text)!r} → {shortened(self.wish, 40)!r}"
        yield "", f"{self.kind} {self.operation or ''}".strip()
        for name in ("target_true", "relation", "case_id"):
            if value := getattr(self, name):
                yield name, repr(shortened(value, 40))
        for name in ("paraphrases", "neighbourhood", "locality", "portability", "generation",
                     "attribute", "references", "examples", "counterexamples"):  # fmt: skip
            if count := len(getattr(self, name)):
                yield name, str(count)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.filled(self.prompt)

    def filled(self, template: str) -> str:
        """Return a template with the subject in the place of {}."""
        return template.replace("{}", self.subject)

    @property
    def target(self) -> str:
        """`target_new` for `prepare` and `score_targets`: with what `join` puts before it."""
        return self.joined(self.target_new)

    @property
    def wish(self) -> str:
        """What the request asks for, in a few words for people."""
        return wish_of(dict(self))

    def joined(self, answer: str) -> str:
        """Return an answer to one of the request's prompts with what `join` puts before it."""
        return with_join(answer, self.join) if answer else ""

    @property
    def plain(self) -> Request:
        """The request as it was before its prompts were rendered for a chat."""
        if not isinstance(self.chat, tuple):
            return self
        before, after = self.chat
        bare = self.with_prompts(lambda text: text.removeprefix(before).removesuffix(after))
        return bare.model_copy(update={"chat": True})

    @property
    def as_given(self) -> Request:
        """The request without what was found by a model: how its chat is rendered, what it says."""
        found = {"target_true": None, "target_true_from_model": False}
        return self.plain.model_copy(update=found) if self.target_true_from_model else self.plain

    def every_prompt(self) -> Iterator[str]:
        """Yield each prompt, those to test with too; the relation's side apart."""
        yield from (self.prompt, *self.paraphrases, *self.generation)
        yield from () if self.remove is None else (self.remove,)
        yield from self.wrong_prompts
        for probes in (self.neighbourhood, self.locality, self.portability, self.attribute):
            yield from (probe.prompt for probe in probes)

    @property
    def wrong_prompts(self) -> tuple[str, ...]:
        """The counterexamples that are prompts: all but those of a sentiment, which are replies."""
        return () if self.kind == "sentiment" else self.counterexamples

    def with_prompts(self, change: Callable[[str], str]) -> Request:
        """Return the request with every prompt changed, those to test with too."""
        fields: dict[str, Any] = {"prompt": change(self.prompt)}
        if self.remove is not None:
            fields["remove"] = change(self.remove)
        for name in ("paraphrases", "generation"):
            fields[name] = tuple(map(change, getattr(self, name)))
        if self.wrong_prompts:
            fields["counterexamples"] = tuple(map(change, self.wrong_prompts))
        for name in ("neighbourhood", "locality", "portability", "attribute"):
            fields[name] = _asked(getattr(self, name), change)
        if (view := self.relation_view) is not None:
            fields["relation_view"] = view.model_copy(
                update={
                    **{name: change(getattr(view, name)) for name in ("add", "remove")},
                    "paraphrases": tuple(map(change, view.paraphrases)),
                    "remove_paraphrases": tuple(map(change, view.remove_paraphrases)),
                    "specificity": _asked(view.specificity, change),
                }
            )
        return self.model_copy(update=fields)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two requests with one digest are the same request."""
        data = self.as_given.model_dump(mode="json")
        later = ("join", "chat", "operation", "remove", "max_tokens", "target_true_from_model")
        for name in later:  # fields that came later count where they are set
            if data[name] in (None, False):
                del data[name]
        canonical = json.dumps(data, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def parse(cls, value: Request | Mapping[str, Any] | None = None, **fields: Any) -> Request:
        """Return a request from a request, a mapping or keyword fields.

        A prompt that holds the subject instead of `{}` is turned into a template when the
        subject stands in it exactly once as words of its own. White space where prompt and answer
        meet is taken off, and a warning says so. Raises `RequestError` naming each wrong field.
        """
        if value is None or isinstance(value, Mapping):
            value = {**(value or {}), **fields}
        request, notes = parse_noting(value)
        warn_of_white_space(notes)
        return request


def wish_of(fields: Mapping[str, Any]) -> str:
    """Return what a request with these fields asks for, in a few words for people."""
    target = str(fields.get("target_new") or "")
    if not target or fields.get("operation") == "delete":
        return f"no longer {fields.get('target_true') or 'what is said there'}"
    return target


def parse_noting(value: Request | Mapping[str, Any]) -> tuple[Request, list[str]]:
    """Return what `Request.parse` does, and the fields that lost white space instead of a warning.

    Whoever parses many requests hands all the fields to `warn_of_white_space` together.
    """
    if isinstance(value, Request):
        return _tidy(value)
    if not isinstance(value, Mapping):
        raise RequestError(
            f"{value!r} is no request: give a Request, or a mapping with prompt, subject and "
            "target_new."
        )
    data = dict(value)
    check_fields(data, Request.model_fields)
    prompt, subject = data.get("prompt"), data.get("subject")
    if isinstance(prompt, str) and isinstance(subject, str) and subject and "{}" not in prompt:
        data["prompt"] = template_of(prompt, subject)
    try:
        return _tidy(Request(**data))
    except ValidationError as error:
        raise RequestError(explained(error, data)) from None


def warn_of_white_space(notes: Sequence[str]) -> None:
    """Say where white space was taken off, in one warning."""
    if notes:
        logger.warning(
            "White space was taken off: at the ends of %s. What stands between a prompt and its "
            "answer is errata's to find; `join` says it where that is wrong.", first_few(notes, 1),
        )  # fmt: skip


def _asked(probes: Iterable[Probe], change: Callable[[str], str]) -> tuple[Probe, ...]:
    """Return probes with their prompts changed."""
    return tuple(probe.model_copy(update={"prompt": change(probe.prompt)}) for probe in probes)


def _tidy(request: Request) -> tuple[Request, list[str]]:
    """Return a request without white space around its subject, and where prompts and answers meet.

    Beside it, what that changed. A line break at a prompt's end is meant, and stays.
    """
    if isinstance(request.chat, tuple):
        return request, []
    texts = {
        "subject": request.subject,
        "target_new": request.target_new,
        "target_true": request.target_true or "",
    }
    changed = {name: text.strip() for name, text in texts.items() if text != text.strip()}
    if not changed and not any(text[-1:].isspace() for text in request.every_prompt()):
        return request, []
    made = request.with_prompts(_without_end).model_copy(update=changed)
    if made == request:  # what they end with is a line break
        return request, []
    notes = [f"{name} {_ends(texts[name])!r}" for name in changed]
    if made.prompt != request.prompt:
        notes.append(f"prompt {_ends(request.prompt)!r}")
    return made, notes or [f"a prompt to test {_ends(request.text)!r} with"]


def _ends(text: str) -> str:
    """Return a text, of a long one how it begins and ends."""
    return text if len(text) <= 60 else f"{text[:40]}…{text[-19:]}"


def _without_end(prompt: str) -> str:
    """Return a prompt without white space at its end, up to the last line break."""
    kept = prompt.rstrip()
    gap = prompt[len(kept) :]
    return kept + gap[: gap.rfind("\n") + 1] if kept else prompt
