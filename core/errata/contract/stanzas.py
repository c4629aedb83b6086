"""One method's stanza in a registry: its paper, what it can do, and presets for models."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from errata.edits.request import OPERATIONS, Kind, Operation
from errata.errors import UnknownNameError
from errata.model.task import Task

if TYPE_CHECKING:
    from errata.model.anatomy import Anatomy

Architecture = Literal["decoder", "encoder-decoder", "encoder"]
MATCH_KEYS = ("model_type", "n_layers", "hidden_size", "vocab_size", "name", "variant")
_LANGUAGE_TASKS: dict[str, Task] = {
    "decoder": "causal", "encoder-decoder": "seq2seq", "encoder": "masked",
}  # fmt: skip
NUMBERS = ("n_layers", "hidden_size", "vocab_size")

STREAM_BATCH = 100
"""Requests that a method which takes all at once gets where batches are kept one by one."""


class _Stanza(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Capabilities(_Stanza):
    """What a method can do. The core checks requests and models against it."""

    kinds: tuple[Kind, ...] = Field(description="Kinds of request it carries out")
    operations: tuple[Operation, ...] = Field(
        default=OPERATIONS, description="Of relation requests: add, delete, both in one request"
    )
    batch: bool = Field(default=False, description="Takes several requests at once")
    default_batch: int | None = Field(
        default=1, ge=1, description="Requests per call when none is said; null: all at once"
    )
    sequential: bool = Field(default=True, description="Can edit a model that is already edited")
    architectures: tuple[Architecture, ...] = Field(description="Kinds of transformer it edits")
    tasks: tuple[Task, ...] = Field(
        default=(), description="Tasks of a model; none: language models of these architectures"
    )
    needs: tuple[str, ...] = Field(default=(), description="dense_mlp, second_moment, training …")
    spares_behind_norm: bool | None = Field(
        default=None,
        description="Measured to spare neighbours where a norm stands behind the MLP, or not to",
    )
    edits_work: float = Field(
        default=0.9, ge=0, le=1, description="Least share of single edits that take effect"
    )
    retains: float = Field(
        default=0.0, ge=0, le=1, description="Least share of 20 edits in sequence that still hold"
    )

    @model_validator(mode="before")
    @classmethod
    def _language_models(cls, given: Any) -> Any:
        """Fill in the tasks of language models where none is declared."""
        kinds = given.get("architectures") if isinstance(given, dict) else None
        if not isinstance(kinds, (list, tuple)) or given.get("tasks"):
            return given  # pydantic says what is wrong with it
        usual = [task for kind, task in _LANGUAGE_TASKS.items() if kind in kinds]
        return {**given, "tasks": usual}


class Preset(_Stanza):
    """Hyper-parameters for the models that `match`.

    All keys must match; name is a glob pattern, and of several values in a list one must match.
    variant is not the model's but the method's hyper-parameter of that name.
    """

    match: dict[str, str | int | tuple[str | int, ...]] = Field(default_factory=dict)
    values: dict[str, Any]
    source: str = Field(default="", description="Where the numbers come from")
    set_by: str = Field(default="", description="The registry file it stands in; set when merging")

    @field_validator("match")
    @classmethod
    def _can_match(cls, match: dict[str, Any]) -> dict[str, Any]:
        for key, wanted in match.items():
            if key not in MATCH_KEYS:
                raise ValueError(str(UnknownNameError("preset match key", key, MATCH_KEYS)))
            for choice in wanted if isinstance(wanted, tuple) else (wanted,):
                if isinstance(choice, int) != (key in NUMBERS):
                    kind = "a whole number" if key in NUMBERS else "text"
                    raise ValueError(f"{key} = {choice!r} matches nothing: give {kind}")
        return match

    def fits(self, facts: Mapping[str, Any]) -> bool:
        """Say whether a model (and the method's variant) with these facts is meant."""
        for key, wanted in self.match.items():
            given = facts.get(key)
            choices = wanted if isinstance(wanted, tuple) else (wanted,)
            if key == "name":
                name = str(given).lower()
                if not any(fnmatch.fnmatch(name, str(choice).lower()) for choice in choices):
                    return False
            elif given not in choices:
                return False
        return True


def preset_facts(anatomy: Anatomy, name: str) -> dict[str, Any]:
    """Return what presets are matched against, of a model of this name."""
    return {**{key: getattr(anatomy, key) for key in ("model_type", *NUMBERS)}, "name": name}


class EasyEditNames(_Stanza):
    """What the method and its hyper-parameters are called in EasyEdit's hparams files."""

    names: dict[str, dict[str, Any]] = Field(
        description="Each `alg_name` that means this method → the values that the name implies"
    )
    when: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields of the file that must have these values; of a list, one of them (null "
        "where the file lacks the field)",
    )
    fields: dict[str, str | tuple[str, ...]] = Field(
        description="Field of the file (`outer.inner` where nested) → hyper-parameter here; a "
        "list's entries → several"
    )
    left: dict[str, str] = Field(
        default_factory=dict, description="Field without a counterpart → what errata does instead"
    )
    values: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Field of the file → its values → those here"
    )
    layer_of: str = Field(
        default="",
        description="Field with names of parameters; `layer` (or `layers`) is where they are",
    )


class MethodEntry(_Stanza):
    """What the catalogue says about one method."""

    title: str
    summary: str = ""
    paper: str = ""
    url: str = ""
    family: Literal["external", "merge", "intrinsic"]
    delta_kind: str
    status: Literal["stable", "experimental"] = Field(
        default="stable", description="How well tried it is"
    )
    evidence: str = Field(
        default="",
        description="Page with what was measured: a path below errata's docs, or an address",
    )
    capabilities: Capabilities
    defaults: dict[str, Any] = Field(default_factory=dict, description="Values for every model")
    presets: tuple[Preset, ...] = ()
    easyedit: EasyEditNames | None = None
