"""OpenAI's interface: what is asked, and what is answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from errata.common.arguments import is_whole
from errata.errors import RequestError, UnknownNameError
from errata.model.chat import rendered_turns
from errata.model.sampling import Sampling

if TYPE_CHECKING:
    from errata.editor import Editor
    from errata.serve.batching import Finish

UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "logprobs": (False, 0), "top_logprobs": (0,), "echo": (False,),
    "suffix": ("",), "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],),
    "function_call": ("none", "auto"), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "top_k": (0, -1), "min_p": (0,), "repetition_penalty": (1,),
    "length_penalty": (1,), "min_tokens": (0,), "ignore_eos": (False,),
    "use_beam_search": (False,), "skip_special_tokens": (True,),
}  # fmt: skip
"""Fields that would change an answer and that errata does not carry out → what they may be."""

HARMLESS = frozenset(
    {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
        "prompt_cache_retention", "prediction", "parallel_tool_calls",
    }
)  # fmt: skip
"""Fields that clients send for OpenAI's accounts, and that change no answer: taken, not used."""


class RequestBody(BaseModel):
    """A body that a client sends: fields that are known, and texts that can be written."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _whole_texts(cls, value: Any) -> Any:
        # JSON may write half a character ("\ud83d"), which no tokenizer and no answer can hold.
        for text in _texts(value):
            if not is_whole(text):
                raise ValueError(f"{text[:80]!r} holds half a character (a lone surrogate)")
        return value


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in JSON data, names included."""
    left = [value]  # no recursion: it may be nested more deeply than calls may be
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, (list, dict)):
            left += [*one, *one.values()] if isinstance(one, dict) else one


class EditChoice(RequestBody):
    """Which edits one request takes; without it those that are on the model."""

    only: list[str] | None = Field(default=None, description="Exactly these; [] for the base")
    without: list[str] | None = Field(default=None, description="The active ones but these")

    @model_validator(mode="after")
    def _one_of_them(self) -> EditChoice:
        if self.only is not None and self.without is not None:
            raise ValueError("give only or without")
        return self


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(RequestBody):
    """What a stream has besides its text."""

    include_usage: bool = Field(default=False, description="The last part counts the tokens")
    include_obfuscation: bool = Field(default=False, description="Never done")


class _Asked(RequestBody):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=10, description="None or 0: greedy")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    stop: Annotated[list[str], BeforeValidator(lambda v: _as_list(v) or [])] = Field(
        default_factory=list, max_length=16
    )
    stream: bool = False
    stream_options: StreamOptions | None = None
    errata: EditChoice = Field(default_factory=EditChoice)

    @model_validator(mode="after")
    def _nothing_is_ignored_in_silence(self) -> _Asked:
        for name, value in (self.model_extra or {}).items():
            if name in HARMLESS:
                continue
            if name not in UNSUPPORTED:
                raise ValueError(str(UnknownNameError("field", name, type(self).model_fields)))
            if value is not None and value not in UNSUPPORTED[name]:
                raise ValueError(f"{name} is not supported: leave it out")
        return self

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        if not self.temperature:
            return Sampling()
        seed = secrets.randbits(32) if self.seed is None else self.seed
        top_p = 1.0 if self.top_p is None else self.top_p
        return Sampling(True, self.temperature, top_p=top_p, seed=seed)


class CompletionAsked(_Asked):
    """`POST /v1/completions`."""

    prompt: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1, max_length=64)


class ChatTurn(BaseModel):
    """One message."""

    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[dict[str, Any]]

    @property
    def text(self) -> str:
        """Its text; raise `RequestError` for pictures and the like."""
        if isinstance(self.content, str):
            return self.content
        parts = [part.get("text") for part in self.content if part.get("type") == "text"]
        if len(parts) < len(self.content) or not all(isinstance(text, str) for text in parts):
            raise RequestError("A message may hold text only.")
        return "".join(map(str, parts))

    @model_validator(mode="after")
    def _nothing_is_ignored_in_silence(self) -> ChatTurn:
        # An answer that is sent back has all of OpenAI's fields, most of them empty.
        for name, value in (self.model_extra or {}).items():
            if value:
                raise ValueError(f"{name} of a message is not supported: leave it out")
        return self


class ChatAsked(_Asked):
    """`POST /v1/chat/completions`."""

    messages: list[ChatTurn] = Field(min_length=1, max_length=1024)
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> ChatAsked:
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("give max_tokens or max_completion_tokens: they differ")
        return self

    def prompt(self, editor: Editor) -> str:
        """Return the messages as the model's chat template writes them.

        Raises `ConfigError` for a model without one, or turns that it does not take.
        """
        turns = [(turn.role, turn.text) for turn in self.messages]
        return rendered_turns(editor.model.tokenizer, turns, asks=True)


# -- models ----------------------------------------------------------------------------------------


def public_name(editor: Editor) -> str:
    """Return what the model is called: its name, or the last part of its path."""
    return editor.model.name.rstrip("/").rsplit("/", 1)[-1]


def active_edits(editor: Editor) -> list[str]:
    """Return the ids of the edits that are on, in ledger order.

    They are the ledger's: on the model there may be, for the length of a batch, those of a
    request that takes others.
    """
    return [edit for edit in editor.ledger.active_ids() if edit not in editor.damaged]


def models(editor: Editor) -> dict[str, Any]:
    """Return the list of models: as it stands, its base, and each active edit alone.

    `NAME@base`, `NAME@ID` and `NAME@ID+ID` say which edits a client gets that cannot send
    `errata`.
    """
    name = public_name(editor)
    names = [name, f"{name}@base", *(f"{name}@{edit}" for edit in active_edits(editor))]
    data = [{"id": n, "object": "model", "created": 0, "owned_by": "errata"} for n in names]
    return {"object": "list", "data": data}


def chosen_edits(editor: Editor, asked: _Asked) -> tuple[str, ...] | None:
    """Return the ids of the edits that a request takes, in ledger order; None: the active ones.

    Raises `UnknownNameError` for a model or an edit that there is not, `RequestError` where the
    model's name and `errata` both choose.
    """
    name, sign, tail = asked.model.partition("@")
    if name and name not in (public_name(editor), editor.model.name):
        known = [one["id"] for one in models(editor)["data"]]
        raise UnknownNameError("model", asked.model, known)
    choice = asked.errata
    only = choice.only
    if sign:
        if only is not None or choice.without is not None:
            raise RequestError(
                f"The model {asked.model!r} and `errata` both choose edits: give one."
            )
        only = [] if tail == "base" else tail.split("+")
    if choice.without is not None:
        gone = {editor.ledger.resolve(edit) for edit in choice.without}
        return tuple(edit for edit in active_edits(editor) if edit not in gone)
    if only is None:
        return None
    wanted = {editor.ledger.resolve(edit) for edit in only}
    return tuple(edit for edit in editor.ledger.ids() if edit in wanted)


# -- answers ---------------------------------------------------------------------------------------


def body(
    kind: str, name: str, ident: str, choices: Sequence[Mapping[str, Any]], **more: Any
) -> dict[str, Any]:
    """Return the body of an answer or of one part of a stream."""
    made = {"id": ident, "object": kind, "created": int(time.time()), "model": name}
    return {**made, "choices": list(choices), **more}


def new_ident(chat: bool) -> str:
    """Return a fresh id of an answer."""
    return f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"


def choice(
    index: int,
    text: str,
    finish: Finish | None,
    *,
    chat: bool,
    part: bool = False,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one text as OpenAI writes it; `part`: of a stream.

    `details`: what is known of how it came about; it stands beside the text where there is any.
    """
    said: dict[str, Any] = {"text": text}
    if chat:
        turn = {"role": "assistant", "content": text}
        said = {"delta": {"content": text} if text else {}} if part else {"message": turn}
    made = {"index": index, **said, "logprobs": None, "finish_reason": finish}
    return {**made, "errata": {"details": dict(details)}} if details else made


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI writes it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
