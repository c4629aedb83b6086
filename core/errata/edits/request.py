"""Requests: what should change, and the prompts that test whether it did."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from errata.errors import RequestError, UnknownNameError
from errata.model.arguments import is_list, is_whole, mapping_of

Kind = Literal["modify", "insert", "erase", "relation", "sentiment", "text", "label"]
KINDS: tuple[str, ...] = get_args(Kind)

ERASED = "unknown"
"""What an `erase` request writes in place of the fact when it names no target of its own."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Probe(_Frozen):
    """A prompt to test with, and the answers that count as right.

    `answers` keeps every alias; `type` names the sub-kind a benchmark gives it
    (for portability: "two_hop", "subject_alias"; for locality: "relation_specificity" …).
    Probes with the same `group` are phrasings of one question (MQuAKE asks each three ways).
    """

    prompt: str
    answers: tuple[str, ...] = ()
    type: str = ""
    group: str = ""


class RelationView(_Frozen):
    """The same change seen from the relation's side: which relation joins subject and object?

    An edit (s, r, o → o*) also says that r now joins s and o*, and no longer s and o (RaKE, Wei
    et al. 2023).
    """

    names: tuple[str, ...] = Field(min_length=1, description="Forms of the relation's name")
    add: str = Field(description="Template naming s ({}) and o*: its answer becomes the relation")
    remove: str = Field(description="Template naming s ({}) and o: the relation stops being it")
    paraphrases: tuple[str, ...] = Field(default=(), description="Filled, same meaning as `add`")
    remove_paraphrases: tuple[str, ...] = Field(default=(), description="Same, for `remove`")
    specificity: tuple[Probe, ...] = Field(
        default=(),
        description='Must keep their answers: types "same_relation" (other pairs of this relation)'
        ' and "same_pair" (other relations of this subject)',
    )

    @field_validator("add", "remove")
    @classmethod
    def _has_one_place(cls, value: str) -> str:
        if value.count("{}") != 1:
            raise ValueError(f"{value!r} needs exactly one {{}} for the subject")
        return value


class Request(_Frozen):
    """One change: a prompt template with one `{}` for the subject, the subject and the target.

    >>> Request(prompt="The capital of {} is", subject="France", target_new="Rome").text
    'The capital of France is'

    Targets carry no leading space; `errata.model.tokens` adds the one that the tokenizer needs.
    Raises `RequestError` through `Request.parse` (and pydantic's ValidationError directly).
    """

    prompt: str = Field(description="Template with exactly one {} where the subject goes")
    subject: str = Field(description="The subject, as it stands in the prompt")
    target_new: str = Field(default="", description="What the model should say afterwards")
    target_true: str | None = Field(default=None, description="What it says (or should say) now")
    relation: str | None = Field(default=None, description="Relation id, for example P27")
    kind: Kind = Field(default="modify", description="What sort of change this is")
    case_id: str | None = Field(
        default=None,
        description="The benchmark's id of this case; requests that share it are edited together",
    )
    aliases: tuple[str, ...] = Field(default=(), description="Other right forms of target_new")
    paraphrases: tuple[str, ...] = Field(default=(), description="Filled prompts, same meaning")
    neighbourhood: tuple[Probe, ...] = Field(
        default=(), description="Other subjects, same relation: must keep their answers"
    )
    locality: tuple[Probe, ...] = Field(
        default=(), description="Anything else that must not change (same subject, other relation)"
    )
    portability: tuple[Probe, ...] = Field(
        default=(), description="What should follow from the change (two-hop, alias, reversal)"
    )
    generation: tuple[str, ...] = Field(default=(), description="Prompts for free generation")
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
        default=(), description="Texts that show the opposite of the wished behaviour"
    )
    relation_view: RelationView | None = Field(
        default=None, description="The change seen from the relation's side"
    )

    @field_validator("case_id", mode="before")
    @classmethod
    def _case_id_is_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_validator("neighbourhood", "locality", "portability", "attribute", mode="before")
    @classmethod
    def _plain_prompts_are_probes(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple({"prompt": item} if isinstance(item, str) else item for item in value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _erase_has_a_target(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and data.get("kind") == "erase" and not data.get("target_new"):
            return {**data, "target_new": ERASED}
        return data

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
        if not self.target_new.strip():
            raise ValueError("target_new is empty: say what the model should answer")
        return self

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace("{}", self.subject)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: two requests with one digest are the same request."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def parse(cls, value: Request | Mapping[str, Any] | None = None, **fields: Any) -> Request:
        """Return a request from a request, a mapping or keyword fields.

        A prompt that holds the subject instead of `{}` is turned into a template when the
        subject occurs in it exactly once. Raises `RequestError` naming each wrong field.
        """
        if isinstance(value, Request):
            return value
        if value is not None and not isinstance(value, Mapping):
            raise RequestError(
                f"{value!r} is no request: give a Request, or a mapping with prompt, subject and "
                "target_new."
            )
        data = {**(value or {}), **fields}
        unknown = [key for key in data if key not in cls.model_fields]
        if unknown:
            raise RequestError(
                str(UnknownNameError("request field", str(unknown[0]), cls.model_fields))
            )
        prompt, subject = data.get("prompt"), data.get("subject")
        if isinstance(prompt, str) and isinstance(subject, str) and subject and "{}" not in prompt:
            data["prompt"] = _template(prompt, subject)
        try:
            return cls(**data)
        except ValidationError as error:
            raise RequestError(_explain(error, data)) from None


def parse_requests(
    value: Request | Mapping[str, Any] | Iterable[Request | Mapping[str, Any]],
) -> list[Request]:
    """Return requests from one or many; refuse an empty list and exact duplicates."""
    if not is_list(value) and not isinstance(value, Request):
        raise RequestError(f"{value!r} is no request and no list of requests.")
    many = [value] if isinstance(value, (Request, Mapping)) else list(value)
    requests = [Request.parse(item) for item in many]
    if not requests:
        raise RequestError("No requests were given: pass at least one.")
    seen: dict[str, int] = {}
    for index, request in enumerate(requests):
        first = seen.setdefault(request.digest, index)
        if first != index:
            raise RequestError(
                f"Requests {first} and {index} are the same "
                f"({request.text!r} → {request.target_new!r}): give each change once."
            )
    return requests


def parse_arguments(
    request: Any, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[bool, list[Request], dict[str, Any]]:
    """Tell request fields from hyper-parameters among keyword arguments.

    Returns (whether one request was meant, the requests, the hyper-parameters).
    """
    mine = {key: value for key, value in fields.items() if key in Request.model_fields}
    overrides = mapping_of(config, "config") | {k: v for k, v in fields.items() if k not in mine}
    if isinstance(request, str):
        if request:
            mine["prompt"] = request
        if not mine:
            raise RequestError("Say what to edit: a prompt with {}, subject=… and target_new=….")
        return True, [Request.parse(mine)], overrides
    if mine:
        raise RequestError(
            f"{', '.join(mine)} given beside whole requests: put them into the requests."
        )
    return isinstance(request, (Request, Mapping)), parse_requests(request), overrides


def _template(prompt: str, subject: str) -> str:
    count = prompt.count(subject)
    if count == 1:
        return prompt.replace(subject, "{}")
    raise RequestError(
        f"The subject {subject!r} occurs {count} times in the prompt {prompt!r}; put {{}} where "
        "the subject goes (for example 'The capital of {} is')."
    )


def _explain(error: ValidationError, data: Mapping[str, Any]) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"]) or "request"
        lines.append(f"{where}: {item['msg'].removeprefix('Value error, ')}")
    shown = {k: v for k, v in data.items() if k in ("prompt", "subject", "target_new", "kind")}
    return f"Bad request {shown!r}: " + "; ".join(lines)
