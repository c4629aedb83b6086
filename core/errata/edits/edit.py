"""The edit: an immutable record of one change, complete enough to be repeated elsewhere."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Collection, Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator

from errata.common.display import Described, shortened
from errata.edits.outcome import Outcome
from errata.edits.request import Request
from errata.errors import IntegrityError, LedgerError

if TYPE_CHECKING:
    from errata.edits.delta import Delta

ID_ALPHABET = frozenset("0123456789abcdef")
ID_LENGTH = 12


def new_id() -> str:
    """Return a fresh edit id: twelve hexadecimal digits from the system's randomness."""
    return secrets.token_hex(ID_LENGTH // 2)


def check_id(value: str) -> str:
    """Return an edit id unchanged, or raise `IntegrityError`: ids become parts of file names."""
    if len(value) != ID_LENGTH or not set(value) <= ID_ALPHABET:
        raise IntegrityError(f"{value!r} is no edit id (twelve hexadecimal digits).")
    return value


class Edit(Described, BaseModel):
    """One edit: what was asked, how it was computed, for which model, and how it came out.

    The delta itself is stored beside the record, under `blob`, and read through the ledger.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    id: str = Field(default_factory=new_id, description="Twelve hexadecimal digits")
    sequence: int = Field(default=0, ge=0, description="Place in its ledger; 0 before it has one")
    created: str = Field(
        default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"),
        description="When it was computed (UTC, ISO 8601)",
    )
    method: str = Field(description="Name of the method")
    delta_kind: str = Field(description="Kind of its delta")
    requests: tuple[Request, ...] = Field(min_length=1, description="What was asked")
    config: dict[str, Any] = Field(
        description="Every hyper-parameter as it was resolved: layers as numbers"
    )
    fingerprint: dict[str, str] = Field(
        description="SHA-256 of the base's configuration and of each parameter it refers to"
    )
    on_top_of: str | None = Field(
        default=None,
        description="Id of an edit that was active when it was computed, as all was that this one "
        "was computed on; none where it does not depend on what is active",
    )
    parents: tuple[str, ...] = Field(default=(), description="Ids of the others that were active")
    versions: dict[str, str] = Field(default_factory=dict, description="Libraries and the method")
    blob: str = Field(default="", description="SHA-256 of the stored delta")
    nbytes: int = Field(default=0, ge=0, description="Bytes that the delta takes")
    seconds: float = Field(default=0.0, ge=0, description="Time it took to compute")
    artifacts: dict[str, str] = Field(
        default_factory=dict,
        description="What the delta needs besides: name in the cache folder → SHA-256 of the file",
    )
    made_with: dict[str, str] = Field(
        default_factory=dict,
        description="Trained networks that computed it, and that it no longer needs: name in the "
        "cache folder → SHA-256 of the file",
    )
    outcome: Outcome = Field(
        default_factory=Outcome, description="What was measured on the state that the user got"
    )

    _delta: Any = PrivateAttr(default=None)

    @field_validator("id")
    @classmethod
    def _id_is_safe(cls, value: str) -> str:
        try:
            return check_id(value)
        except IntegrityError as error:
            raise ValueError(str(error)) from None

    @field_validator("parents")
    @classmethod
    def _ids_are_shared(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # Every record of a sequence names those before it: thousands of times the same ids.
        return tuple(map(sys.intern, value))

    def bind(self, delta: Delta, **changes: Any) -> Edit:
        """Return this record with its delta at hand (and with some fields replaced)."""
        bound = self.model_copy(update=changes)
        bound._delta = delta
        return bound

    @property
    def delta(self) -> Delta:
        """The data of the change; raise `LedgerError` when it was not read from the ledger."""
        # Asked for thousands of times a change; through `self._delta` it is thirty times slower.
        private = self.__pydantic_private__ or {}
        delta: Delta | None = private.get("_delta")
        if delta is None:
            raise LedgerError(f"The delta of edit {self.id} is not loaded: ask `ledger.delta(id)`.")
        return delta

    @property
    def made_by(self) -> str:
        """The package that brought its method, with the version: "errata-rome 0.1.0"."""
        return self.versions.get("method") or f"an unknown version of {self.method}"

    def _facts(self) -> Iterable[tuple[str, str]]:
        yield "", repr(self.id)
        yield "", self.method
        first = self.requests[0]
        yield "", f"{shortened(first.text)!r} → {shortened(first.wish, 40)!r}"
        if len(self.requests) > 1:
            yield "requests", str(len(self.requests))
        for name in ("layer", "layers"):
            if self.config.get(name) is not None:
                yield name, shortened(str(self.config[name]), 40)
        yield from self.outcome._facts()

    def as_row(self) -> dict[str, Any]:
        """Return what a table shows of it."""
        found = self.outcome
        return {
            "id": self.id, "method": self.method, "edit": self.title,
            "takes_effect": found.efficacy.value if found.efficacy else None,
            "norm": found.relative_norm.value if found.relative_norm else None,
            "perplexity_ratio": found.perplexity.ratio_to_base if found.perplexity else None,
            "warnings": len(found.warnings), "seconds": self.seconds, "bytes": self.nbytes,
            "created": self.created,
        }  # fmt: skip

    @property
    def title(self) -> str:
        """One line for people: the first request and how many more there are."""
        first = self.requests[0].plain
        more = f" (+{len(self.requests) - 1} more)" if len(self.requests) > 1 else ""
        return f"{first.text} → {first.wish}{more}"


EditLike = Edit | str
"""What names an edit: its record, its id or a unique prefix of it."""
EditsLike = EditLike | Iterable[EditLike]
"""What names edits: one, or a list of them, such as `Editor.edit` returns for a list."""


def each(edits: Iterable[Any]) -> list[Any]:
    """Return what arguments name one by one, where an argument may be a list of edits."""
    single = (Edit, str)  # a record is a pydantic model, which is iterable
    lists = (
        [one] if isinstance(one, single) or not isinstance(one, Iterable) else one for one in edits
    )
    return [edit for several in lists for edit in several]


class LogEntry(NamedTuple):
    """One line of the log.

    Attributes:
        edit: the edit.
        active: it is on the model.
        conflicts: ids of edits that say something else about the same fact.
        overlaps: ids of edits whose keys hardly differ from its own.
        stale: it is active, but was computed on top of an edit that is not.
    """

    edit: Edit
    active: bool
    conflicts: tuple[str, ...]
    overlaps: tuple[str, ...] = ()
    stale: bool = False

    @classmethod
    def of(cls, edit: Edit, active: Collection[str], stale: Collection[str]) -> LogEntry:
        """Return the line of an edit, given the ids of those that are active, and stale."""
        outcome, on = edit.outcome, edit.id in active
        overlaps = tuple(outcome.overlaps)
        return cls(edit, on, outcome.conflicts, overlaps, on and edit.id in stale)

    def as_row(self) -> dict[str, Any]:
        """Return what a table shows of it."""
        state = {"active": self.active, "stale": self.stale, "conflicts": len(self.conflicts)}
        row = self.edit.as_row()
        return {"id": row.pop("id"), **state, **row}
